"""Lists of the key tiles that are left, for the Hopper kernels: made of the states of tiles, by NumPy.

A warpgroup has 64 query rows, so states are those of tiles of 64 rows; a block takes the tiles that any of
its warpgroups needs, and each warpgroup knows whether it may see all of a tile, and if not, where the bits
lie that say what it may see (`mask_words`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.block_mask import DEAD, FULL, PARTIAL, BlockMask
from refimpl.numerics import Array

__all__ = ["ALL", "NOTHING", "ROWS", "STEP_BYTES", "KeyLists", "key_lists", "live_tiles", "resized"]

ROWS = 64  # of a warpgroup
STEP_BYTES = 16  # of a step: its key tile, then what each of up to three warpgroups may see of it
ALL, NOTHING = -1, 0  # of a tile; other numbers are those of a row of `partial`


class KeyLists(NamedTuple):
    """What a producer walks along.

    Attributes
    ----------
    work : ndarray of int32, shape (tiles, 4)
        For each tile of query rows, in the order in which blocks draw them: row block; batch and head in one
        number; where its list starts in `steps`; how long that is.
    steps : ndarray of int32, shape (steps + 1, 4)
        Key tile; for each warpgroup `ALL`, `NOTHING` or a row of `partial`.
    partial : ndarray of int32, shape (1 + tiles, 4)
        Sequence, head, 64 rows and key tile that need a mask; the first row stands for `NOTHING`.
    """

    work: Array
    steps: Array
    partial: Array


def resized(given: BlockMask, sizes: tuple[int, int]) -> Array:
    """Return the states of tiles of `sizes`, any, that those of a block mask imply.

    A tile that lies in one of the mask's has its state; one in several has theirs, if they are alike.

    Examples
    --------
    >>> given = BlockMask(np.array([[[[2, 1, 0, 0], [2, 0, 0, 0]]]], np.uint8), (32, 64), (64, 256))
    >>> resized(given, (64, 128))
    array([[[[1, 0]]]], dtype=uint8)
    >>> resized(given, (16, 80))[0, 0, ::2]
    array([[1, 1, 0, 0],
           [1, 0, 0, 0]], dtype=uint8)
    """
    states = given.states
    for axis, (own, wanted, length) in enumerate(
        zip(given.block_sizes, sizes, given.lengths, strict=True), 2
    ):
        starts = np.arange(0, length, wanted)
        ends = np.minimum(starts + wanted, length)
        if not starts.size or own == wanted:
            continue
        edges = np.stack([starts // own, -(-ends // own)], 1).ravel()
        padded = np.concatenate([states, states.take([0], axis)], axis)  # reduceat takes no end behind all
        every = np.arange(0, edges.size, 2)
        least, most = (f.reduceat(padded, edges, axis).take(every, axis) for f in (np.minimum, np.maximum))
        states = np.where(least == most, least, PARTIAL).astype(np.uint8)
    return states


def live_tiles(states: Array, consumers: int) -> Array:
    """Return where any of `consumers` warpgroups needs a tile: bool [b, h, row blocks, key tiles].

    >>> live_tiles(np.array([[[[1, 0], [2, 0], [0, 2]]]]), 2).tolist()
    [[[[True, False], [False, True]]]]
    """
    return np.logical_or.reduceat(states != DEAD, np.arange(0, states.shape[2], consumers), axis=2)


def key_lists(states: Array, consumers: int, B: int, Hq: int, section: int, *, ragged: bool) -> KeyLists:
    """Return the lists of a call.

    Parameters
    ----------
    states : ndarray of uint8, shape (B or 1, Hq or 1, ceil(Tq / 64), key tiles)
        `DEAD`, `PARTIAL` or `FULL`.
    consumers : int
        Warpgroups of a block.
    B, Hq : int
        Sequences and query heads.
    section : int
        Heads to work on together, so that their keys stay in L2; within a section the longest lists come
        first, so that what is left for the end is short.
    ragged : bool
        Whether the last key tile has places behind the last key, which every warpgroup has to mask.

    Notes
    -----
    Lists go from the last key tile to the first, as the dense kernel does.

    Examples
    --------
    >>> states = np.array([[[[2, 0], [2, 1]], [[0, 0], [0, 2]]]], np.uint8)
    >>> work, steps, partial = key_lists(states, 1, 1, 2, 1, ragged=False)
    >>> work.tolist()
    [[1, 0, 1, 2], [0, 0, 0, 1], [1, 1, 3, 1], [0, 1, 3, 0]]
    >>> steps[:-1, :2].tolist(), partial[1:].tolist()
    ([[0, -1], [1, 1], [0, -1], [1, -1]], [[0, 0, 1, 1]])
    """
    live = live_tiles(states, consumers)
    b, h, blocks, columns = live.shape
    seen = states != DEAD
    some = seen & (states != FULL)
    if ragged:
        some[..., -1] = seen[..., -1]
    known = np.full((b, h, blocks * consumers, columns), NOTHING, np.int32)
    known[:, :, : states.shape[2]][seen] = ALL
    rows = np.argwhere(some).astype(np.int32)
    known[:, :, : states.shape[2]][some] = np.arange(1, len(rows) + 1)
    backwards = live[..., ::-1]
    known = known.reshape(b, h, blocks, consumers, columns)[..., ::-1].swapaxes(3, 4)
    steps = np.full((np.count_nonzero(backwards) + 1, STEP_BYTES // 4), NOTHING, np.int32)
    steps[:-1, 0] = columns - 1 - np.nonzero(backwards)[3]
    steps[:-1, 1 : 1 + consumers] = known[backwards]
    partial = np.concatenate([np.zeros((1, 4), np.int32), rows])
    counts = backwards.sum(-1, dtype=np.int64)
    starts = (np.cumsum(counts.ravel()) - counts.ravel()).reshape(counts.shape)

    full = (B, Hq, blocks)
    counts, starts = (np.broadcast_to(x, full).reshape(B * Hq, blocks) for x in (counts, starts))
    head, block = np.divmod(np.arange(B * Hq * blocks), blocks)
    # Row blocks of equal length stay in order, and heads beside each other.
    order = np.lexsort((head, block, -counts.ravel(), head // section))
    found: Any = np.stack([block, head, starts.ravel(), counts.ravel()], 1)[order]
    return KeyLists(np.ascontiguousarray(found, np.int32), steps, partial)
