"""How the sums of warps, and then the parts of a cache, become outputs.

Sums are ``exp2(score - m)`` and their products with V; what is merged has a maximum m of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.decode_variant_ampere import MOST_PARTS, DecodeVariant
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["AT_ONCE", "build_merge_of_parts", "build_merge_of_warps", "build_write"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

MINUS_INFINITY = -math.inf
AT_ONCE = 32  # parts whose outputs a thread asks for before it uses the first
PARTS_OF_LANE = MOST_PARTS // 32


def build_merge_of_warps(variant: DecodeVariant) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return ``leave(base, warp, lane, outputs, largest, totals)`` and ``merged(four, base, row, column)``.

    A warp leaves its sums in shared memory.  Behind a barrier any thread merges four columns of a row: it
    gets them in ``four``, and the log-sum-exp to base 2.
    """
    ROWS, WARPS, DV, COLUMNS = variant.rows, variant.warps, variant.Dv, variant.rows // 8
    SUMS_AT, PITCH, TOTALS_AT = variant.sums_at, variant.sums_pitch, 4 * variant.rows * variant.warps

    @device_function
    def leave(base: Any, warp: Any, lane: Any, outputs: Any, largest: Any, totals: Any) -> None:
        column = int32(lane >> 2)
        for r in range(2 * COLUMNS):
            total = totals[r]
            for i in range(3):
                total += registers.exchange_float(total, int32(4 << i))
            row = int32(8 * (r >> 1) + 2 * (lane & 3) + (r & 1))
            if column == 0:
                at = base + uint32(4 * (ROWS * warp + row))
                copy.store_shared_float(at, largest[r])
                copy.store_shared_float(at + uint32(TOTALS_AT), total)
            of_row = base + uint32(SUMS_AT + 4 * ((ROWS * warp + row) * PITCH + column))
            for s in range(DV // 16):
                for half in range(2):
                    number = outputs[4 * (COLUMNS * s + (r >> 1)) + 2 * half + (r & 1)]
                    copy.store_shared_float(of_row + uint32(4 * (16 * s + 8 * half)), number)

    @device_function
    def merged(four: Any, base: Any, row: Any, column: Any) -> Any:
        given = cuda.local.array(4, float32)
        top = float32(MINUS_INFINITY)
        for w in range(WARPS):
            top = registers.maximum(top, copy.load_shared_float(base + uint32(4 * (ROWS * w + row))))
        if top == float32(MINUS_INFINITY):
            top = float32(0.0)
        total = float32(0.0)
        for i in range(4):
            four[i] = float32(0.0)
        for w in range(WARPS):
            at = base + uint32(4 * (ROWS * w + row))
            weight = registers.exp2(copy.load_shared_float(at) - top)
            total += weight * copy.load_shared_float(at + uint32(TOTALS_AT))
            copy.load_shared_16(
                given, int32(0), base + uint32(SUMS_AT + 4 * ((ROWS * w + row) * PITCH + column))
            )
            for i in range(4):
                four[i] += weight * given[i]
        if total == float32(0.0):
            return float32(MINUS_INFINITY)
        inverse = float32(1.0) / total
        for i in range(4):
            four[i] *= inverse
        return top + registers.log2(total)

    return leave, merged


def build_merge_of_parts(
    variant: DecodeVariant,
) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Return ``weigh``, ``ask`` and ``add``, with which a block merges the parts of its tile.

    ``weigh(base, warp, lane, lses, parts, rows)`` turns the log-sum-exps [part, row] at `lses` in global
    memory into weights [part, row] at `base` in shared memory, a row a warp, and leaves those of the whole
    behind them.  ``ask(given, outputs, parts, row, column, first)`` loads four columns of the outputs
    [part, row, Dv] of `AT_ONCE` parts, and ``add(four, given, base, parts, row, first)`` adds them.
    """
    ROWS, DV, WARPS, LSE_AT = variant.rows, variant.Dv, variant.warps, variant.lse_at

    @device_function
    def weigh(base: Any, warp: Any, lane: Any, lses: Any, parts: Any, rows: Any) -> None:
        weights = cuda.local.array(PARTS_OF_LANE, float32)
        for row in range(warp, rows, WARPS):
            top, total = float32(MINUS_INFINITY), float32(0.0)
            for i in range(PARTS_OF_LANE):  # the last part is asked for again in the place of none
                part = int32(lane + 32 * i)
                at = uint64(4) * uint64(ROWS * min(part, parts - 1) + row)
                lse = uint32(copy.load_word_fresh(lses + at)).view(np.float32)
                weights[i] = registers.select_float(int32(part < parts), lse, float32(MINUS_INFINITY))
            for i in range(PARTS_OF_LANE):
                top = registers.maximum(top, weights[i])
            for i in range(5):
                top = registers.maximum(top, registers.exchange_float(top, int32(1 << i)))
            lowest = registers.select_float(int32(top == float32(MINUS_INFINITY)), float32(0.0), top)
            for i in range(PARTS_OF_LANE):
                weights[i] = registers.exp2(weights[i] - lowest)
                total += weights[i]
            for i in range(5):
                total += registers.exchange_float(total, int32(1 << i))
            some = int32(total > float32(0.0))
            divisor = registers.select_float(some, total, float32(1.0))
            inverse = float32(1.0) / divisor
            for i in range(PARTS_OF_LANE):
                part = int32(lane + 32 * i)
                if part < parts:
                    copy.store_shared_float(base + uint32(4 * (ROWS * part + row)), weights[i] * inverse)
            if lane == 0:
                lse2 = lowest + registers.log2(divisor)
                lse2 = registers.select_float(some, lse2, float32(MINUS_INFINITY))
                copy.store_shared_float(base + uint32(LSE_AT + 4 * row), lse2)

    @device_function
    def ask(given: Any, outputs: Any, parts: Any, row: Any, column: Any, first: Any) -> None:
        at = outputs + uint64(4) * uint64((ROWS * first + row) * DV + column)
        for i in range(AT_ONCE):  # the last part is asked for again in the place of none
            copy.load_16(given, int32(4 * i), at)
            at += uint64(registers.select_int(int32(first + i + 1 < parts), int32(4 * ROWS * DV), int32(0)))

    @device_function
    def add(four: Any, given: Any, base: Any, parts: Any, row: Any, first: Any) -> None:
        for i in range(AT_ONCE):
            weight = copy.load_shared_float(base + uint32(4 * (ROWS * (first + i) + row)))
            weight = registers.select_float(int32(first + i < parts), weight, float32(0.0))
            for e in range(4):
                four[e] += weight * uint32(given[4 * i + e]).view(np.float32)

    return weigh, ask, add


def build_write(variant: DecodeVariant) -> Callable[..., None]:
    """Return ``write(four, lse2, out, lse, b, i, head, queries, heads, column)``: the end of every number."""
    DV, LN_2 = variant.Dv, math.log(2)
    pack = registers.pack_pair(variant.kind)

    @device_function
    def write(
        four: Any,
        lse2: Any,
        out: Any,
        lse: Any,
        b: Any,
        i: Any,
        head: Any,
        queries: Any,
        heads: Any,
        column: Any,
    ) -> None:
        line = (uint64(b) * uint64(queries) + uint64(i)) * uint64(heads) + uint64(head)
        at = out + uint64(2) * (line * uint64(DV) + uint64(column))
        copy.store_global_8(at, pack(four[0], four[1]), pack(four[2], four[3]))
        if column == 0 and lse != uint64(0):
            line = (uint64(b) * uint64(heads) + uint64(head)) * uint64(queries) + uint64(i)
            copy.store_global_float(lse + uint64(4) * line, lse2 * float32(LN_2))

    return write
