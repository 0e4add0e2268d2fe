"""Tiles in shared memory as the backward kernels use them: read, multiplied, summed over, written.

Each function here returns a device function whose constants are those of one `BackwardVariant`.  `at`, `left`
and the like are where a tile starts in shared memory, in floats; (y, x) is the place of the thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function, types
from cuda_backend.attention.variant_backward import BackwardVariant, Side
from cuda_backend.formats import narrow, widen

__all__ = ["INDEX", "accumulation", "products", "reader", "writer"]

# `& INDEX` changes no index: it tells the compiler that it is not negative.  Without it every access asks
# whether the index counts from the end, which costs three times what the products do.
INDEX = 0x7FFFFFFF
_ZERO = np.float32(0)
_float32 = types.float32


def reader(variant: BackwardVariant, side: Side, width: int) -> Any:
    """Return what copies rows `first` to `end` of a head to a tile, as float32, and fills it up with 0."""
    ROWS, THREADS, STRIDE = variant.padded(side), variant.threads, variant.stride(width)
    CHANNELS, load = variant.channels(width) * variant.columns, widen(variant.kind)

    @device_function
    def read(array: Any, b: Any, first: Any, end: Any, h: Any, shared: Any, at: Any, thread: Any) -> None:
        for e in range(thread, ROWS * CHANNELS, THREADS):
            r = (e & INDEX) // CHANNELS
            d = (e & INDEX) % CHANNELS
            value = _ZERO
            if first + r < end and d < width:
                value = load(array[b, (first + r) & INDEX, h, d])
            shared[at + r * STRIDE + d] = value

    return read


def writer(variant: BackwardVariant, side: Side, width: int) -> Any:
    """Return what puts the threads' shares of a tile together and rounds them to rows `first` to `end`."""
    OWN, CHANNELS, ROWS, COLUMNS = _shares(variant, side, width)
    TILE, THREADS, STRIDE, ALL = (
        variant.tile(side),
        variant.threads,
        variant.stride(width),
        CHANNELS * COLUMNS,
    )
    store = narrow(variant.kind)

    @device_function
    def write(
        share: Any, array: Any, b: Any, first: Any, end: Any, h: Any, shared: Any, at: Any, y: Any, x: Any
    ) -> None:
        for a in range(OWN):
            for n in range(CHANNELS):
                shared[at + (y + a * ROWS) * STRIDE + x + n * COLUMNS] = share[a * CHANNELS + n]
        cuda.syncthreads()
        for e in range(y * COLUMNS + x, TILE * ALL, THREADS):
            r = (e & INDEX) // ALL
            d = (e & INDEX) % ALL
            if first + r < end and d < width:
                array[b, (first + r) & INDEX, h, d] = store(shared[at + r * STRIDE + d])

    return write


def products(variant: BackwardVariant, side: Side, width: int) -> Any:
    """Return what multiplies the tile of `side` with a passing one: ``out = left right'``, by own entries."""
    passing: Side = "keys" if side == "queries" else "queries"
    ROWS, COLUMNS, STRIDE = variant.rows, variant.columns, variant.stride(width)
    OWN, PASSING = variant.padded(side) // ROWS, variant.padded(passing) // COLUMNS
    SCORES, SCORE_STRIDE = OWN * PASSING, variant.padded(passing) | 1

    @device_function
    def multiply(shared: Any, left: Any, right: Any, out: Any, y: Any, x: Any) -> None:
        s = cuda.local.array(SCORES, _float32)
        for z in range(SCORES):
            s[z] = _ZERO
        for e in range(width):
            d = e & INDEX
            for a in range(OWN):
                factor = shared[left + (y + a * ROWS) * STRIDE + d]
                for c in range(PASSING):
                    s[a * PASSING + c] += factor * shared[right + (x + c * COLUMNS) * STRIDE + d]
        for a in range(OWN):
            for c in range(PASSING):
                shared[out + (y + a * ROWS) * SCORE_STRIDE + x + c * COLUMNS] = s[a * PASSING + c]

    return multiply


def accumulation(variant: BackwardVariant, side: Side, width: int) -> Any:
    """Return what adds ``weights tile`` to the thread's share of a gradient, `tile` being a passing one."""
    passing: Side = "keys" if side == "queries" else "queries"
    OWN, CHANNELS, ROWS, COLUMNS = _shares(variant, side, width)
    PASSING, STRIDE, SCORE_STRIDE = variant.tile(passing), variant.stride(width), variant.padded(passing) | 1

    @device_function
    def accumulate(share: Any, shared: Any, weights: Any, tile: Any, y: Any, x: Any) -> None:
        for e in range(PASSING):
            t = e & INDEX
            for a in range(OWN):
                weight = shared[weights + (y + a * ROWS) * SCORE_STRIDE + t]
                for n in range(CHANNELS):
                    share[a * CHANNELS + n] += weight * shared[tile + t * STRIDE + x + n * COLUMNS]

    return accumulate


def _shares(variant: BackwardVariant, side: Side, width: int) -> tuple[int, int, int, int]:
    """Return rows and channels of a thread, and the threads along each."""
    own = variant.padded(side) // variant.rows
    return own, variant.channels(width), variant.rows, variant.columns
