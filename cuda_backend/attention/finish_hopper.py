"""The end of a Hopper consumer's tile: rows divided by their sums and stored, with their log-sum-exps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import device_function
from cuda_backend.attention.softmax_hopper import build_output
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_finish", "build_rows"]

int32, uint64, float32 = types.int32, types.uint64, types.float32

LN2 = 0.6931471805599453


def build_finish(variant: Variant) -> Callable[..., None]:
    """Return ``finish(o, rows, scale, out, lse, row, head, quad_lane, problem)``, a device function.

    `rows` are maximum and sum of this thread's columns for its two rows, of which `row` is the first;
    `scale` makes scores exponents of 2; `head` is batch and head in one number; `problem` is Hq, Tq and the
    columns of the output.
    """
    row_total, (inverse, store_rows) = build_output(variant)[1], build_rows(variant)

    @device_function
    def finish(
        o: Any,
        rows: Any,
        scale: Any,
        out: Any,
        lse: Any,
        row: Any,
        head: Any,
        quad_lane: Any,
        problem: Any,
    ) -> None:
        heads, tq, _ = problem
        max_low, sum_low, max_high, sum_high = rows
        sum_low, sum_high = row_total(sum_low), row_total(sum_high)
        factors = inverse(sum_low), inverse(sum_high)
        batch = registers.quotient(head, heads)
        store_rows(o, factors, out, row, head, batch, quad_lane, problem)
        if lse != uint64(0) and quad_lane == 0:
            # A row without keys: -inf + log2(0) = -inf.
            address = lse + uint64(4) * (uint64(head) * uint64(tq) + uint64(row))
            if row < tq:
                value = (max_low * scale + registers.log2(sum_low)) * float32(LN2)
                copy.store_global_float(address, value)
            if row + 8 < tq:
                value = (max_high * scale + registers.log2(sum_high)) * float32(LN2)
                copy.store_global_float(address + uint64(32), value)

    return finish


def build_rows(variant: Variant) -> tuple[Callable[..., Any], ...]:
    """Return ``inverse`` and ``store_rows``, device functions.

    ``inverse(total)`` is what a row with that sum is multiplied by, 0 for one without keys;
    ``store_rows(o, factors, out, row, head, batch, quad_lane, problem)`` multiplies and stores both rows.
    """
    store_row = build_output(variant)[2]

    @device_function
    def inverse(total: Any) -> Any:
        return float32(1.0) / total if total > float32(0.0) else float32(0.0)

    @device_function
    def store_rows(
        o: Any, factors: Any, out: Any, row: Any, head: Any, batch: Any, quad_lane: Any, problem: Any
    ) -> None:
        heads, tq, columns = problem
        line = (uint64(batch) * uint64(tq) + uint64(row)) * uint64(heads) + uint64(head - batch * heads)
        row_bytes = uint64(2 * columns)
        address = out + line * row_bytes
        store_row(o, int32(0), factors[0], address, quad_lane, columns, row < tq)
        address += uint64(8 * heads) * row_bytes
        store_row(o, int32(2), factors[1], address, quad_lane, columns, row + 8 < tq)

    return inverse, store_rows
