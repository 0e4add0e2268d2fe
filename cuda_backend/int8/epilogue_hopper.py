"""What happens to a product between registers and memory: scales, bias, surplus outliers, rounding, stores.

Accumulator 4 i + e of a thread is column 8 i + 2 (lane % 4) + e % 2 of its first row (e < 2) or of the row
eight below (e >= 2); see `cuda_backend.ptx.wgmma`.  Four neighbouring lanes share a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.arithmetic import product
from cuda_backend.int8.variant_hopper import Wide
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import types
from refimpl.quant.absmax import LIMIT

__all__ = [
    "build_columns", "build_epilogue", "build_removal", "build_surplus", "build_value", "build_weight",
    "kind_of",
]  # fmt: skip

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

INVERSE = 1 / LIMIT**2
NO_BIAS = -0.0  # added to any number, -0.0 among them, it gives that number


def kind_of(name: str) -> str:
    """Return PTX's name of a 16-bit format; of an int32 output, any."""
    return "bf16" if name == "bfloat16" else "f16"


def build_epilogue(variant: Wide) -> tuple[Callable[..., Any], ...]:
    """Return ``scale``, ``store`` and ``store_codes`` for the columns of a part, device functions.

    ``scale(y, address, low, high)`` turns int32 totals into the bits of float32, in place, since registers
    for both there are not: each product rounded, in the reference's order; scale and bias of the thread's
    columns lie from ``address`` on, in shared memory, ``low`` and ``high`` are absmax of its two rows.
    ``store(y, out, row, column, quad_lane, M, N)`` writes both rows: four lanes transpose their words among
    themselves, so that each stores 16 bytes.
    """
    groups, aligned = variant.width // 8, variant.aligned
    pack = registers.pack_pair(kind_of(variant.kind))
    # Without it the compiler loads the scales of all columns before it uses any: too many registers.
    pin = registers.pin(4 * groups)

    @device_function
    def scaled(total: Any, row: Any, column: Any, bias: Any) -> Any:
        y = product(product(product(float32(total), row), column), float32(INVERSE)) + bias
        return int32(y.view(np.int32))

    @device_function
    def scale(y: Any, address: Any, low: Any, high: Any) -> None:
        columns = cuda.local.array(4, float32)
        for i in range(groups):
            copy.load_shared_16(columns, 0, uint32(address + 64 * i))
            for e in range(2):
                factor, bias = columns[2 * e], columns[2 * e + 1]
                y[4 * i + e] = scaled(y[4 * i + e], low, factor, bias)
                y[4 * i + 2 + e] = scaled(y[4 * i + 2 + e], high, factor, bias)
            if i % 4 == 3:
                pin(y)

    @device_function
    def rounded(low: Any, high: Any) -> Any:
        return pack(int32(low).view(np.float32), int32(high).view(np.float32))

    @device_function
    def store_row(y: Any, first: Any, address: Any, column: Any, quad_lane: Any, valid: Any, N: Any) -> None:
        odd, upper = (quad_lane & 1) != 0, (quad_lane & 2) != 0
        for g in range(groups // 4):
            at = 16 * g + first
            w0 = rounded(y[at], y[at + 1])
            w1 = rounded(y[at + 4], y[at + 5])
            w2 = rounded(y[at + 8], y[at + 9])
            w3 = rounded(y[at + 12], y[at + 13])
            a = registers.exchange_word(w0 if odd else w1, 1)
            b = registers.exchange_word(w2 if odd else w3, 1)
            if odd:
                w0, w2 = a, b
            else:
                w1, w3 = a, b
            a = registers.exchange_word(w0 if upper else w2, 2)
            b = registers.exchange_word(w1 if upper else w3, 2)
            if upper:
                w0, w1 = a, b
            else:
                w2, w3 = a, b
            if valid and column + 32 * g + 8 * quad_lane < N:
                copy.store_global_16(address + uint64(64 * g + 16 * quad_lane), w0, w1, w2, w3)

    @device_function
    def store_numbers(y: Any, first: Any, address: Any, column: Any, valid: Any, N: Any) -> None:
        if valid:
            for i in range(groups):
                for e in range(2):
                    if column + 8 * i + e < N:
                        word = rounded(y[4 * i + first + e], int32(0))
                        copy.store_global_half(address + uint64(16 * i + 2 * e), word)

    @device_function
    def store(y: Any, out: Any, row: Any, column: Any, quad_lane: Any, M: Any, N: Any) -> None:
        address = out + uint64(2) * (uint64(row) * uint64(N) + uint64(column))
        below = address + uint64(16) * uint64(N)
        if aligned:
            store_row(y, 0, address, column, quad_lane, row < M, N)
            store_row(y, 2, below, column, quad_lane, row + 8 < M, N)
        else:
            own, skipped = int32(column + 2 * quad_lane), uint64(4 * quad_lane)
            store_numbers(y, 0, address + skipped, own, row < M, N)
            store_numbers(y, 2, below + skipped, own, row + 8 < M, N)

    @device_function
    def store_codes(total: Any, out: Any, row: Any, column: Any, M: Any, N: Any) -> None:
        address = out + uint64(4) * (uint64(row) * uint64(N) + uint64(column))
        for half in range(2):
            if row + 8 * half < M:
                for i in range(groups):
                    low, high = total[4 * i + 2 * half], total[4 * i + 2 * half + 1]
                    at = address + uint64(32 * i)
                    if aligned:
                        if column + 8 * i < N:
                            copy.store_global_8(at, uint32(low), uint32(high))
                    else:
                        if column + 8 * i < N:
                            copy.store_global_word(at, uint32(low))
                        if column + 8 * i + 1 < N:
                            copy.store_global_word(at + uint64(4), uint32(high))
            address += uint64(32) * uint64(N)

    return scale, store, store_codes


def build_columns(variant: Wide) -> Callable[..., Any]:
    """Return what a warp does to write scale and bias of a tile's columns to shared memory."""
    rounds = variant.block_n // 32
    unpack = registers.unpack_low(kind_of(variant.kind))

    @device_function
    def write_columns(target: Any, lane: Any, absmax: Any, bias: Any, column: Any, N: Any) -> None:
        for j in range(rounds):
            own = int32(column + lane + 32 * j)
            factor, shift = float32(0.0), float32(NO_BIAS)
            if own < N:
                factor = copy.load_float(absmax + uint64(4) * uint64(own))
                if bias != uint64(0):
                    shift = unpack(copy.load_half(bias + uint64(2) * uint64(own)))
            copy.store_shared_float(uint32(target + 8 * (lane + 32 * j)), factor)
            copy.store_shared_float(uint32(target + 8 * (lane + 32 * j) + 4), shift)

    return write_columns


def build_value(kind: str) -> Callable[..., Any]:
    """Return ``value_of(code, absmax)``: the code of a weight times absmax / 127, rounded to `kind`."""
    pack, unpack = registers.pack_pair(kind_of(kind)), registers.unpack_low(kind_of(kind))

    @device_function
    def value_of(code: Any, absmax: Any) -> Any:
        return unpack(pack(product(float32(code), absmax / float32(LIMIT)), float32(0.0)))

    return value_of


def build_weight(kind: str, outliers: str) -> Callable[..., Any]:
    """Return the device function that gives the weight an outlier meets, as float32.

    ``weight(w, offset, absmax)``: under "released" the code at ``w + offset`` times absmax / 127, rounded to
    `kind`; under "paper" the number there.
    """
    unpack = registers.unpack_low(kind_of(kind))
    if outliers == "paper":

        @device_function
        def as_given(w: Any, offset: Any, absmax: Any) -> Any:  # noqa: ARG001
            return unpack(copy.load_half(w + offset))

        return as_given

    value_of = build_value(kind)

    @device_function
    def dequantised(w: Any, offset: Any, absmax: Any) -> Any:
        return value_of(copy.load_byte(w + offset), absmax)

    return dequantised


def build_surplus(variant: Wide) -> Callable[..., Any]:
    """Return what adds the outliers that did not fit side by side: number by number, slow and right."""
    groups = variant.width // 8
    unpack = registers.unpack_low(kind_of(variant.kind))
    weight = build_weight(variant.kind, variant.outliers)

    @device_function
    def added(y: Any, term: Any) -> Any:
        total = int32(y).view(np.float32) + term
        return int32(total.view(np.int32))

    @device_function
    def add_surplus(
        y: Any, surplus: Any, indices: Any, number: Any, done: Any, row: Any, column: Any, M: Any, N: Any
    ) -> None:
        x, x_row, x_feature, w, w_feature, w_column, absmax = surplus
        j = int32(done)
        while j < number:
            feature = uint64(copy.load_word(indices + uint64(4) * uint64(j)))
            low, high = float32(0.0), float32(0.0)
            at = x + uint64(row) * x_row + feature * x_feature
            if row < M:
                low = unpack(copy.load_half(at))
            if row + 8 < M:
                high = unpack(copy.load_half(at + uint64(8) * x_row))
            for i in range(groups):
                for e in range(2):
                    own = int32(column + 8 * i + e)
                    met = float32(0.0)
                    if own < N:
                        factor = copy.load_float(absmax + uint64(4) * uint64(own))
                        met = weight(w, uint64(own) * w_column + feature * w_feature, factor)
                    y[4 * i + e] = added(y[4 * i + e], low * met)
                    y[4 * i + 2 + e] = added(y[4 * i + 2 + e], high * met)
            j = int32(j + 1)

    return add_surplus


def build_removal(variant: Wide) -> Callable[..., Any]:
    """Return what takes away the codes of outliers that did not fit side by side: number by number too."""
    groups = variant.width // 8

    @device_function
    def remove_surplus(
        total: Any, surplus: Any, indices: Any, number: Any, done: Any, row: Any, column: Any, M: Any, N: Any
    ) -> None:
        codes, codes_row, w, w_feature, w_column = surplus
        j = int32(done)
        while j < number:
            feature = uint64(copy.load_word(indices + uint64(4) * uint64(j)))
            low, high = int32(0), int32(0)
            at = codes + uint64(row) * codes_row + feature
            if row < M:
                low = copy.load_byte(at)
            if row + 8 < M:
                high = copy.load_byte(at + uint64(8) * codes_row)
            for i in range(groups):
                for e in range(2):
                    own = int32(column + 8 * i + e)
                    met = int32(0)
                    if own < N:
                        met = copy.load_byte(w + uint64(own) * w_column + feature * w_feature)
                    total[4 * i + e] -= low * met
                    total[4 * i + 2 + e] -= high * met
            j = int32(j + 1)

    return remove_surplus
