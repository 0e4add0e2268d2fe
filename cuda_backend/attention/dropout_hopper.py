"""Dropout in the registers of a Hopper consumer: the words of `refimpl.random.dropout_keep`, bit for bit.

One counter gives the words of four neighbouring keys, and a lane has four weights of each eight columns.
With scores turned the keys are in four lanes: two queries for two keys eight apart.  So each of the four
lanes draws for one of these, and they transpose their words.  Otherwise the keys are in two lanes, two keys
for two rows eight apart: one lane draws for one row, the other for the other, and they exchange half.  Either
way one Philox gives four weights.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3 and table 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import device_function
from cuda_backend.ptx import registers
from cuda_backend.ptx.assembly import types
from refimpl.random import MULTIPLIERS, ROUNDS, WEYL

__all__ = ["build_row_words", "build_words"]

int32, uint32, uint64 = types.int32, types.uint32, types.uint64


def build_philox() -> Callable[..., Any]:
    """Return ``philox(c0, c1, c2, c3, seed)``, a device function that gives the four words of a counter."""
    first, second = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
    own_step, other_step = (np.uint64(step) for step in WEYL)
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)

    @device_function
    def philox(c0: Any, c1: Any, c2: Any, c3: Any, seed: Any) -> Any:
        x0, x1, x2, x3 = uint64(c0), uint64(c1), uint64(c2), uint64(c3)
        key0, key1 = uint64(seed & low), uint64(seed >> high)
        step = int32(0)
        while step < ROUNDS:  # not unrolled: sixteen of them in a row are too much code for the compiler
            product0, product1 = uint64(x0 * first), uint64(x2 * second)
            x0, x1 = uint64((product1 >> high) ^ x1 ^ key0), uint64(product1 & low)
            x2, x3 = uint64((product0 >> high) ^ x3 ^ key1), uint64(product0 & low)
            key0, key1 = uint64((key0 + own_step) & low), uint64((key1 + other_step) & low)
            step = registers.successor(step)
        return uint32(x0), uint32(x1), uint32(x2), uint32(x3)

    return philox


def build_words() -> Callable[..., Any]:
    """Return ``words(seed, batch, head, query, key, lane)``, a device function for a whole warp.

    `query` is the first of eight queries, `key` the first of sixteen keys, the latter a multiple of 16.  The
    words are those of accumulators 0 to 3 of the lane, as `cuda_backend.ptx.wgmma` counts them.
    """
    philox = build_philox()

    @device_function
    def words(seed: Any, batch: Any, head: Any, query: Any, key: Any, lane: Any) -> Any:
        part = int32((lane >> 2) & 3)
        column = int32(query + 2 * (lane & 3) + (part & 1))
        counter = int32((key >> 2) + (lane >> 4) + 2 * (part >> 1))
        w0, w1, w2, w3 = philox(batch, head, column, counter, seed)
        odd, upper = int32(part & 1), int32(part & 2)
        y = registers.exchange_word(registers.select_word(odd, w0, w1), 4)
        z = registers.exchange_word(registers.select_word(odd, w2, w3), 4)
        w0, w1 = registers.select_word(odd, y, w0), registers.select_word(odd, w1, y)
        w2, w3 = registers.select_word(odd, z, w2), registers.select_word(odd, w3, z)
        y = registers.exchange_word(registers.select_word(upper, w0, w2), 8)
        z = registers.exchange_word(registers.select_word(upper, w1, w3), 8)
        w0, w2 = registers.select_word(upper, y, w0), registers.select_word(upper, w2, y)
        w1, w3 = registers.select_word(upper, z, w1), registers.select_word(upper, w3, z)
        return w0, w1, w2, w3

    return words


def build_row_words() -> Callable[..., Any]:
    """Return ``words(seed, batch, head, query, key, quad_lane)``, a device function for a whole warp.

    `query` is the first of the lane's two rows, `key` the first of eight columns, a multiple of 8.  The words
    are those of accumulators 0 to 3 of the lane, rows being queries.
    """
    philox = build_philox()

    @device_function
    def words(seed: Any, batch: Any, head: Any, query: Any, key: Any, quad_lane: Any) -> Any:
        odd = int32(quad_lane & 1)
        w0, w1, w2, w3 = philox(
            batch, head, int32(query + 8 * odd), int32((key >> 2) + (quad_lane >> 1)), seed
        )
        x = registers.exchange_word(registers.select_word(odd, w0, w2), 1)
        y = registers.exchange_word(registers.select_word(odd, w1, w3), 1)
        low0, low1 = registers.select_word(odd, x, w0), registers.select_word(odd, y, w1)
        return low0, low1, registers.select_word(odd, w2, x), registers.select_word(odd, w3, y)

    return words
