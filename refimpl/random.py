"""Philox4x32-10: random numbers that a kernel on any machine can recompute bit for bit.

A counter-based generator has no state: the words are a function of a key (the seed) and a counter (where in
the tensor they are used), so tiles can be visited in any order, and a backward pass regenerates the dropout
of the forward pass from the seed alone.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from refimpl.errors import DTypeError, OptionError
from refimpl.numerics import BoolArray, IntArray

__all__ = ["as_seed", "drop_threshold", "dropout_keep", "philox4x32"]

# Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3 and table 2.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox4x32(
    c0: npt.ArrayLike, c1: npt.ArrayLike, c2: npt.ArrayLike, c3: npt.ArrayLike, seed: int
) -> npt.NDArray[np.uint32]:
    """Return the four 32-bit words of Philox4x32-10 for each counter.

    Parameters
    ----------
    c0, c1, c2, c3 : array_like of int
        Words of the counters, each below 2**32; they broadcast against each other.
    seed : int
        64-bit key; the low word is the first key word.

    Returns
    -------
    ndarray of uint32, shape (..., 4)
        The words, last axis.

    References
    ----------
    .. [1] Salmon, Moraes, Dror, Shaw, 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.

    Examples
    --------
    The first known-answer test of the Random123 distribution:

    >>> [f"{int(word):08x}" for word in philox4x32(0, 0, 0, 0, seed=0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    x0, x1, x2, x3 = (np.asarray(word, dtype=np.uint64) for word in np.broadcast_arrays(c0, c1, c2, c3))
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(ROUNDS):
        product0, product1 = x0 * np.uint64(MULTIPLIERS[0]), x2 * np.uint64(MULTIPLIERS[1])
        x0, x1, x2, x3 = (
            (product1 >> _HIGH) ^ x1 ^ np.uint64(key0),
            product1 & _LOW,
            (product0 >> _HIGH) ^ x3 ^ np.uint64(key1),
            product0 & _LOW,
        )
        key0, key1 = (key0 + WEYL[0]) & 0xFFFFFFFF, (key1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def as_seed(rng: np.random.Generator | int | None) -> int:
    """Return a 64-bit seed: `rng` itself if it is one, drawn from `rng` if it is a generator.

    None draws fresh entropy, as `numpy.random.default_rng` does.

    Raises
    ------
    OptionError
        For an integer outside [0, 2**64).
    DTypeError
        For anything else.

    Examples
    --------
    >>> as_seed(7)
    7
    """
    if rng is None or isinstance(rng, np.random.Generator):
        return int(np.random.default_rng(rng).integers(2**64, dtype=np.uint64))
    if isinstance(rng, bool) or not isinstance(rng, int | np.integer):
        raise DTypeError(f"rng: expected a Generator, an integer or None, got {type(rng).__name__}")
    if not 0 <= int(rng) < 2**64:
        raise OptionError(f"rng: expected a seed in [0, 2**64), got {rng}")
    return int(rng)


def drop_threshold(p: float) -> int:
    """Return the 32-bit number below which a word means "drop": ``ceil(p * 2**32)``.

    Examples
    --------
    >>> drop_threshold(0.5) == 2**31
    True
    """
    return math.ceil(p * 2.0**32)


def dropout_keep(
    seed: int, p: float, b: npt.ArrayLike, h: npt.ArrayLike, rows: IntArray, columns: IntArray
) -> BoolArray:
    """Return which attention probabilities survive dropout.

    Entry (i, j) of query head h of sequence b uses word ``j % 4`` of counter ``(b, h, i, j // 4)``, and is
    kept if the word is at least ``ceil(p * 2**32)``.

    Parameters
    ----------
    seed : int
        64-bit key.
    p : float
        Probability of dropping, in [0, 1).
    b, h : array_like of int
        Sequences and query heads; they broadcast to the leading shape of the result.
    rows, columns : ndarray of int, shape (Br,) and (Bc,)
        Positions of queries and keys in the whole sequence.

    Returns
    -------
    ndarray of bool, shape (..., Br, Bc)
        True where the entry is kept.

    Examples
    --------
    A tile is the same wherever its borders lie:

    >>> tile = dropout_keep(7, 0.25, 0, 0, np.arange(2), np.arange(8))
    >>> bool((tile[:, 4:] == dropout_keep(7, 0.25, 0, 0, np.arange(2), np.arange(4, 8))).all())
    True
    """
    quads = np.unique(columns // 4)
    b, h = (np.asarray(index)[..., None, None] for index in (b, h))
    words = philox4x32(b, h, rows[:, None], quads[None, :], seed)
    chosen = words[..., np.searchsorted(quads, columns // 4), columns % 4]
    return np.asarray(chosen >= np.uint64(drop_threshold(p)))
