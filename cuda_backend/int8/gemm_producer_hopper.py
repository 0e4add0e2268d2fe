"""The producer of a Hopper product of codes: one thread that asks the copy engine for stages, in turn.

The stages of a tile, in the order in which `gemm_consumer_hopper` reads them: codes along K, but for the
last ones of a tile in halves; codes of outliers, which are taken away again; the last codes; outliers.  A
product without outliers has codes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import device_function
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.int8.gemm_layout_hopper import GROUP, layout_of, placing
from cuda_backend.int8.variant_hopper import CHUNK, STEP, TAKEN_CHUNK, Wide
from cuda_backend.ptx import barrier, copy, matrix_copy, registers, turns
from cuda_backend.ptx.assembly import types

__all__ = ["build_producer"]

int32, uint32, uint64 = types.int32, types.uint32, types.uint64


def build_producer(variant: Wide) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return ``begin``, which waits for nothing but asks for the weight only, and ``produce``."""
    block_m, block_n, stages = variant.block_m, variant.block_n, variant.stages
    a_bytes, at = variant.a_bytes, layout_of(variant)
    beside, at_last = variant.beside, variant.last
    removed = beside and variant.outliers == "released"
    next_stage, place = ring(stages), placing(GROUP)

    @device_function
    def load_a(base: Any, stage: Any, a_map: Any, column: Any, row: Any) -> None:
        matrix_copy.load(base + stage * at.stage_bytes, a_map, base + at.full + 8 * stage, column, row)

    @device_function
    def load_b(base: Any, stage: Any, b_map: Any, column: Any, row: Any, width: Any) -> None:
        """Bring B's part of a stage, and announce `width` bytes of each row of A and B."""
        full = base + at.full + 8 * stage
        barrier.expect_bytes(full, width * (block_m + block_n))
        matrix_copy.load(base + stage * at.stage_bytes + a_bytes, b_map, full, column, row)

    @device_function
    def begin(base: Any, a_map: Any, b_map: Any, first: Any, problem: Any) -> None:
        """Bring B's part of the first stages; ask L2 for A's, which may be written to later."""
        _, rows, columns, steps, _, _, _ = problem
        matrix_copy.acquire(a_map)
        matrix_copy.acquire(b_map)
        row, column = place(first, rows, columns)
        for stage in range(min(int32(steps - at_last), stages)):
            load_b(base, int32(stage), b_map, int32(stage * STEP), int32(column * block_n), STEP)
        for stage in range(min(steps, stages)):
            matrix_copy.prefetch(a_map, int32(stage * STEP), int32(row * block_m))

    @device_function
    def bring_chunks(
        base: Any, stage: Any, parity: Any, maps: Any, start: Any, width: Any, number: Any, rows: Any
    ) -> Any:
        """Bring so many chunks of what is set aside, `width` columns each, and return the next stage."""
        x_map, w_map = maps
        a_row, b_row = rows
        for chunk in range(number):
            barrier.wait(base + at.empty + 8 * stage, parity)
            column = int32(start + chunk * width)
            load_b(base, stage, w_map, column, b_row, width)
            load_a(base, stage, x_map, column, a_row)
            stage, parity = next_stage(stage, parity)
        return stage, parity

    @device_function
    def bring_codes(
        base: Any, stage: Any, parity: Any, maps: Any, step: Any, end: Any, begun: Any, rows: Any
    ) -> Any:
        """Bring codes of steps `step` to `end`; B's of the first `begun` are under way."""
        a_map, b_map = maps
        a_row, b_row = rows
        while step < end:
            barrier.wait(base + at.empty + 8 * stage, parity)
            if step >= begun:
                load_b(base, stage, b_map, int32(step * STEP), b_row, STEP)
            load_a(base, stage, a_map, int32(step * STEP), a_row)
            stage, parity = next_stage(stage, parity)
            step = int32(step + 1)
        return stage, parity

    @device_function
    def produce(base: Any, maps: Any, marks: Any, first: Any, blocks: Any, problem: Any) -> None:
        a_map, b_map, x_map, w_map = maps
        tiles, rows, columns, steps, _, _, side_by_side = problem
        last = int32(steps - at_last)
        begun = int32(min(last, stages))
        taken, chunks = int32(0), int32(0)
        stage, parity = int32(0), int32(1)
        tile = first
        while tile < tiles:
            row, column = place(tile, rows, columns)
            where = int32(row * block_m), int32(column * block_n)
            codes, aside = (a_map, b_map), (x_map, w_map)
            stage, parity = bring_codes(base, stage, parity, codes, int32(0), last, begun, where)
            begun = int32(0)
            if beside and marks != uint64(0):
                if tile == first:
                    matrix_copy.acquire(x_map)
                    matrix_copy.acquire(w_map)
                    barrier.wait(base + at.ready, 0)
                    turns.to_the_copy_engine()
                    number = copy.load_shared_word(uint32(base + at.number))
                    near = int32(min(number, side_by_side))
                    chunks = registers.quotient(int32(near + (CHUNK - 1)), CHUNK)
                    if removed:
                        taken = registers.quotient(int32(near + (TAKEN_CHUNK - 1)), TAKEN_CHUNK)
                stage, parity = bring_chunks(
                    base, stage, parity, aside, int32(2 * side_by_side), TAKEN_CHUNK, taken, where
                )
            if at_last > 0:
                stage, parity = bring_codes(base, stage, parity, codes, last, steps, last, where)
            stage, parity = bring_chunks(base, stage, parity, aside, int32(0), 2 * CHUNK, chunks, where)
            tile = int32(tile + blocks)

    return begin, produce
