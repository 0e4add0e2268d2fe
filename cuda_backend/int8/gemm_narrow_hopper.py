"""Products of int8 codes with few rows of X, for Hopper: the weight streams, a cluster shares sums along K.

Few rows cannot fill tiles of 128, and the time is that of reading the weight once.  So the weight takes the
place of A, 128 of its rows in a tile, and X that of B, with as many columns as there are tokens.  To keep all
multiprocessors reading, the blocks of a cluster work on one tile, each on a part of K.  Their int32 sums stay
in shared memory, where the whole cluster reads them: each block adds up, scales and writes a share of the
tile.  The first tiles of the weight are on their way before the kernel that made the codes of X has ended.
Of a layer it sees to the outliers as well (`outliers_few_hopper`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.int8.arithmetic import product
from cuda_backend.int8.epilogue_hopper import INVERSE, NO_BIAS, kind_of
from cuda_backend.int8.gemm_layout_hopper import STEPS_OF_A_STAGE
from cuda_backend.int8.outliers_few_hopper import build_outliers
from cuda_backend.int8.variant_hopper import CONSUMERS, STEP, Narrow
from cuda_backend.ptx import barrier, cluster, copy, grid, matrix_copy, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["PAD", "SIGNATURE", "build", "build_accumulate"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    *[uint64] * 2,  # descriptors of the weight and of X
    *[uint64] * 4,  # out; absmax of the rows of X and of the weight; bias, or 0
    *[uint64] * 3,  # indices of outliers, those that shared memory has no room for; marks; counters
    *[uint64] * 2,  # codes of x, bytes from a row to the next
    *[uint64] * 6,  # x, its strides by row and feature; what outliers meet, by feature and column: bytes
    *[int32] * 6,  # tiles of tokens, steps of a block, steps, M, N, K
)
PAD = 4  # words between the sums of two tokens: what the lanes of a warp store lies in different banks


def build_accumulate(
    tokens: int, stages: int, stage_bytes: int, full_at: int, x_place: Callable[..., Any]
) -> Callable[..., None]:
    """Return ``accumulate(base, thread, first, end)``, the consumers' product of steps `first` to `end`.

    Sums are left in shared memory from ``base`` on, token by token, in place of what the stages held.
    ``x_place(base, stage, step)`` is where the codes of X of a step lie, ``full_at`` where barriers begin.
    """
    count, empty_at, token_bytes = tokens // 2, full_at + 8 * stages, 4 * (64 * CONSUMERS + PAD)
    next_stage = ring(stages)
    descriptor = wgmma.descriptor_k_major
    multiply, done = wgmma.product_codes(tokens, STEPS_OF_A_STAGE), wgmma.wait(0, count)
    together = barrier.named(1, 128 * CONSUMERS)

    @device_function
    def accumulate(base: Any, thread: Any, first: Any, end: Any) -> None:
        total = cuda.local.array(count, int32)
        lane = int32(thread & 31)
        group = registers.uniform(int32(thread >> 7))
        own = int32(64 * group + 16 * ((thread >> 5) & 3) + (lane >> 2))
        for i in range(count):
            total[i] = 0
        stage, parity = int32(0), int32(0)
        step = first
        while step < end:
            w_place = uint32(base + stage * stage_bytes + group * (64 * STEP))
            barrier.wait(base + full_at + 8 * stage, parity)
            wgmma.fence()
            multiply(
                total, descriptor(w_place), descriptor(uint32(x_place(base, stage, int32(step - first))))
            )
            wgmma.commit()
            done(total)
            if lane == 0:
                barrier.arrive(base + empty_at + 8 * stage)
            stage, parity = next_stage(stage, parity)
            step = int32(step + 1)
        together()  # the sums take the place of the first stages
        at = uint32(base + 2 * (lane & 3) * token_bytes + 4 * own)
        for i in range(count // 4):
            for e in range(2):
                place = uint32(at + (8 * i + e) * token_bytes)
                copy.store_shared_word(place, total[4 * i + e])
                copy.store_shared_word(uint32(place + 32), total[4 * i + 2 + e])

    return accumulate


def build(variant: Narrow) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, declared as launch bound with one block, ``variant.shared_bytes`` of
    dynamic shared memory, and a cluster of ``variant.blocks`` for each tile.
    """
    features, tokens, stages, blocks = variant.features, variant.tokens, variant.stages, variant.blocks
    w_bytes, stage_bytes = variant.w_bytes, variant.w_bytes + variant.x_bytes
    consumers = 128 * CONSUMERS
    scaled = variant.kind != "int32"
    full_at = stages * stage_bytes
    empty_at = full_at + 8 * stages
    token_bytes = 4 * (features + PAD)
    used_at = full_at + variant.other_bytes - 8
    beside, together, token_step = variant.beside, variant.together, variant.token_step
    turns = variant.own_tokens // together

    next_stage = ring(stages)
    pack, unpack = registers.pack_pair(kind_of(variant.kind)), registers.unpack_low(kind_of(variant.kind))
    outliers = build_outliers(variant, empty_at + 8 * stages, token_bytes)
    begin_outliers, list_outliers, clear_marks, add_outliers, added = outliers
    meet = barrier.named(1, consumers)

    @device_function
    def begin(base: Any, w_map: Any, x_map: Any, first: Any, ahead: Any, row: Any) -> None:
        """Bring the weight's part of the first stages, which waits for nothing."""
        matrix_copy.acquire(w_map)
        matrix_copy.acquire(x_map)
        for stage in range(ahead):
            full = base + full_at + 8 * stage
            barrier.expect_bytes(full, stage_bytes)
            matrix_copy.load(base + stage * stage_bytes, w_map, full, int32((first + stage) * STEP), row)

    @device_function
    def go_on(base: Any, x_map: Any, first: Any, ahead: Any, token: Any) -> None:
        """Bring the part of x of these stages."""
        for stage in range(ahead):
            full, target = base + full_at + 8 * stage, base + stage * stage_bytes
            matrix_copy.load(target + w_bytes, x_map, full, int32((first + stage) * STEP), token)

    @device_function
    def produce(
        base: Any, w_map: Any, x_map: Any, first: Any, ahead: Any, end: Any, row: Any, token: Any
    ) -> None:
        stage, parity = int32(0), int32(0)
        step = int32(first + ahead)
        while step < end:
            full, target = base + full_at + 8 * stage, base + stage * stage_bytes
            barrier.wait(base + empty_at + 8 * stage, parity)
            barrier.expect_bytes(full, stage_bytes)
            matrix_copy.load(target, w_map, full, int32(step * STEP), row)
            matrix_copy.load(target + w_bytes, x_map, full, int32(step * STEP), token)
            stage, parity = next_stage(stage, parity)
            step = int32(step + 1)

    @device_function
    def x_place(base: Any, stage: Any, step: Any) -> Any:  # noqa: ARG001
        return base + stage * stage_bytes + w_bytes

    accumulate = build_accumulate(tokens, stages, stage_bytes, full_at, x_place)

    @device_function
    def finish(
        base: Any, thread: Any, start: Any, tokens: Any, out: Any, scales: Any, number: Any, N: Any
    ) -> None:
        first, own, end = tokens
        x_absmax, factor, shift = scales
        total = cuda.local.array(together, int32)
        far = cuda.local.array(together, float32)
        rows = cuda.local.array(together, float32)
        feature = int32(thread & (features - 1))
        n = int32(start + feature)
        row, turn, used = int32(thread // features), int32(0), int32(0)
        own = int32(own + row)
        while n < N and turn < turns:
            # Without branches in between, what all these loads wait for is waited for once.
            for i in range(together):
                place = int32(min(own + token_step * i, end - 1))
                far[i], total[i], rows[i] = float32(NO_BIAS), int32(0), float32(0.0)
                at_sum = uint32(base + place * token_bytes + 4 * feature)
                if blocks == 1:
                    total[i] = copy.load_shared_word(at_sum)
                else:
                    for block in range(blocks):
                        total[i] += cluster.load_word(at_sum, uint32(block))
                if scaled:
                    rows[i] = copy.load_float(x_absmax + uint64(4) * uint64(first + place))
            if number > 0:
                for i in range(together):
                    far[i] = added(base, int32(row + 2 * i), feature)
            for i in range(together):
                used ^= total[i]
                place = int32(own + token_step * i)
                if place < end:
                    at = uint64(first + place) * uint64(N) + uint64(n)
                    if scaled:
                        y = product(product(product(float32(total[i]), rows[i]), factor), float32(INVERSE))
                        y += shift
                        copy.store_global_half(out + uint64(2) * at, pack(y + far[i], float32(0.0)))
                    else:
                        copy.store_global_word(out + uint64(4) * at, uint32(total[i]))
            own, row = int32(own + token_step * together), int32(row + 2 * together)
            turn = int32(turn + 1)
        if blocks > 1:  # no load is under way once this has been stored, of tokens there are not either
            copy.store_shared_word(uint32(base + used_at), used)

    def product_of_few(
        w_map: Any, x_map: Any, out: Any, x_absmax: Any, w_absmax: Any, bias: Any,
        indices: Any, marks: Any, counters: Any, codes: Any, codes_row: Any,
        x: Any, x_row: Any, x_feature: Any, w: Any, w_feature: Any, w_column: Any,
        token_tiles: Any, own_steps: Any, steps: Any, M: Any, N: Any, K: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((copy.shared_address(shared) + uint32(1023)) & uint32(0xFFFFFC00))
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            for i in range(stages):
                barrier.initialise(base + full_at + 8 * i, 1)
                barrier.initialise(base + empty_at + 8 * i, consumers // 32)
            if beside:
                begin_outliers(base)
            barrier.publish_initialisation()
        cuda.syncthreads()
        tile = int32(cuda.blockIdx.x // blocks)
        feature_tile = registers.quotient(tile, token_tiles)
        token = int32((tile - feature_tile * token_tiles) * tokens)
        first = int32(int32(cuda.blockIdx.x % blocks) * own_steps)
        end = int32(min(steps, first + own_steps))
        start = int32(feature_tile * features)
        # Scale and bias of this thread's column, on their way while codes arrive.
        n = int32(start + (thread & (features - 1)))
        factor, shift = float32(0.0), float32(NO_BIAS)
        if scaled and n < N:
            factor = copy.load_float(w_absmax + uint64(4) * uint64(n))
            if bias != uint64(0):
                shift = unpack(copy.load_half(bias + uint64(2) * uint64(n)))
        number, left = int32(0), int32(-1)
        own = int32(int32(cuda.blockIdx.x % blocks) * (consumers // features))
        its_tokens, weight = (token, own, int32(min(M - token, tokens))), (w, w_feature, w_column)
        warp = registers.uniform(thread >> 5)
        if warp < consumers // 32:
            accumulate(base, thread, first, end)
            grid.wait_for_earlier_grids()
            if beside:
                number = add_outliers(
                    base, thread, its_tokens, (x, x_row, x_feature), (codes, codes_row), weight, factor,
                    indices, start, N,
                )  # fmt: skip
        elif warp == consumers // 32:
            if thread == consumers:
                ahead = int32(min(end - first, stages))
                begin(base, w_map, x_map, first, ahead, start)
                grid.wait_for_earlier_grids()
                go_on(base, x_map, first, ahead, token)
                produce(base, w_map, x_map, first, ahead, end, start, token)
            barrier.warp()
        elif beside:
            grid.wait_for_earlier_grids()
            left = list_outliers(
                base, int32(thread & 31), marks, indices, counters, weight, start, N, K, int32(cuda.gridDim.x)
            )
        if blocks > 1:
            cluster.synchronise()
        elif warp < consumers // 32:
            meet()
        if warp < consumers // 32:
            finish(base, thread, start, its_tokens, out, (x_absmax, factor, shift), number, N)
        elif beside and warp > consumers // 32:
            clear_marks(int32(thread & 31), left, marks, K, int32(cuda.gridDim.x))
        if blocks > 1:
            cluster.leave()  # a block's sums stay until all have read them

    return product_of_few
