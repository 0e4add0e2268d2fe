"""What a consumer thread does to its registers: mask and softmax of S, P, rescaling and storing of O.

Accumulator 4 i + e of a thread is column 8 i + 2 (lane % 4) + e % 2 of its first row (e < 2) or of the row
eight below (e >= 2); see `cuda_backend.ptx.wgmma`.  Four neighbouring lanes share a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import device_function
from cuda_backend.attention.dropout_hopper import build_row_words
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_drop", "build_output", "build_softmax", "build_tile"]

int32, float32, uint64 = types.int32, types.float32, types.uint64

NO_KEY = float("-inf")


def build_softmax(variant: Variant) -> tuple[Callable[..., Any], ...]:
    """Return ``mask``, ``softmax_row`` and ``pack_scores`` for the scores of `variant`, device functions.

    ``mask(s, limit_low, limit_high)`` makes scores -inf from a thread's own column ``limit`` on, in its two
    rows. ``softmax_row(s, first, scale, old_max, old_sum)`` turns one row (``first`` 0 or 2) into
    ``exp2((s - max) * scale)`` in place and returns the new maximum, the new sum of this thread's columns,
    and the factor for what was summed before.  ``pack_scores(p, s)`` rounds to P.
    """
    count = variant.block_n // 2
    pack = registers.pack_pair(variant.kind)

    @device_function
    def mask(s: Any, limit_low: Any, limit_high: Any) -> None:
        for i in range(count // 4):
            for e in range(2):
                if 8 * i + e >= limit_low:
                    s[4 * i + e] = float32(NO_KEY)
                if 8 * i + e >= limit_high:
                    s[4 * i + 2 + e] = float32(NO_KEY)

    @device_function
    def softmax_row(s: Any, first: Any, scale: Any, old_max: Any, old_sum: Any) -> Any:
        new_max = old_max
        for i in range(count // 4):
            new_max = registers.maximum(new_max, s[4 * i + first])
            new_max = registers.maximum(new_max, s[4 * i + first + 1])
        new_max = registers.maximum(new_max, registers.exchange_float(new_max, 1))
        new_max = registers.maximum(new_max, registers.exchange_float(new_max, 2))
        # A row without a key so far: exp2(-inf - 0) = 0, where exp2(-inf + inf) would be NaN.
        shift = new_max * scale if new_max != float32(NO_KEY) else float32(0.0)
        factor = registers.exp2(registers.fused_multiply_add(old_max, scale, -shift))
        total = float32(0.0)
        for i in range(count // 4):
            for e in range(2):
                p = registers.exp2(registers.fused_multiply_add(s[4 * i + first + e], scale, -shift))
                s[4 * i + first + e] = p
                total += p
        return new_max, old_sum * factor + total, factor

    @device_function
    def pack_scores(p: Any, s: Any) -> None:
        for i in range(count // 2):
            p[i] = pack(s[2 * i], s[2 * i + 1])

    return mask, softmax_row, pack_scores


def build_tile(variant: Variant) -> tuple[Callable[..., Any], ...]:
    """Return ``tile_of``, ``limits_of`` and ``mask_tile``, device functions.

    ``tile_of(base, q_stage, lane)`` is the number of the tile of query rows that a stage holds.
    ``limits_of(row, group_row, tk, offset)`` gives the first column that either of a thread's rows, `row` and
    the one eight below, may not see, or any row of its warpgroup, of which `group_row` is the first;
    ``mask_tile(s, j, quad_lane, limits)`` masks the scores of key tile `j` from there on.
    """
    block_n, causal, tile_slot = variant.block_n, variant.causal, variant.places.tile_slot
    mask, _, _ = build_softmax(variant)

    @device_function
    def tile_of(base: Any, q_stage: Any, lane: Any) -> Any:
        # Lane 0 alone reads it, since lane 0 alone says that the stage may be written again.
        tile = int32(0)
        if lane == 0:
            tile = copy.load_shared_word(base + tile_slot + 4 * q_stage)
        return registers.uniform(tile)

    @device_function
    def limits_of(row: Any, group_row: Any, tk: Any, offset: Any) -> Any:
        if causal:
            low, high = min(tk, row + offset + 1), min(tk, row + offset + 9)
            return low, high, min(tk, group_row + offset + 1)
        return tk, tk, tk

    @device_function
    def mask_tile(s: Any, j: Any, quad_lane: Any, limits: Any) -> None:
        limit_low, limit_high, limit_group = limits
        start = j * block_n
        if start + block_n > limit_group:
            shift = start + 2 * quad_lane
            mask(s, limit_low - shift, limit_high - shift)

    return tile_of, limits_of, mask_tile


def build_drop(variant: Variant) -> Callable[..., None]:
    """Return ``drop(s, seed, threshold, batch, head, row, start, quad_lane)``, a device function.

    It makes the weights 0 that dropout drops: `row` is the thread's first one, `start` the first column.
    """
    count, draw = variant.block_n // 2, build_row_words()

    @device_function
    def drop(
        s: Any, seed: Any, threshold: Any, batch: Any, head: Any, row: Any, start: Any, quad_lane: Any
    ) -> None:
        for i in range(count // 4):
            w0, w1, w2, w3 = draw(seed, batch, head, row, int32(start + 8 * i), quad_lane)
            s[4 * i] = registers.select_float(int32(uint64(w0) >= threshold), s[4 * i], float32(0.0))
            s[4 * i + 1] = registers.select_float(int32(uint64(w1) >= threshold), s[4 * i + 1], float32(0.0))
            s[4 * i + 2] = registers.select_float(int32(uint64(w2) >= threshold), s[4 * i + 2], float32(0.0))
            s[4 * i + 3] = registers.select_float(int32(uint64(w3) >= threshold), s[4 * i + 3], float32(0.0))

    return drop


def build_output(variant: Variant) -> tuple[Callable[..., Any], ...]:
    """Return ``rescale``, ``row_total`` and ``store_row`` for the output of `variant`, device functions.

    ``rescale(o, low, high)`` multiplies the two rows; ``row_total(partial)`` sums over the lanes of a row;
    ``store_row(o, first, factor, address, quad_lane, columns, valid)`` writes one row times ``factor``:
    four lanes transpose their words among themselves, so that each stores 16 bytes.
    """
    count, groups = variant.d_v // 2, variant.d_v // 32
    pack = registers.pack_pair(variant.kind)

    @device_function
    def rescale(o: Any, low: Any, high: Any) -> None:
        for i in range(count // 4):
            o[4 * i] *= low
            o[4 * i + 1] *= low
            o[4 * i + 2] *= high
            o[4 * i + 3] *= high

    @device_function
    def row_total(partial: Any) -> Any:
        partial += registers.exchange_float(partial, 1)
        return partial + registers.exchange_float(partial, 2)

    @device_function
    def store_row(
        o: Any, first: Any, factor: Any, address: Any, quad_lane: Any, columns: Any, valid: Any
    ) -> None:
        odd, upper = (quad_lane & 1) != 0, (quad_lane & 2) != 0
        for g in range(groups):
            at = 16 * g + first
            w0 = pack(o[at] * factor, o[at + 1] * factor)
            w1 = pack(o[at + 4] * factor, o[at + 5] * factor)
            w2 = pack(o[at + 8] * factor, o[at + 9] * factor)
            w3 = pack(o[at + 12] * factor, o[at + 13] * factor)
            x = registers.exchange_word(w0 if odd else w1, 1)
            y = registers.exchange_word(w2 if odd else w3, 1)
            if odd:
                w0, w2 = x, y
            else:
                w1, w3 = x, y
            x = registers.exchange_word(w0 if upper else w2, 2)
            y = registers.exchange_word(w1 if upper else w3, 2)
            if upper:
                w0, w1 = x, y
            else:
                w2, w3 = x, y
            column = 32 * g + 8 * quad_lane
            if valid and column < columns:
                copy.store_global_16(address + uint64(2 * column), w0, w1, w2, w3)

    return rescale, row_total, store_row
