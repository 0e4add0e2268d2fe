"""Philox4x32-10 inside kernels, bit-equal with `refimpl.random`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_backend._numba import device_function
from refimpl.random import MULTIPLIERS, ROUNDS, WEYL

__all__ = ["dropout_keeps", "philox_word"]

# 32-bit words are held in 64 bits: their products are wanted whole, and NumPy scalars must not wrap.
_LOW, _HIGH = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIER0, _MULTIPLIER1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_WEYL0, _WEYL1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
_ROUNDS = ROUNDS


@device_function
def philox_word(c0: Any, c1: Any, c2: Any, c3: Any, seed: Any, word: Any) -> Any:
    """Return word 0 to 3 of the block with counter (c0, c1, c2, c3) under a 64-bit `seed`, as uint64."""
    x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    key0 = np.uint64(np.uint64(seed) & _LOW)
    key1 = np.uint64(np.uint64(seed) >> _HIGH)
    for _ in range(_ROUNDS):
        product0 = x0 * _MULTIPLIER0
        product1 = x2 * _MULTIPLIER1
        x0 = (product1 >> _HIGH) ^ x1 ^ key0
        x1 = product1 & _LOW
        x2 = (product0 >> _HIGH) ^ x3 ^ key1
        x3 = product0 & _LOW
        key0 = (key0 + _WEYL0) & _LOW
        key1 = (key1 + _WEYL1) & _LOW
    if word == 0:
        return x0
    if word == 1:
        return x1
    if word == 2:
        return x2
    return x3


@device_function
def dropout_keeps(seed: Any, threshold: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Return whether weight (b, h, i, j) survives: `refimpl.random.dropout_keep`, one entry.

    `threshold` is `refimpl.random.drop_threshold` of the probability, as uint64.
    """
    return philox_word(b, h, i, j // 4, seed, j % 4) >= threshold
