"""Which tiles of the score matrix a mask function leaves: dead ones are skipped, full ones need no mask."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.attention.user_functions import Aux, Mod, as_mod, where_allowed
from refimpl.numerics import Array
from refimpl.validation import whole

__all__ = ["DEAD", "FULL", "PARTIAL", "BlockMask", "block_mask", "cached_block_mask"]

DEAD, PARTIAL, FULL = 0, 1, 2
KEPT = 64  # masks that the cache remembers

_cache: OrderedDict[Any, BlockMask] = OrderedDict()


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The state of each tile: `DEAD`, `PARTIAL` or `FULL`.

    Attributes
    ----------
    states : ndarray of uint8, shape (B or 1, Hq or 1, ceil(Tq / Br), ceil(Tk / Bc))
        1 along an axis for all sequences or heads alike.
    block_sizes : tuple of int
        (Br, Bc).
    lengths : tuple of int
        (Tq, Tk).
    """

    states: Array
    block_sizes: tuple[int, int]
    lengths: tuple[int, int]

    @property
    def density(self) -> float:
        """Share of tiles that are not dead: of the products that a kernel computes."""
        return float(np.mean(self.states != DEAD)) if self.states.size else 0.0


def block_mask(
    mask_mod: Callable[..., Any],
    B: int,
    Hq: int,
    Tq: int,
    Tk: int,
    /,
    *,
    block_sizes: tuple[int, int] = (64, 64),
    aux: Aux = (),
) -> BlockMask:
    """Return the states of the tiles of `mask_mod`, evaluated once for every score.

    Parameters
    ----------
    mask_mod : callable
        ``mask_mod(b, h, i, j)`` or ``mask_mod(b, h, i, j, aux)``.
    B, Hq, Tq, Tk : int
        Sequences, query heads, queries, keys.
    block_sizes : tuple of int
        (Br, Bc), queries and keys in a tile.
    aux : tuple of ndarray
        Arrays that the function reads.

    Returns
    -------
    BlockMask
        A function that reads no `b`, or no `h`, is evaluated for one sequence, or head.

    Raises
    ------
    DTypeError, OptionError
        If `mask_mod` is no such function, or a block size is below 1.

    References
    ----------
    .. [1] Dong et al., 2024, arXiv:2412.05496, section 4.2: full and partial blocks.

    Examples
    --------
    >>> block_mask(lambda b, h, i, j: j <= i, 1, 8, 5, 5, block_sizes=(2, 2)).states
    array([[[[1, 0, 0],
             [2, 1, 0],
             [2, 2, 2]]]], dtype=uint8)
    """
    mod = as_mod("mask_mod", mask_mod)
    Br, Bc = (whole("block_sizes", size) for size in block_sizes)
    sequences, heads = (B if mod.by_sequence else min(B, 1)), (Hq if mod.by_head else min(Hq, 1))
    rows, columns = -(-Tq // Br), -(-Tk // Bc)
    states = np.zeros((sequences, heads, rows, columns), np.uint8)
    for b, h, r in np.ndindex(sequences, heads, rows):
        i = np.arange(r * Br, min((r + 1) * Br, Tq))[:, None]
        allowed = where_allowed(mod, (np.asarray(b), np.asarray(h), i, np.arange(Tk)), aux)
        by_key = np.stack([allowed.any(axis=0), allowed.all(axis=0)])
        padded = np.zeros((2, columns * Bc), bool)
        padded[:, :Tk] = by_key
        padded[1, Tk:] = True  # behind the last key nothing speaks against a full tile
        some, every = padded.reshape(2, columns, Bc)
        states[b, h, r] = np.where(every.all(axis=1), FULL, np.where(some.any(axis=1), PARTIAL, DEAD))
    return BlockMask(states, (Br, Bc), (Tq, Tk))


def cached_block_mask(key: Mod, make: Callable[[], BlockMask], *where: Any) -> BlockMask:
    """Return the mask that `make` computes, once for each mask function and `where` it stands.

    A function that takes arrays is not remembered: the arrays may be other ones next time.

    Examples
    --------
    >>> mod = as_mod("mask_mod", lambda b, h, i, j: j <= i)
    >>> make = lambda: block_mask(mod.function, 1, 1, 4, 4, block_sizes=(2, 2))
    >>> cached_block_mask(mod, make, 4, 2) is cached_block_mask(mod, make, 4, 2)
    True
    """
    if key.takes_aux:
        return make()
    known = (key, *where)
    if known in _cache:
        _cache.move_to_end(known)
        return _cache[known]
    _cache[known] = found = make()
    if len(_cache) > KEPT:
        _cache.popitem(last=False)
    return found
