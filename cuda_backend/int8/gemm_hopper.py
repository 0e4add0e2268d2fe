"""Products of int8 codes for Hopper: one TMA producer, two wgmma consumers, persistent blocks.

A block works on one tile of 128 rows after the other.  While consumers end a tile, the producer fills all
stages for the next one, and another warp brings the scales of its columns.  The weight's part of the first
stages is under way before the grid ahead, which makes the codes of A, has ended.

What follows the product happens in registers, in the reference's order::

    y = ((int32 * c_x) * c_w) / 127² + bias       each rounded to float32
    y += X[:, outliers] W[outliers]               tensor cores in float32, onto the same registers

While the first tiles are multiplied, two warps of each block list the outliers and put those of X and of the
weight side by side, padded with zeros to whole steps of 16 (`aside_hopper`); they arrive as further stages,
and so do their codes, whose product is taken from the sums.  How many there are only the device knows.
A product without that can take what an earlier kernel has set aside.  No layer asks for it any more, but the
kernel is the one that was measured: without these branches ptxas spills 420 bytes of the plain product.

Sources: PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Instructions", "Tensor copy"; Dettmers et al. 2022,
arXiv:2208.07339, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.int8.aside_hopper import build_set_aside
from cuda_backend.int8.epilogue_hopper import (
    build_columns,
    build_epilogue,
    build_removal,
    build_surplus,
    kind_of,
)
from cuda_backend.int8.outliers_hopper import clear_marks
from cuda_backend.int8.variant_hopper import CHUNK, STEP, TAKEN_CHUNK, Wide
from cuda_backend.ptx import barrier, copy, grid, matrix_copy, registers, turns, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["SIGNATURE", "build"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    *[uint64] * 4,  # descriptors of A, B and of their outliers
    *[uint64] * 4,  # out; absmax of the rows of A and of B; bias, or 0
    *[uint64] * 3,  # number of outliers, or 0 if there are none; their indices; the marks to be cleared
    *[uint64] * 6,  # x, its strides by row and feature; what outliers meet, by feature and column: bytes
    *[uint64] * 5,  # codes of x, bytes from a row to the next; what is set aside, of x and w; counters
    *[int32] * 8,  # tiles, rows of tiles, columns of tiles, steps along K, M, N, outliers side by side, K
)
GROUP = 8  # rows of tiles that are worked on together: with 16 columns they share what L2 holds
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
STEPS_OF_A_STAGE = [0, 2, 4, 6]  # 32 bytes each, in units of 16


def placing(group: int) -> Callable[..., Any]:
    """Return the function from a tile to its row and column: down `group` rows, then to the next column."""

    @device_function
    def place(tile: Any, rows: Any, columns: Any) -> Any:
        index = registers.quotient(tile, group * columns)
        rank = int32(tile - index * group * columns)
        members = int32(min(group, rows - index * group))
        column = registers.quotient(rank, members)
        return int32(index * group + rank - column * members), int32(column)

    return place


def build(variant: Wide) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, declared as launch bound with one block, ``variant.shared_bytes`` of
    dynamic shared memory, and at most as many blocks as run at once.
    """
    block_m, block_n, stages = variant.block_m, variant.block_n, variant.stages
    a_bytes, stage_bytes = variant.a_bytes, variant.a_bytes + variant.b_bytes
    count, consumer_warps, scaled = block_n // 2, 8, variant.kind != "int32"

    # Shared memory: stages of A and B; scale and bias of each column; barriers of eight bytes.
    columns_at = stages * stage_bytes
    full_at = columns_at + 8 * block_n
    empty_at = full_at + 8 * stages
    columns_full = empty_at + 8 * stages
    columns_empty = columns_full + 8
    ready_at = columns_empty + 8
    number_at = ready_at + 8
    listed_at = number_at + 8

    beside = variant.beside
    removed = beside and variant.outliers == "released"

    next_stage, place = ring(stages), placing(GROUP)
    give_registers = registers.give_registers(PRODUCER_REGISTERS)
    take_registers = registers.take_registers(CONSUMER_REGISTERS)
    descriptor, short_descriptor = wgmma.descriptor_k_major, wgmma.descriptor_k_major_32
    multiply = wgmma.product_codes(block_n, STEPS_OF_A_STAGE)
    multiply_outliers = wgmma.product_step(block_n, kind_of(variant.kind))
    all_done = wgmma.wait(0, count)
    scale, store, store_codes = build_epilogue(variant)
    write_columns = build_columns(variant)
    add_surplus = build_surplus(variant)
    remove_surplus = build_removal(variant)
    remove = wgmma.product_codes(block_n, [0])
    set_aside = build_set_aside(variant.kind, variant.outliers)

    @device_function
    def load_a(base: Any, stage: Any, a_map: Any, column: Any, row: Any) -> None:
        matrix_copy.load(base + stage * stage_bytes, a_map, base + full_at + 8 * stage, column, row)

    @device_function
    def load_b(base: Any, stage: Any, b_map: Any, column: Any, row: Any, width: Any) -> None:
        """Bring B's part of a stage, and announce `width` bytes of each row of A and B."""
        full = base + full_at + 8 * stage
        barrier.expect_bytes(full, width * (block_m + block_n))
        matrix_copy.load(base + stage * stage_bytes + a_bytes, b_map, full, column, row)

    @device_function
    def begin(base: Any, a_map: Any, b_map: Any, first: Any, problem: Any) -> None:
        """Bring B's part of the first stages, which waits for nothing."""
        _, rows, columns, steps, _, _, _ = problem
        matrix_copy.acquire(a_map)
        matrix_copy.acquire(b_map)
        _, column = place(first, rows, columns)
        for stage in range(min(steps, stages)):
            load_b(base, int32(stage), b_map, int32(stage * STEP), int32(column * block_n), STEP)

    @device_function
    def produce(base: Any, maps: Any, marks: Any, first: Any, blocks: Any, number: Any, problem: Any) -> None:
        a_map, b_map, x_map, w_map = maps
        tiles, rows, columns, steps, _, _, side_by_side = problem
        begun = int32(stages)
        chunks = int32(0)
        if beside and marks != uint64(0):
            matrix_copy.acquire(x_map)
            matrix_copy.acquire(w_map)
        elif scaled and number > 0:
            matrix_copy.acquire(x_map)
            matrix_copy.acquire(w_map)
            chunks = registers.quotient(int32(min(number, side_by_side) + (CHUNK - 1)), CHUNK)
        stage, parity = int32(0), int32(1)
        tile = first
        while tile < tiles:
            row, column = place(tile, rows, columns)
            a_row, b_row = int32(row * block_m), int32(column * block_n)
            for step in range(steps):
                barrier.wait(base + empty_at + 8 * stage, parity)
                if step >= begun:
                    load_b(base, stage, b_map, int32(step * STEP), b_row, STEP)
                load_a(base, stage, a_map, int32(step * STEP), a_row)
                stage, parity = next_stage(stage, parity)
            begun = int32(0)
            if beside and marks != uint64(0):
                if tile == first:
                    barrier.wait(base + ready_at, 0)
                    turns.to_the_copy_engine()
                number = copy.load_shared_word(uint32(base + number_at))
                near = int32(min(number, side_by_side))
                chunks = registers.quotient(int32(near + (CHUNK - 1)), CHUNK)
                taken = int32(0)
                if removed:
                    taken = registers.quotient(int32(near + (TAKEN_CHUNK - 1)), TAKEN_CHUNK)
                for chunk in range(taken):
                    barrier.wait(base + empty_at + 8 * stage, parity)
                    column = int32(2 * side_by_side + chunk * TAKEN_CHUNK)
                    load_b(base, stage, w_map, column, b_row, TAKEN_CHUNK)
                    load_a(base, stage, x_map, column, a_row)
                    stage, parity = next_stage(stage, parity)
            for chunk in range(chunks):
                barrier.wait(base + empty_at + 8 * stage, parity)
                load_b(base, stage, w_map, int32(chunk * 2 * CHUNK), b_row, 2 * CHUNK)
                load_a(base, stage, x_map, int32(chunk * 2 * CHUNK), a_row)
                stage, parity = next_stage(stage, parity)
            tile = int32(tile + blocks)

    @device_function
    def describe(base: Any, lane: Any, absmax: Any, bias: Any, first: Any, blocks: Any, problem: Any) -> None:
        """Write scale and bias of the columns of each tile, for the consumers."""
        tiles, rows, columns, _, _, N, _ = problem
        parity = int32(1)
        tile = first
        while tile < tiles:
            _, column = place(tile, rows, columns)
            barrier.wait(base + columns_empty, parity)
            write_columns(base + columns_at, lane, absmax, bias, int32(column * block_n), N)
            barrier.arrive(base + columns_full)
            parity = int32(parity ^ 1)
            tile = int32(tile + blocks)

    @device_function
    def consume(
        base: Any, thread: Any, out: Any, absmax: Any, indices: Any, marks: Any, surplus: Any, taken: Any,
        first: Any, blocks: Any, number: Any, problem: Any,
    ) -> None:  # fmt: skip
        tiles, rows, columns, steps, M, N, side_by_side = problem
        total = cuda.local.array(count, int32)
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        group = registers.uniform(int32(thread >> 7) - 1)
        own_row = int32(64 * group + 16 * ((thread >> 5) & 3) + (lane >> 2))
        a_own, a_short = uint32(group * (64 * STEP)), uint32(group * (64 * 2 * CHUNK))
        stage, parity, columns_parity = int32(0), int32(0), int32(0)
        tile = first
        while tile < tiles:
            row, column = place(tile, rows, columns)
            row = int32(row * block_m + own_row)
            for i in range(count):
                total[i] = 0
            before = stage
            for step in range(steps):
                barrier.wait(base + full_at + 8 * stage, parity)
                at = base + stage * stage_bytes
                wgmma.fence()
                multiply(total, descriptor(at + a_own), descriptor(at + a_bytes))
                wgmma.commit()
                if step > 0:
                    wgmma.wait_for_older()
                    if lane == 0:
                        barrier.arrive(base + empty_at + 8 * before)
                before = stage
                stage, parity = next_stage(stage, parity)
            all_done(total)
            if steps > 0 and lane == 0:
                barrier.arrive(base + empty_at + 8 * before)
            if beside and marks != uint64(0):
                barrier.wait(base + ready_at, 0)
                number = copy.load_shared_word(uint32(base + number_at))
                if removed:
                    left = int32(min(number, side_by_side))
                    while left > 0:
                        barrier.wait(base + full_at + 8 * stage, parity)
                        at = base + stage * stage_bytes
                        wgmma.fence()
                        remove(total, short_descriptor(at + a_short), short_descriptor(at + a_bytes))
                        wgmma.commit()
                        all_done(total)
                        if lane == 0:
                            barrier.arrive(base + empty_at + 8 * stage)
                        stage, parity = next_stage(stage, parity)
                        left = int32(left - TAKEN_CHUNK)
                    start = int32(column * block_n + 2 * quad_lane)
                    remove_surplus(total, taken, indices, number, side_by_side, row, start, M, N)
            if scaled:
                low, high = float32(0.0), float32(0.0)
                if row < M:
                    low = copy.load_float(absmax + uint64(4) * uint64(row))
                if row + 8 < M:
                    high = copy.load_float(absmax + uint64(4) * uint64(row + 8))
                barrier.wait(base + columns_full, columns_parity)
                columns_parity = int32(columns_parity ^ 1)
                scale(total, base + columns_at + 16 * quad_lane, low, high)
                if lane == 0:
                    barrier.arrive(base + columns_empty)
                left = int32(min(number, side_by_side))
                while left > 0:
                    barrier.wait(base + full_at + 8 * stage, parity)
                    at = base + stage * stage_bytes
                    a, b = short_descriptor(at + a_short), short_descriptor(at + a_bytes)
                    multiply_outliers(total, a, b)
                    if lane == 0:
                        barrier.arrive(base + empty_at + 8 * stage)
                    stage, parity = next_stage(stage, parity)
                    left = int32(left - CHUNK)
                start = int32(column * block_n + 2 * quad_lane)
                add_surplus(total, surplus, indices, number, side_by_side, row, start, M, N)
                store(total, out, row, int32(column * block_n), quad_lane, M, N)
            else:
                store_codes(total, out, row, int32(column * block_n + 2 * quad_lane), M, N)
            tile = int32(tile + blocks)

    def product(
        a_map: Any, b_map: Any, x_map: Any, w_map: Any, out: Any, a_absmax: Any, b_absmax: Any, bias: Any,
        listed_number: Any, indices: Any, marks: Any,
        x: Any, x_row: Any, x_feature: Any, w: Any, w_feature: Any, w_column: Any,
        codes: Any, codes_row: Any, x_aside: Any, w_aside: Any, counters: Any,
        tiles: Any, rows: Any, columns: Any, steps: Any, M: Any, N: Any, side_by_side: Any, K: Any,
    ) -> None:  # fmt: skip
        problem = (tiles, rows, columns, steps, M, N, side_by_side)
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((copy.shared_address(shared) + uint32(1023)) & uint32(0xFFFFFC00))
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            for i in range(stages):
                barrier.initialise(base + full_at + 8 * i, 1)
                barrier.initialise(base + empty_at + 8 * i, consumer_warps)
            barrier.initialise(base + columns_full, 32)
            barrier.initialise(base + columns_empty, consumer_warps)
            barrier.initialise(base + ready_at, 1)
            barrier.publish_initialisation()
        cuda.syncthreads()
        first, blocks = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        if thread == 0:
            begin(base, a_map, b_map, first, problem)
        grid.wait_for_earlier_grids()
        number = int32(0)
        if not beside and listed_number != uint64(0):
            number = copy.load_word(listed_number)
        role = registers.uniform(int32(thread >> 5))
        if role < 4:
            give_registers()
            if thread == 0:
                produce(base, (a_map, b_map, x_map, w_map), marks, first, blocks, number, problem)
            elif scaled and role == 1:
                describe(base, int32(thread & 31), b_absmax, bias, first, blocks, problem)
            elif beside and role >= 2 and marks != uint64(0):
                given = (x, x_row, x_feature, codes, codes_row, w, w_feature, w_column, b_absmax)
                set_aside(
                    int32(thread - 64), marks, counters, indices, base + listed_at, base + number_at,
                    base + ready_at, given, (x_aside, w_aside), (M, N, side_by_side), K, blocks,
                )  # fmt: skip
            elif not beside and number > 0 and role == 2:
                clear_marks(marks, K, int32(32 * first + (thread & 31)), int32(32 * blocks))
        else:
            take_registers()
            surplus = (x, x_row, x_feature, w, w_feature, w_column, b_absmax)
            taken = (codes, codes_row, w, w_feature, w_column)
            consume(
                base, thread, out, a_absmax, indices, marks, surplus, taken, first, blocks, number, problem
            )

    return product
