"""How the sums of warps, and then the parts of a cache, become outputs.

Sums are ``exp2(score - m)`` and their products with V; what is merged has a maximum m of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.decode_variant_ampere import DecodeVariant
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_merge_of_parts", "build_merge_of_warps", "build_write"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

MINUS_INFINITY = -math.inf
AT_ONCE, WORDS = 16, 64  # parts whose outputs a thread asks for before it uses the first


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
        for i in range(4):
            four[i] /= total
        return top + registers.log2(total)

    return leave, merged


def build_merge_of_parts(variant: DecodeVariant) -> Callable[..., Any]:
    """Return ``merged(four, base, outputs, parts, row, column)``, which merges four columns of a row of all.

    The log-sum-exps of the parts lie at `base` in shared memory, [part, row], their outputs [part, row, Dv]
    at `outputs` in global memory: those of parts without keys are 0.
    """
    ROWS, DV = variant.rows, variant.Dv

    @device_function
    def merged(four: Any, base: Any, outputs: Any, parts: Any, row: Any, column: Any) -> Any:
        given = cuda.local.array(WORDS, uint32)
        top = float32(MINUS_INFINITY)
        for part in range(parts):
            top = registers.maximum(top, copy.load_shared_float(base + uint32(4 * (ROWS * part + row))))
        if top == float32(MINUS_INFINITY):
            top = float32(0.0)
        total = float32(0.0)
        for i in range(4):
            four[i] = float32(0.0)
        for first in range(0, parts, AT_ONCE):
            for i in range(AT_ONCE):
                part = int32(min(first + i, parts - 1))
                at = uint64(4) * uint64((ROWS * part + row) * DV + column)
                copy.load_16(given, int32(4 * i), outputs + at)
            for i in range(AT_ONCE):
                part = int32(min(first + i, parts - 1))
                lse = copy.load_shared_float(base + uint32(4 * (ROWS * part + row)))
                new = int32(first + i < parts)  # the last part is asked for again in the place of none
                weight = registers.select_float(new, registers.exp2(lse - top), float32(0.0))
                total += weight
                for e in range(4):
                    four[e] += weight * uint32(given[4 * i + e]).view(np.float32)
        if total == float32(0.0):
            return float32(MINUS_INFINITY)
        for i in range(4):
            four[i] /= total
        return top + registers.log2(total)

    return merged


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
