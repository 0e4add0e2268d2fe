"""Keys and values of the tokens so far, one pair a layer, so that a step computes only what is new.

A cache is a value: a step returns a longer one and leaves the one it was given alone.  Rolling back after a
rejected draft is therefore `truncate`, or keeping the old cache.  Keys are stored as attention reads them,
with rotary positions applied, and once a key head.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray
from refimpl.validation import whole

__all__ = ["KVCache", "LayerCache", "cache_bytes", "cache_length", "extended", "truncate"]


class LayerCache(NamedTuple):
    """Keys (B, T, Hkv, D) and values (B, T, Hkv, Dv) of one layer."""

    k: FloatArray
    v: FloatArray


KVCache: TypeAlias = tuple[LayerCache, ...]


def cache_length(cache: KVCache | None) -> int:
    """Return how many tokens a cache holds; None is the empty cache.

    Examples
    --------
    >>> cache_length(None)
    0
    """
    return cache[0].k.shape[1] if cache else 0


def cache_bytes(cache: KVCache | None) -> int:
    """Return the bytes of all keys and values: ``2 L B T Hkv D`` numbers.

    Examples
    --------
    >>> cache_bytes((LayerCache(np.zeros((1, 5, 2, 4), np.float32), np.zeros((1, 5, 2, 4), np.float32)),))
    320
    """
    return sum(part.nbytes for layer in cache or () for part in layer)


def truncate(cache: KVCache | None, length: int) -> KVCache | None:
    """Return the cache of the first `length` tokens, as views: the rollback of rejected tokens.

    Parameters
    ----------
    cache : tuple of LayerCache, or None
        What a step returned.
    length : int
        Tokens to keep, at most as many as there are.

    Returns
    -------
    tuple of LayerCache, or None
        None only for None.

    Raises
    ------
    ShapeError
        If the cache is shorter than `length`.

    Examples
    --------
    >>> layer = LayerCache(np.zeros((1, 5, 2, 4)), np.zeros((1, 5, 2, 4)))
    >>> cache_length(truncate((layer,), 3))
    3
    """
    if whole("length", length, 0) > cache_length(cache):
        raise ShapeError(f"cache: cannot keep {length} tokens of {cache_length(cache)}")
    if cache is None:
        return None
    return tuple(LayerCache(layer.k[:, :length], layer.v[:, :length]) for layer in cache)


def extended(past: LayerCache | None, k: FloatArray, v: FloatArray) -> LayerCache:
    """Return the keys and values of one layer with those of new tokens behind them.

    Raises
    ------
    ShapeError
        If the past has other sequences, heads or widths.

    Examples
    --------
    >>> x = np.zeros((1, 2, 1, 4))
    >>> extended(extended(None, x, x), x, x).k.shape
    (1, 4, 1, 4)
    """
    if past is None:
        return LayerCache(k, v)
    for name, old, new in zip("kv", past, (k, v), strict=True):
        if (old.shape[0], *old.shape[2:]) != (new.shape[0], *new.shape[2:]):
            raise ShapeError(f"cache: {name} has shape {old.shape}, which {new.shape} cannot extend")
    return LayerCache(np.concatenate([past.k, k], axis=1), np.concatenate([past.v, v], axis=1))
