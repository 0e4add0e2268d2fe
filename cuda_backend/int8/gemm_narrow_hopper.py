"""Products of int8 codes with few rows of X, for Hopper: the weight streams, blocks share sums along K.

Few rows cannot fill tiles of 128, and the time is that of reading the weight once.  So the weight takes the
place of A, 128 of its rows in a tile, and X that of B, with as many columns as there are tokens.  To keep all
multiprocessors reading, several blocks work on one tile, each on a part of K, and add into int32 sums in
global memory: exact in any order.  The last to add scales, adds bias and outliers, writes, and leaves zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.arithmetic import product
from cuda_backend.int8.epilogue_hopper import INVERSE, NO_BIAS, build_weight, kind_of
from cuda_backend.int8.gemm_hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    STEPS_OF_A_STAGE,
    ring,
)
from cuda_backend.int8.variant_hopper import STEP, Narrow
from cuda_backend.ptx import barrier, copy, registers, tma, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["SIGNATURE", "build"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    *[uint64] * 2,  # descriptors of the weight and of X
    *[uint64] * 2,  # sums [M, N], int32; counters, one for each tile: all are 0 before and after
    *[uint64] * 4,  # out; absmax of the rows of X and of the weight; bias, or 0
    *[uint64] * 4,  # number of outliers, or 0; their indices; outliers of X and of the weight, side by side
    *[uint64] * 6,  # x, its strides by row and feature; what outliers meet, by feature and column: bytes
    *[int32] * 7,  # tiles, blocks that share a tile, steps of a block, steps, M, N, outliers side by side
)


def build(variant: Narrow) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, declared as launch bound with one block, ``variant.shared_bytes`` of
    dynamic shared memory, and a block for each part of each tile.
    """
    features, tokens, stages = variant.features, variant.tokens, variant.stages
    w_bytes, stage_bytes = variant.w_bytes, variant.w_bytes + variant.x_bytes
    count, consumers = tokens // 2, variant.threads - 128
    scaled = variant.kind != "int32"
    full_at = stages * stage_bytes
    empty_at = full_at + 8 * stages
    word_at = empty_at + 8 * stages

    next_stage = ring(stages)
    give_registers = registers.give_registers(PRODUCER_REGISTERS)
    take_registers = registers.take_registers(CONSUMER_REGISTERS)
    descriptor = wgmma.descriptor_k_major
    multiply, done = wgmma.product_codes(tokens, STEPS_OF_A_STAGE), wgmma.wait(0, count)
    together = barrier.named(1, consumers)
    pack, unpack = registers.pack_pair(kind_of(variant.kind)), registers.unpack_low(kind_of(variant.kind))
    weight = build_weight(variant.kind, variant.outliers)

    @device_function
    def produce(base: Any, w_map: Any, x_map: Any, first: Any, end: Any, row: Any) -> None:
        tma.acquire_descriptor(w_map)
        tma.acquire_descriptor(x_map)
        stage, parity = int32(0), int32(1)
        step = first
        while step < end:
            full, target = base + full_at + 8 * stage, base + stage * stage_bytes
            barrier.wait(base + empty_at + 8 * stage, parity)
            barrier.expect_bytes(full, stage_bytes)
            tma.load_2d(target, w_map, full, int32(step * STEP), row)
            tma.load_2d(target + w_bytes, x_map, full, int32(step * STEP), 0)
            stage, parity = next_stage(stage, parity)
            step = int32(step + 1)

    @device_function
    def accumulate(
        base: Any, thread: Any, sums: Any, first: Any, end: Any, start: Any, M: Any, N: Any
    ) -> None:
        total = cuda.local.array(count, int32)
        lane = int32(thread & 31)
        group = registers.uniform(int32(thread >> 7) - 1)
        own = int32(start + 64 * group + 16 * ((thread >> 5) & 3) + (lane >> 2))
        for i in range(count):
            total[i] = 0
        stage, parity = int32(0), int32(0)
        step = first
        while step < end:
            place = base + stage * stage_bytes
            barrier.wait(base + full_at + 8 * stage, parity)
            wgmma.fence()
            multiply(total, descriptor(place + uint32(group * (64 * STEP))), descriptor(place + w_bytes))
            wgmma.commit()
            done(total)
            if lane == 0:
                barrier.arrive(base + empty_at + 8 * stage)
            stage, parity = next_stage(stage, parity)
            step = int32(step + 1)
        for i in range(count // 4):
            for e in range(2):
                token = int32(8 * i + 2 * (lane & 3) + e)
                if token < M:
                    at = sums + uint64(4) * (uint64(token) * uint64(N) + uint64(own))
                    if own < N:
                        copy.reduce_add(at, total[4 * i + e])
                    if own + 8 < N:
                        copy.reduce_add(at + uint64(32), total[4 * i + 2 + e])

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
        thread: Any, sums: Any, out: Any, x_absmax: Any, w_absmax: Any, bias: Any, number: Any,
        addresses: Any, start: Any, M: Any, N: Any, side_by_side: Any,
    ) -> None:  # fmt: skip
        n = int32(start + (thread & (features - 1)))
        token = int32((thread - 128) // features)
        if n < N:
            factor, shift = float32(0.0), float32(NO_BIAS)
            if scaled:
                factor = copy.load_float(w_absmax + uint64(4) * uint64(n))
                if bias != uint64(0):
                    shift = unpack(copy.load_half(bias + uint64(2) * uint64(n)))
            while token < M:
                at = uint64(token) * uint64(N) + uint64(n)
                total = copy.load_word_fresh(sums + uint64(4) * at)
                copy.store_global_word(sums + uint64(4) * at, uint32(0))
                if scaled:
                    row = copy.load_float(x_absmax + uint64(4) * uint64(token))
                    y = product(product(product(float32(total), row), factor), float32(INVERSE)) + shift
                    if number > 0:
                        y += outlier_sum(token, n, factor, number, addresses, side_by_side)
                    copy.store_global_half(out + uint64(2) * at, pack(y, float32(0.0)))
                else:
                    copy.store_global_word(out + uint64(4) * at, uint32(total))
                token = int32(token + consumers // features)

    def product_of_few(
        w_map: Any, x_map: Any, sums: Any, counters: Any, out: Any, x_absmax: Any, w_absmax: Any, bias: Any,
        number_at: Any, indices: Any, x_aside: Any, w_aside: Any,
        x: Any, x_row: Any, x_feature: Any, w: Any, w_feature: Any, w_column: Any,
        tiles: Any, shares: Any, own_steps: Any, steps: Any, M: Any, N: Any, side_by_side: Any,
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
        block = int32(cuda.blockIdx.x)
        share = registers.quotient(block, tiles)
        tile = int32(block - share * tiles)
        first = int32(share * own_steps)
        end = int32(min(steps, first + own_steps))
        start = int32(tile * features)
        if registers.uniform(thread >> 7) == 0:
            give_registers()
            if thread == 0:
                produce(base, w_map, x_map, first, end, start)
        else:
            take_registers()
            accumulate(base, thread, sums, first, end, start, M, N)
            cuda.threadfence()
            together()
            if thread == 128:
                before = copy.fetch_increment(counters + uint64(4) * uint64(tile), shares - 1)
                copy.store_shared_word(base + word_at, before)
            together()
            if copy.load_shared_word(base + word_at) == shares - 1:
                cuda.threadfence()
                number = int32(0)
                if number_at != uint64(0):
                    number = copy.load_word(number_at)
                addresses = (indices, x_aside, w_aside, x, x_row, x_feature, w, w_feature, w_column)
                finish(
                    thread, sums, out, x_absmax, w_absmax, bias, number, addresses, start, M, N, side_by_side
                )

    return product_of_few
