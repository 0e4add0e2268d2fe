"""Outliers of few rows of x, for Hopper: what a block needs of them lies in its shared memory.

A warp that has nothing else to do lists the marked columns while codes are multiplied.  Then the consumers
bring what x and its codes hold there, for the first `NEAR` outliers, and each thread what its column of the
weight holds: four outliers at a time are added to the sums of all its tokens, and their codes' product is
taken away, exactly, by one dp4a.  Further outliers follow number by number: slow, and right.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.arithmetic import dot_product
from cuda_backend.int8.aside_hopper import LEFT, build_list
from cuda_backend.int8.epilogue_hopper import build_value, kind_of
from cuda_backend.int8.outliers_hopper import clear_marks
from cuda_backend.int8.variant_hopper import NEAR, Narrow
from cuda_backend.ptx import barrier, copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["Outliers", "build_outliers"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

WARPS = 8  # of consumers: each brings what one token holds, a lane for each outlier


class Outliers(NamedTuple):
    """Device functions of a block.

    Attributes
    ----------
    listing
        ``(base, lane, marks, indices, counters, K, grid)``: a warp lists marked columns and lets the
        consumers know; of `grid` blocks the last to have read the marks clears them.
    gather
        ``(base, thread, first, x, codes, M)``: consumers bring x and its codes to shared memory, each array
        with its address and strides; returns how many outliers there are.  A barrier of them must follow.
    count
        ``(base, removed, far, own, number, n, weight, rest)``: what outliers add to column `n`, and what
        their codes had added, for the tokens ``own + i * token_step`` with i < ``variant.together``.
        `weight` is its address, strides and absmax; `rest` the address of the list, x and codes as above,
        the block's first token, and how many it has.
    """

    listing: Callable[..., Any]
    gather: Callable[..., Any]
    count: Callable[..., Any]


def build_outliers(variant: Narrow, at: int) -> Outliers:
    """Return what a block of `variant` does about outliers, with shared memory from ``base + at`` on."""
    tokens, together, step = variant.tokens, variant.together, variant.token_step
    released = variant.outliers == "released"
    rounds = tokens // WARPS
    ready, number_at, listed = at, at + 8, at + 16
    x_at = listed + 4 * NEAR
    codes_at = x_at + 4 * tokens * NEAR
    make_list = build_list(NEAR)
    unpack, value_of = registers.unpack_low(kind_of(variant.kind)), build_value(variant.kind)

    @device_function
    def listing(base: Any, lane: Any, marks: Any, indices: Any, counters: Any, K: Any, grid: Any) -> None:
        number = make_list(marks, K, lane, uint32(base + listed), indices)
        if lane == 0:
            copy.store_shared_word(uint32(base + number_at), number)
        barrier.warp()
        if lane == 0:
            barrier.arrive(base + ready)
        last = int32(0)
        if number > 0 and lane == 0:
            last = int32(copy.fetch_increment(counters + uint64(LEFT), int32(grid - 1)) == grid - 1)
        if registers.uniform(last) != 0:
            clear_marks(marks, K, lane, 32)

    @device_function
    def gather(base: Any, thread: Any, first: Any, x: Any, codes: Any, M: Any) -> Any:
        x_base, x_row, x_feature = x
        codes_base, codes_row = codes
        found = cuda.local.array(rounds, uint32)
        own = cuda.local.array(rounds, int32)
        barrier.wait(base + ready, 0)
        number = copy.load_shared_word(uint32(base + number_at))
        if number > 0:
            j, warp = int32(thread & 31), int32(thread >> 5)
            feature = uint64(0)
            if j < number:
                feature = uint64(copy.load_shared_word(uint32(base + listed + 4 * j)))
            for i in range(rounds):
                found[i], own[i] = uint32(0), int32(0)
                row = uint64(first + warp + WARPS * i)
                if j < number and first + warp + WARPS * i < M:
                    found[i] = copy.load_half(x_base + row * x_row + feature * x_feature)
                    if released:
                        own[i] = copy.load_byte(codes_base + row * codes_row + feature)
            for i in range(rounds):
                place = int32((warp + WARPS * i) * NEAR + j)
                copy.store_shared_float(uint32(base + x_at + 4 * place), unpack(found[i]))
                if released:
                    copy.store_shared_byte(uint32(base + codes_at + place), uint32(own[i]))
        return number

    @device_function
    def met_by(n: Any, feature: Any, weight: Any) -> Any:
        """Return what an outlier meets in column n, and its code."""
        w, w_feature, w_column, factor = weight
        at = w + uint64(n) * w_column + feature * w_feature
        if released:
            code = copy.load_byte(at)
            return value_of(code, factor), code
        return unpack(copy.load_half(at)), int32(0)

    @device_function
    def count(
        base: Any, removed: Any, far: Any, own: Any, number: Any, n: Any, weight: Any, rest: Any
    ) -> None:
        met = cuda.local.array(4, float32)
        own_codes = cuda.local.array(4, int32)
        values = cuda.local.array(4, float32)
        j = int32(0)
        while j < min(number, NEAR):
            for e in range(4):
                met[e], own_codes[e] = float32(0.0), int32(0)
                if j + e < number:
                    feature = uint64(copy.load_shared_word(uint32(base + listed + 4 * (j + e))))
                    met[e], own_codes[e] = met_by(n, feature, weight)
            packed = registers.low_bytes(
                uint32(own_codes[0]), uint32(own_codes[1]), uint32(own_codes[2]), uint32(own_codes[3])
            )
            for i in range(together):
                place = int32(min(own + step * i, tokens - 1) * NEAR + j)
                copy.load_shared_16(values, 0, uint32(base + x_at + 4 * place))
                for e in range(4):
                    far[i] += values[e] * met[e]
                if released:
                    four = copy.load_shared_word(uint32(base + codes_at + place))
                    removed[i] = dot_product(uint32(four), packed, removed[i])
            j = int32(j + 4)
        indices, x, codes, first, end = rest
        x_base, x_row, x_feature = x
        codes_base, codes_row = codes
        while j < number:
            feature = uint64(copy.load_word(indices + uint64(4) * uint64(j)))
            value, code = met_by(n, feature, weight)
            for i in range(together):
                if own + step * i < end:
                    row = uint64(first + own + step * i)
                    half = copy.load_half(x_base + row * x_row + feature * x_feature)
                    far[i] += unpack(half) * value
                    if released:
                        removed[i] += copy.load_byte(codes_base + row * codes_row + feature) * code
            j = int32(j + 1)

    return Outliers(listing, gather, count)
