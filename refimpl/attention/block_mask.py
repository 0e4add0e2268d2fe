"""Which tiles of the score matrix a mask function leaves: dead ones are skipped, full ones need no mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.attention.user_functions import Aux, Mod, as_mod, where_allowed
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import Array, BoolArray
from refimpl.validation import whole

__all__ = ["DEAD", "FULL", "PARTIAL", "BlockMask", "block_mask", "checked_block_mask"]

DEAD, PARTIAL, FULL = 0, 1, 2
AT_ONCE = 1 << 20  # scores evaluated together: few enough that an array of them stays in a cache


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The state of each tile: `DEAD`, `PARTIAL` or `FULL`.

    Attributes
    ----------
    states : ndarray of uint8, shape (B or 1, Hq or 1, ceil(Tq / Br), ceil(Tk / Bc))
        1 along an axis for all sequences or heads alike.  Read-only: kernels remember what they made of them.
    block_sizes : tuple of int
        (Br, Bc).
    lengths : tuple of int
        (Tq, Tk).
    mod : Mod, optional
        The mask function, which speaks in partial tiles.
    """

    states: Array
    block_sizes: tuple[int, int]
    lengths: tuple[int, int]
    mod: Mod | None = None

    def __post_init__(self) -> None:
        """Keep a view that nobody writes to."""
        states = np.asarray(self.states).view()
        states.flags.writeable = False
        object.__setattr__(self, "states", states)

    @property
    def live(self) -> BoolArray:
        """Where a tile has a score to compute, in the shape of `states`."""
        return np.not_equal(self.states, DEAD)

    @property
    def full(self) -> BoolArray:
        """Where a tile needs no mask, in the shape of `states`."""
        return np.equal(self.states, FULL)

    @property
    def density(self) -> float:
        """Share of tiles that are not dead: of the products that a kernel computes."""
        return float(np.mean(self.live)) if self.states.size else 0.0

    def spread(self, block_sizes: tuple[int, int] = (1, 1)) -> BlockMask:
        """Return the same states for smaller tiles, which divide these; of one score each by default.

        Raises
        ------
        OptionError
            If the smaller tiles do not divide these.

        Examples
        --------
        >>> block_mask(lambda b, h, i, j: j < 2, 1, 1, 1, 5, block_sizes=(4, 4)).spread((4, 2)).states
        array([[[[1, 1, 0]]]], dtype=uint8)
        """
        states = self.states
        for axis, (own, smaller, length) in enumerate(
            zip(self.block_sizes, block_sizes, self.lengths, strict=True), 2
        ):
            if own % smaller:
                raise OptionError(f"block_sizes: expected divisors of {self.block_sizes}, got {block_sizes}")
            states = np.repeat(states, own // smaller, axis).take(np.arange(-(-length // smaller)), axis)
        return BlockMask(states, block_sizes, self.lengths, self.mod)


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
    """Return the states of the tiles of `mask_mod`, evaluated once for every score, some tiles at a time.

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
        If `mask_mod` is no such function, or a size is no whole number, negative, or a block size below 1.

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
    Br, Bc = _sizes(block_sizes)
    for name, size in zip(("B", "Hq", "Tq", "Tk"), (B, Hq, Tq, Tk), strict=True):
        whole(name, size, 0)
    sequences, heads = (B if mod.by_sequence else min(B, 1)), (Hq if mod.by_head else min(Hq, 1))
    states = np.zeros((sequences, heads, -(-Tq // Br), -(-Tk // Bc)), np.uint8)
    step = max(1, AT_ONCE // (Br * Bc))
    for b, h, r in np.ndindex(states.shape[:3]):
        i = np.arange(r * Br, min((r + 1) * Br, Tq))[:, None]
        for c in range(0, states.shape[3], step):
            j = np.arange(c * Bc, min((c + step) * Bc, Tk))
            allowed = where_allowed(mod, (np.asarray(b), np.asarray(h), i, j), aux)
            edges = np.arange(0, j.size, Bc)
            some = np.logical_or.reduceat(allowed.any(axis=0), edges)
            every = np.logical_and.reduceat(allowed.all(axis=0), edges)
            states[b, h, r, c : c + step] = np.where(every, FULL, np.where(some, PARTIAL, DEAD))
    return BlockMask(states, (Br, Bc), (Tq, Tk), mod)


def _sizes(given: Any) -> tuple[int, int]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise OptionError(f"block_sizes: expected two, of queries and keys, got {given!r}")
    return whole("block_sizes", given[0]), whole("block_sizes", given[1])


def checked_block_mask(given: BlockMask, mask: Mod | None, B: int, Hq: int, Tq: int, Tk: int) -> Mod:
    """Return the mask function of a call with these states of tiles, its own or theirs.

    Raises
    ------
    ShapeError
        If the states are of other lengths, or of another number of sequences or heads.
    OptionError
        If there is no function, or another one than that of the states.
    DTypeError
        If `given` is no `BlockMask`.
    """
    if not isinstance(given, BlockMask):
        raise DTypeError(f"block_mask: expected a BlockMask, see `block_mask`; got {type(given).__name__}")
    tiles = tuple(-(-n // size) for n, size in zip((Tq, Tk), given.block_sizes, strict=True))
    sequences, heads, *found = given.states.shape
    if given.lengths != (Tq, Tk) or tuple(found) != tiles or sequences not in (1, B) or heads not in (1, Hq):
        raise ShapeError(
            f"block_mask: expected states of {B} sequences, {Hq} heads and {(Tq, Tk)} scores, "
            f"got shape {given.states.shape} for {given.lengths}"
        )
    mod = mask or given.mod
    if mod is None:
        raise OptionError("mask_mod: needed beside a block_mask that knows no function")
    if given.mod is not None and mod != given.mod:
        raise OptionError("block_mask: made of another function than mask_mod")
    return mod
