"""Products of int8 codes with few rows of X, for Hopper: the weight streams, a cluster shares sums along K.

Few rows cannot fill tiles of 128, and the time is that of reading the weight once.  So the weight takes the
place of A, 128 of its rows in a tile, and X that of B, with as many columns as there are tokens.  To keep all
multiprocessors reading, the blocks of a cluster work on one tile, each on a part of K.  Their int32 sums stay
in shared memory, where the whole cluster reads them: each block adds up, scales and writes a share of the
tile.  The first tiles of the weight are on their way before the kernel that made the codes of X has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.int8.arithmetic import product
from cuda_backend.int8.epilogue_hopper import INVERSE, NO_BIAS, build_weight, kind_of
from cuda_backend.int8.gemm_hopper import STEPS_OF_A_STAGE
from cuda_backend.int8.outliers_hopper import clear_marks
from cuda_backend.int8.variant_hopper import CONSUMERS, STEP, Narrow
from cuda_backend.ptx import barrier, cluster, copy, grid, matrix_copy, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["PAD", "SIGNATURE", "build", "build_accumulate"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    *[uint64] * 2,  # descriptors of the weight and of X
    *[uint64] * 4,  # out; absmax of the rows of X and of the weight; bias, or 0
    *[uint64] * 3,  # number of outliers, or 0 if there are none; their indices; the marks to be cleared
    *[uint64] * 2,  # outliers of X and of the weight, side by side
    *[uint64] * 6,  # x, its strides by row and feature; what outliers meet, by feature and column: bytes
    *[int32] * 7,  # tiles of tokens, steps of a block, steps, M, N, outliers side by side, K
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
    consumers = variant.threads - 32
    scaled = variant.kind != "int32"
    full_at = stages * stage_bytes
    empty_at = full_at + 8 * stages
    token_bytes = 4 * (features + PAD)

    next_stage = ring(stages)
    pack, unpack = registers.pack_pair(kind_of(variant.kind)), registers.unpack_low(kind_of(variant.kind))
    weight = build_weight(variant.kind, variant.outliers)

    @device_function
    def produce(base: Any, w_map: Any, x_map: Any, first: Any, end: Any, row: Any, token: Any) -> None:
        matrix_copy.acquire(w_map)
        matrix_copy.acquire(x_map)
        ahead = int32(min(end - first, stages))
        for stage in range(ahead):
            full = base + full_at + 8 * stage
            barrier.expect_bytes(full, stage_bytes)
            matrix_copy.load(base + stage * stage_bytes, w_map, full, int32((first + stage) * STEP), row)
        grid.wait_for_earlier_grids()
        for stage in range(ahead):
            full, target = base + full_at + 8 * stage, base + stage * stage_bytes
            matrix_copy.load(target + w_bytes, x_map, full, int32((first + stage) * STEP), token)
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
    def outlier_sum(token: Any, n: Any, factor: Any, number: Any, addresses: Any, side_by_side: Any) -> Any:
        indices, x_aside, w_aside, x, x_row, x_feature, w, w_feature, w_column = addresses
        y = float32(0.0)
        near = int32(min(number, side_by_side))
        a = x_aside + uint64(2) * uint64(token) * uint64(side_by_side)
        b = w_aside + uint64(2) * uint64(n) * uint64(side_by_side)
        for j in range(near):
            y += unpack(copy.load_half(a + uint64(2 * j))) * unpack(copy.load_half(b + uint64(2 * j)))
        for j in range(near, number):
            feature = uint64(copy.load_word(indices + uint64(4) * uint64(j)))
            left = unpack(copy.load_half(x + uint64(token) * x_row + feature * x_feature))
            y += left * weight(w, uint64(n) * w_column + feature * w_feature, factor)
        return y

    @device_function
    def finish(
        base: Any, thread: Any, start: Any, first: Any, out: Any, scales: Any, number: Any, addresses: Any,
        M: Any, N: Any, side_by_side: Any,
    ) -> None:  # fmt: skip
        x_absmax, factor, shift = scales
        own = int32(thread & (features - 1))
        n = int32(start + own)
        place = int32(int32(cuda.blockIdx.x % blocks) * (consumers // features) + thread // features)
        end = int32(min(M - first, tokens))
        if n < N:
            while place < end:
                total, token = int32(0), int32(first + place)
                for block in range(blocks):
                    total += cluster.load_word(uint32(base + place * token_bytes + 4 * own), uint32(block))
                at = uint64(token) * uint64(N) + uint64(n)
                if scaled:
                    row = copy.load_float(x_absmax + uint64(4) * uint64(token))
                    y = product(product(product(float32(total), row), factor), float32(INVERSE)) + shift
                    if number > 0:
                        y += outlier_sum(token, n, factor, number, addresses, side_by_side)
                    copy.store_global_half(out + uint64(2) * at, pack(y, float32(0.0)))
                else:
                    copy.store_global_word(out + uint64(4) * at, uint32(total))
                place = int32(place + blocks * (consumers // features))

    def product_of_few(
        w_map: Any, x_map: Any, out: Any, x_absmax: Any, w_absmax: Any, bias: Any,
        number_at: Any, indices: Any, marks: Any, x_aside: Any, w_aside: Any,
        x: Any, x_row: Any, x_feature: Any, w: Any, w_feature: Any, w_column: Any,
        token_tiles: Any, own_steps: Any, steps: Any, M: Any, N: Any, side_by_side: Any, K: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((copy.shared_address(shared) + uint32(1023)) & uint32(0xFFFFFC00))
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            for i in range(stages):
                barrier.initialise(base + full_at + 8 * i, 1)
                barrier.initialise(base + empty_at + 8 * i, consumers // 32)
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
        if registers.uniform(thread >> 5) == consumers // 32:
            if thread == consumers and first < end:
                produce(base, w_map, x_map, first, end, start, token)
        else:
            accumulate(base, thread, first, end)
        cluster.synchronise()
        if thread < consumers:
            grid.wait_for_earlier_grids()
            number = int32(0)
            if number_at != uint64(0):
                number = copy.load_word(number_at)
            addresses = (indices, x_aside, w_aside, x, x_row, x_feature, w, w_feature, w_column)
            scales = (x_absmax, factor, shift)
            finish(base, thread, start, token, out, scales, number, addresses, M, N, side_by_side)
            if number > 0:
                own = int32(cuda.blockIdx.x * consumers + thread)
                clear_marks(marks, K, own, int32(cuda.gridDim.x * consumers))
        cluster.synchronise()  # a block's sums stay until all have read them

    return product_of_few
