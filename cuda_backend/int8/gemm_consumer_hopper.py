"""A consumer warpgroup of a Hopper product of codes: 64 rows of each tile, multiplied and written.

The columns of a tile may be two halves, each with registers of its own.  Along K both are multiplied stage by
stage, but the last stages half by half: while tensor cores are at the right half, the left one is scaled, and
written if no outliers follow; else those of the left half are added while the right one is scaled.  Codes of
outliers are taken away in the same stream of products.  A tile that is not in halves is all in the left one,
and each step waits for the one before: ptxas serialises products of it that are under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.int8.epilogue_hopper import build_epilogue, build_removal, build_surplus, kind_of
from cuda_backend.int8.gemm_layout_hopper import GROUP, STEPS_OF_A_STAGE, layout_of, placing
from cuda_backend.int8.variant_hopper import CHUNK, STEP, TAKEN_CHUNK, Wide
from cuda_backend.ptx import barrier, copy, registers, wgmma, wgmma_halves
from cuda_backend.ptx.assembly import types

__all__ = ["build_consumer"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


def build_consumer(variant: Wide) -> Callable[..., None]:
    """Return ``consume``, what 128 threads do with all tiles of their block."""
    block_m, block_n, a_bytes = variant.block_m, variant.block_n, variant.a_bytes
    halved, width, at, last = variant.halves, variant.width, layout_of(variant), variant.last
    halves, count = block_n // width, width // 2
    scaled, beside = variant.kind != "int32", variant.beside
    removed = beside and variant.outliers == "released"
    pairs, short_right = max(2, 2 * last), width * 2 * CHUNK

    next_stage, place = ring(variant.stages), placing(GROUP)
    descriptor, short_descriptor = wgmma.descriptor_k_major, wgmma.descriptor_k_major_32
    right_at = width * STEP // 16
    multiply = wgmma_halves.product_codes_in_halves(block_n, STEPS_OF_A_STAGE, right_at, halves=halves)
    multiply_apart = wgmma_halves.product_codes_in_halves(
        block_n, STEPS_OF_A_STAGE, right_at, halves=halves, stages=max(1, last), apart=True
    )
    remove = wgmma_halves.product_codes_in_halves(block_n, [0], short_right // 16, halves=halves)
    multiply_outliers = wgmma.product_step(width, kind_of(variant.kind))
    begin_outliers = wgmma.product_step(width, kind_of(variant.kind), awaited=False)
    both_done = wgmma_halves.wait_for_both(count, halves)
    left_done, all_done = wgmma.wait(1, count), wgmma.wait(0, count)
    scale, store, store_codes = build_epilogue(variant)
    add_surplus, remove_surplus = build_surplus(variant), build_removal(variant)

    @device_function
    def hand_back(base: Any, lane: Any, stage: Any) -> None:
        """Tell the producer that a stage has been read, if there is one."""
        if lane == 0 and stage >= 0:
            barrier.arrive(base + at.empty + 8 * stage)

    @device_function
    def consume(
        base: Any, thread: Any, out: Any, absmax: Any, indices: Any, marks: Any, surplus: Any, taken: Any,
        first: Any, blocks: Any, problem: Any,
    ) -> None:  # fmt: skip
        tiles, rows, columns, steps, M, N, side_by_side = problem
        left = cuda.local.array(count, int32)
        right = cuda.local.array(count, int32)
        own = cuda.local.array(2, uint64)  # descriptors of A and B in a stage
        ends = cuda.local.array(pairs, uint64)  # and in the last ones
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        group = registers.uniform(int32(thread >> 7) - 1)
        own_row = int32(64 * group + 16 * ((thread >> 5) & 3) + (lane >> 2))
        a_own, a_short = uint32(group * (64 * STEP)), uint32(group * (64 * 2 * CHUNK))
        number, near = int32(0), int32(0)
        stage, parity, columns_parity = int32(0), int32(0), int32(0)
        tile = first
        while tile < tiles:
            row, column = place(tile, rows, columns)
            row = int32(row * block_m + own_row)
            start = int32(column * block_n)
            own_column = int32(start + 2 * quad_lane)
            low, high = float32(0.0), float32(0.0)
            if scaled:
                # Behind the last row any number will do: with a branch the load would be waited for here.
                low = copy.load_float(absmax + uint64(4) * uint64(min(row, int32(M - 1))))
                high = copy.load_float(absmax + uint64(4) * uint64(min(int32(row + 8), int32(M - 1))))
            for i in range(count):
                left[i] = 0
                right[i] = 0
            before = int32(-1)
            for _ in range(steps - last):
                barrier.wait(base + at.full + 8 * stage, parity)
                here = base + stage * at.stage_bytes
                own[0], own[1] = descriptor(here + a_own), descriptor(here + a_bytes)
                multiply(left, right, own)
                wgmma.wait_for_older()
                hand_back(base, lane, before)
                before = stage
                stage, parity = next_stage(stage, parity)
            if not halved:
                both_done(left, right)
                hand_back(base, lane, before)
            if beside and marks != uint64(0):
                if tile == first:
                    barrier.wait(base + at.ready, 0)
                    number = copy.load_shared_word(uint32(base + at.number))
                    near = int32(min(number, side_by_side))
                if removed:
                    todo = near
                    while todo > 0:
                        barrier.wait(base + at.full + 8 * stage, parity)
                        here = base + stage * at.stage_bytes
                        own[0], own[1] = short_descriptor(here + a_short), short_descriptor(here + a_bytes)
                        remove(left, right, own)
                        if halved:
                            wgmma.wait_for_older()
                            hand_back(base, lane, before)
                            before = stage
                        else:
                            both_done(left, right)
                            hand_back(base, lane, stage)
                        stage, parity = next_stage(stage, parity)
                        todo = int32(todo - TAKEN_CHUNK)
            ended = stage
            if halved:
                for i in range(last):
                    barrier.wait(base + at.full + 8 * stage, parity)
                    here = base + stage * at.stage_bytes
                    ends[2 * i], ends[2 * i + 1] = descriptor(here + a_own), descriptor(here + a_bytes)
                    stage, parity = next_stage(stage, parity)
                multiply_apart(left, right, ends)
                left_done(left)
                hand_back(base, lane, before)
            if removed:
                remove_surplus(left, taken, indices, number, side_by_side, row, own_column, M, N)
            if scaled:
                barrier.wait(base + at.columns_full, columns_parity)
                scale(left, base + at.columns + 16 * quad_lane, low, high)
                if not beside:
                    store(left, out, row, start, quad_lane, M, N)
            else:
                store_codes(left, out, row, own_column, M, N)
            if halved:
                all_done(right)
                for _ in range(last):
                    hand_back(base, lane, ended)
                    ended, _ = next_stage(ended, parity)
                if removed:
                    remove_surplus(right, taken, indices, number, side_by_side, row, own_column + width, M, N)
            if beside and halved and near > 0:
                barrier.wait(base + at.full + 8 * stage, parity)
                here = base + stage * at.stage_bytes
                begin_outliers(left, short_descriptor(here + a_short), short_descriptor(here + a_bytes))
            if scaled:
                if halved:
                    scale(right, base + at.columns + 8 * width + 16 * quad_lane, low, high)
                columns_parity = int32(columns_parity ^ 1)
                barrier.arrive_warp(base + at.columns_empty, lane)
            if beside:
                if halved:
                    all_done(left)
                todo = near
                while todo > 0:
                    here = base + stage * at.stage_bytes
                    a, b = short_descriptor(here + a_short), here + a_bytes
                    if not halved or todo < near:
                        barrier.wait(base + at.full + 8 * stage, parity)
                        multiply_outliers(left, a, short_descriptor(b))
                    if halved:
                        multiply_outliers(right, a, short_descriptor(b + short_right))
                    hand_back(base, lane, stage)
                    stage, parity = next_stage(stage, parity)
                    todo = int32(todo - CHUNK)
                add_surplus(left, surplus, indices, number, side_by_side, row, own_column, M, N)
                store(left, out, row, start, quad_lane, M, N)
                if halved:
                    add_surplus(right, surplus, indices, number, side_by_side, row, own_column + width, M, N)
            if halved:
                if scaled:
                    store(right, out, row, start + width, quad_lane, M, N)
                else:
                    store_codes(right, out, row, own_column + width, M, N)
            tile = int32(tile + blocks)

    return consume
