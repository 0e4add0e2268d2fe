"""A mask that a block mask's tiles have the last word over, for kernels whose own tiles are others.

A tile of a kernel that lies in several of the block mask's, or reaches behind the last query or key, asks the
mask function for each score.  The function alone would answer for tiles that are dead or full, too, whatever
it says there; so what is asked looks into the states first.  They travel behind the arrays of the user's
functions, which do not see them.
"""

from __future__ import annotations

import functools
from typing import Any

from cuda_backend.arrays import Layout, View, broadcast
from cuda_backend.attention.tile_states import states_on_device
from cuda_backend.attention.user_device import Mods
from refimpl.attention.block_mask import FULL, PARTIAL, BlockMask
from refimpl.attention.user_functions import Mod, as_mod

__all__ = ["divides", "ruled", "ruled_functions"]


def divides(given: BlockMask, sizes: tuple[int, int]) -> bool:
    """Return whether no tile of `sizes` asks a mask for scores of another tile than a partial one.

    >>> import numpy as np
    >>> given = BlockMask(np.ones((1, 1, 2, 3), np.uint8), (128, 128), (256, 384))
    >>> divides(given, (64, 128)), divides(given, (64, 80)), divides(given, (256, 128))
    (True, False, False)
    """
    axes = zip(given.block_sizes, sizes, given.lengths, strict=True)
    return all((own % size == 0 or own >= length) and length % size == 0 for own, size, length in axes)


def ruled(
    mods: Mods, arrays: tuple[View, ...], given: BlockMask, q: Layout, on: int
) -> tuple[Mods, tuple[View, ...]]:
    """Return functions of which the mask obeys the states of tiles, and their arrays.

    Parameters
    ----------
    mods, arrays
        The functions of a call, a mask among them, and their arrays.
    given : BlockMask
        Whose tiles have the last word.
    q : Layout
        Of the queries.
    on : int
        The stream.
    """
    states = states_on_device(given, on)
    B, _, Hq, _ = q[0]
    return ruled_functions(mods, given.block_sizes), (*arrays, broadcast(states, (B, Hq, *states.shape[2:])))


def ruled_functions(mods: Mods, block_sizes: tuple[int, int]) -> Mods:
    """Return functions of which the mask obeys states of tiles of `block_sizes`, the last array."""
    mask: Any = mods.mask
    return Mods(
        _obedient(mask, block_sizes),
        mods.score and _blind(mods.score, "score_mod"),
        mods.vjp and _blind(mods.vjp, "score_mod_vjp"),
        (*mods.aux, ("uint8", 4)),
    )


@functools.lru_cache(maxsize=256)
def _obedient(mask: Mod, sizes: tuple[int, int]) -> Mod:
    """Return the mask where a tile is partial; the last array is the states."""
    (rows, columns), asked = sizes, _blind(mask, "mask_mod").function
    if not mask.takes_aux:

        def alone(b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
            state = aux[-1][b, h, i // rows, j // columns]
            return (state == FULL) | ((state == PARTIAL) & asked(b, h, i, j))

        return as_mod("mask_mod", alone)

    def obedient(b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        state = aux[-1][b, h, i // rows, j // columns]
        return (state == FULL) | ((state == PARTIAL) & asked(b, h, i, j, aux))

    return as_mod("mask_mod", obedient)


@functools.lru_cache(maxsize=256)
def _blind(mod: Mod, name: str) -> Mod:
    """Return a function that hands on all arrays but the last."""
    f: Any = mod.function
    if not mod.takes_aux:
        return mod
    if name == "mask_mod":
        return as_mod(name, lambda b, h, i, j, aux: f(b, h, i, j, aux[:-1]))
    if name == "score_mod":
        return as_mod(name, lambda s, b, h, i, j, aux: f(s, b, h, i, j, aux[:-1]), ("score",))
    return as_mod(name, lambda d, s, b, h, i, j, aux: f(d, s, b, h, i, j, aux[:-1]), ("gradient", "score"))
