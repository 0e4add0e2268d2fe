"""LLM.int8() of few rows on Hopper in one kernel: quantised, multiplied, outliers and all.

For few rows each kernel beside the product costs as much as the product.  Here the weight streams as in
`gemm_narrow_hopper`, a cluster for a tile of 128 outputs, each block on a part of K.  While its first tiles
are on their way a block reads that part of x, which its threads hold: it finds each row's largest inlier,
learns those of the other blocks of the cluster, and writes codes to shared memory as tensor cores read them.
A column of that part holds an outlier if one of the few rows has one there, which the block sees for itself:
its codes are 0, and its numbers are multiplied in float32, apart.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3; the fusion is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.int8.arithmetic import product
from cuda_backend.int8.epilogue_hopper import INVERSE, NO_BIAS, build_weight, kind_of
from cuda_backend.int8.gemm_narrow_hopper import PAD, build_accumulate
from cuda_backend.int8.quantize_hopper import build_coder, is_usual, largest_magnitude
from cuda_backend.int8.variant_hopper import STEP, Few
from cuda_backend.ptx import barrier, cluster, copy, matrix_copy, registers
from cuda_backend.ptx.assembly import types
from refimpl.quant.absmax import LIMIT

__all__ = ["SIGNATURE", "build"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    uint64,  # descriptor of the weight
    *[uint64] * 5,  # x, bytes from a row to the next; out; absmax of the weight; bias, or 0
    *[uint64] * 3,  # what outliers meet, its strides by feature and output in bytes
    *[int32] * 6,  # steps of a block, steps, M, N, K; bits from which a magnitude is an outlier's
)
LISTED = 256  # outliers of a block's part that are worked on together


def build(variant: Few) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, declared as launch bound with one block, ``variant.shared_bytes`` of
    dynamic shared memory, and a cluster of ``variant.blocks`` for each tile of 128 outputs.
    """
    rows, tokens, stages, blocks = variant.rows, variant.tokens, variant.stages, variant.blocks
    features, consumers, vectors = variant.features, variant.threads - 32, variant.vectors
    w_bytes, x_bytes, row_vectors = variant.w_bytes, variant.x_bytes, 16 * variant.room
    words_held, words_marked, halves = 4 * vectors, 4 * variant.room, max(1, rows // 2)
    rounds = -(-words_marked // 32)
    codes_at = stages * w_bytes
    full_at = codes_at + variant.room * x_bytes
    empty_at = full_at + 8 * stages
    token_bytes = 4 * (features + PAD)
    apart_at = tokens * token_bytes  # sums of outliers, behind those of codes

    next_stage = ring(stages)
    together = barrier.named(1, consumers)
    pack, unpack = registers.pack_pair(kind_of(variant.kind)), registers.unpack_low(kind_of(variant.kind))
    coded = build_coder(variant.kind)
    weight = build_weight(variant.kind, "released")

    @device_function
    def x_place(base: Any, stage: Any, step: Any) -> Any:  # noqa: ARG001
        return base + codes_at + step * x_bytes

    accumulate = build_accumulate(tokens, stages, w_bytes, full_at, x_place)

    @device_function
    def produce(base: Any, w_map: Any, first: Any, end: Any, row: Any) -> None:
        matrix_copy.acquire(w_map)
        stage, parity = int32(0), int32(1)
        step = first
        while step < end:
            full = base + full_at + 8 * stage
            barrier.wait(base + empty_at + 8 * stage, parity)
            barrier.expect_bytes(full, w_bytes)
            matrix_copy.load(base + stage * w_bytes, w_map, full, int32(step * STEP), row)
            stage, parity = next_stage(stage, parity)
            step = int32(step + 1)

    @device_function
    def hold(words: Any, thread: Any, x: Any, x_row: Any, first: Any, end: Any, M: Any, K: Any) -> None:
        """Read this block's part of x."""
        for i in range(vectors):
            for e in range(4):
                words[4 * i + e] = uint32(0)
            place = int32(thread + consumers * i)
            row, group = int32(place // row_vectors), int32(place % row_vectors)
            column = int32(first * STEP + 8 * group)
            if row < M and column < min(K, end * STEP):
                copy.load_16(words, 4 * i, x + uint64(row) * x_row + uint64(2 * column))

    @device_function
    def inlier(words: Any, first: Any, group: Any, marks: Any, limit: Any) -> Any:
        """Return the largest magnitude of a vector that holds outliers, and mark their columns."""
        top, found = uint32(0), uint32(0)
        for e in range(8):
            bits = uint32((words[first + e // 2] >> uint32(16 * (e % 2))) & uint32(0x7FFF))
            if bits < limit:
                top = max(top, bits)
            else:
                found = uint32(found | uint32(1 << e))
        cuda.atomic.or_(marks, group >> 2, uint32(found << uint32(8 * (group & 3))))
        return uint32(top)

    @device_function
    def measure(
        words: Any, thread: Any, tops: Any, marks: Any, limit: Any, first: Any, end: Any, M: Any, K: Any
    ) -> None:
        """Find the largest inlier of each row of this part."""
        for i in range(vectors):
            place = int32(thread + consumers * i)
            row, group = int32(place // row_vectors), int32(place % row_vectors)
            top = uint32(largest_magnitude(words, 4 * i))
            # Where there is no x there is a 0, which a low limit makes an outlier.
            if top >= limit and row < M and first * STEP + 8 * group < min(K, end * STEP):
                top = inlier(words, 4 * i, group, marks, limit)
            top = registers.largest_word(top)
            if thread & 31 == 0 and row < M:
                cuda.atomic.max(tops, row, top)

    @device_function
    def encode(base: Any, words: Any, thread: Any, absmax: Any, marks: Any, M: Any) -> None:
        """Write codes to shared memory, in rows of 128 bytes whose sixteenths are exchanged by row."""
        for i in range(vectors):
            place = int32(thread + consumers * i)
            row, group = int32(place // row_vectors), int32(place % row_vectors)
            if row < M:
                marked = uint32(marks[group >> 2] >> uint32(8 * (group & 3)))
                for e in range(8):
                    bit = uint32((marked >> uint32(e)) & uint32(1))
                    words[4 * i + e // 2] &= ~uint32(uint32(bit * uint32(0xFFFF)) << uint32(16 * (e % 2)))
                largest = absmax[row]
                scale = float32(LIMIT) / largest  # infinite for a row of zeros
                low, high = coded(words, 4 * i, scale, is_usual(largest, scale))
                at = base + codes_at + (group >> 4) * x_bytes + row * STEP
                at += (((group & 15) >> 1) ^ (row & 7)) * 16 + (group & 1) * 8
                copy.store_shared_8(uint32(at), low, high)

    @device_function
    def listing(marks: Any, lane: Any, done: Any, listed: Any) -> Any:
        """List marked columns from number `done` on, in order, if there is room; return how many all are."""
        number = int32(0)
        for r in range(rounds):
            index = int32(32 * r + lane)
            word = uint32(0)
            if index < words_marked:
                word = marks[index]
            own = int32(cuda.popc(word))
            if registers.largest_word(uint32(own)) > uint32(0):
                upto = own
                for step in (1, 2, 4, 8, 16):
                    lower = registers.word_below(upto, step)
                    if lane >= step:
                        upto += lower
                place = int32(number + upto - own - done)
                while word != uint32(0):
                    if place >= 0 and place < LISTED:
                        listed[place] = int32(32 * index + int32(cuda.ffs(word)) - 1)
                    place += int32(1)
                    word = uint32(word & uint32(word - uint32(1)))
                number += int32(registers.from_lane(uint32(upto), 31))
        return number

    @device_function
    def multiply_outliers(
        base: Any, thread: Any, marks: Any, listed: Any, number: Any, first: Any, n: Any, factor: Any,
        x: Any, x_row: Any, w: Any, w_feature: Any, w_column: Any, M: Any, N: Any,
    ) -> None:  # fmt: skip
        """Leave sums over this part's outliers in shared memory, token by token."""
        y = cuda.local.array(halves, float32)
        for i in range(halves):
            y[i] = float32(0.0)
        upper = int32(thread // features)
        done = int32(0)
        while done < number:
            if done > 0:
                together()
                if thread < 32:
                    listing(marks, thread, done, listed)
                together()
            for j in range(min(int32(number - done), LISTED)):
                feature = uint64(int32(first * STEP + listed[j]))
                met = float32(0.0)
                if n < N:
                    met = weight(w, uint64(n) * w_column + feature * w_feature, factor)
                for i in range(halves):
                    token = int32(upper + 2 * i)
                    if token < M:
                        number_of_x = copy.load_half(x + uint64(token) * x_row + uint64(2) * feature)
                        y[i] += unpack(number_of_x) * met
            done = int32(done + LISTED)
        for i in range(halves):
            token = int32(upper + 2 * i)
            if token < M:
                at = base + apart_at + token * token_bytes + 4 * (thread & (features - 1))
                copy.store_shared_float(uint32(at), y[i])

    @device_function
    def finish(
        base: Any, thread: Any, part: Any, n: Any, out: Any, absmax: Any, numbers_at: Any, factor: Any,
        shift: Any, M: Any, N: Any,
    ) -> None:  # fmt: skip
        """Add what the blocks of the cluster have, scale and store a share of the tile."""
        token = int32(part * (consumers // features) + thread // features)
        if n < N:
            while token < M:
                at = uint32(base + token * token_bytes + 4 * (thread & (features - 1)))
                total, apart = int32(0), float32(0.0)
                for block in range(blocks):
                    total += cluster.load_word(at, uint32(block))
                    if cluster.load_word(numbers_at, uint32(block)) > 0:
                        apart += cluster.load_float(uint32(at + apart_at), uint32(block))
                y = product(product(product(float32(total), absmax[token]), factor), float32(INVERSE)) + shift
                y += apart
                place = uint64(token) * uint64(N) + uint64(n)
                copy.store_global_half(out + uint64(2) * place, pack(y, float32(0.0)))
                token = int32(token + blocks * (consumers // features))

    def layer_of_few(
        w_map: Any, x: Any, x_row: Any, out: Any, w_absmax: Any, bias: Any, w: Any, w_feature: Any,
        w_column: Any, own_steps: Any, steps: Any, M: Any, N: Any, K: Any, limit: Any,
    ) -> None:  # fmt: skip
        tops, absmax = cuda.shared.array(rows, uint32), cuda.shared.array(rows, float32)
        marks = cuda.shared.array(words_marked, uint32)
        listed, numbers = cuda.shared.array(LISTED, int32), cuda.shared.array(1, int32)
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((copy.shared_address(shared) + uint32(1023)) & uint32(0xFFFFFC00))
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            for i in range(stages):
                barrier.initialise(base + full_at + 8 * i, 1)
                barrier.initialise(base + empty_at + 8 * i, consumers // 32)
            barrier.publish_initialisation()
        if thread < rows:
            tops[thread] = uint32(0)
        place = thread
        while place < words_marked:
            marks[place] = uint32(0)
            place = int32(place + consumers + 32)
        cuda.syncthreads()
        tile, part = int32(cuda.blockIdx.x // blocks), int32(cuda.blockIdx.x % blocks)
        first = int32(part * own_steps)
        end, start = int32(min(steps, first + own_steps)), int32(tile * features)
        n = int32(start + (thread & (features - 1)))
        factor, shift = float32(0.0), float32(NO_BIAS)
        if registers.uniform(thread >> 5) == consumers // 32:
            if blocks > 1:
                cluster.arrive()
            if thread == consumers and first < end:
                produce(base, w_map, first, end, start)
            barrier.warp()
            if blocks > 1:
                cluster.wait()
        else:
            words = cuda.local.array(words_held, uint32)
            hold(words, thread, x, x_row, first, end, M, K)
            if n < N:
                factor = copy.load_float(w_absmax + uint64(4) * uint64(n))
                if bias != uint64(0):
                    shift = unpack(copy.load_half(bias + uint64(2) * uint64(n)))
            measure(words, thread, tops, marks, uint32(limit), first, end, M, K)
            if blocks > 1:
                cluster.arrive()
                cluster.wait()
            else:
                together()
            if thread < M:
                top = uint32(0)
                for block in range(blocks):
                    there = cluster.load_word(copy.shared_address(tops) + uint32(4 * thread), uint32(block))
                    top = max(top, uint32(there))
                absmax[thread] = unpack(top)
            together()
            encode(base, words, thread, absmax, marks, M)
            barrier.publish_stores()
            if thread < 32:
                number = listing(marks, thread, 0, listed)
                if thread == 0:
                    numbers[0] = number
            together()
            accumulate(base, thread, first, end)
            number = numbers[0]
            if number > 0:
                multiply_outliers(
                    base, thread, marks, listed, number, first, n, factor, x, x_row, w, w_feature, w_column,
                    M, N,
                )  # fmt: skip
        cluster.synchronise()
        if thread < consumers:
            numbers_at = copy.shared_address(numbers)
            finish(base, thread, part, n, out, absmax, numbers_at, factor, shift, M, N)
        cluster.synchronise()  # a block's sums stay until all have read them

    return layer_of_few
