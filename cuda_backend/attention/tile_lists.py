"""Lists of the tiles that a block mask leaves, by block of keys: what a kernel walks in the place of a range.

A block mask says of every tile whether it is dead, partial or full.  A backward kernel that owns a block of
keys wants the queries that see them, one behind the other: an entry for each, which says in one word

* from bit `BLOCK_SHIFT` on: which block of queries;
* from bit `MEMBER_SHIFT` on: of which of the `MEMBERS` query heads, at most, that share the key head;
* bit 0: `PARTIAL`, whether scores must be masked one by one.

A record for each block of keys of each key head, in the order in which they are drawn, holds the number of
both, where its entries begin, and how many there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.attention.block_mask import DEAD, FULL, BlockMask
from refimpl.attention.scores import AttentionShape
from refimpl.errors import OptionError, UnsupportedError
from refimpl.numerics import Array

__all__ = [
    "BLOCK_SHIFT", "MEMBERS", "MEMBER_SHIFT", "PARTIAL", "RECORD_BYTES", "Draw", "TileLists", "key_tile_lists"
]  # fmt: skip

PARTIAL, MEMBER_SHIFT, MEMBERS, BLOCK_SHIFT = 1, 1, 128, 8
RECORD_WORDS = 4
RECORD_BYTES = 4 * RECORD_WORDS


class Draw(NamedTuple):
    """How tiles are drawn: blocks side by side, heads whose arrays fit the cache, whether they take turns."""

    processors: int
    section: int
    deterministic: bool


class TileLists(NamedTuple):
    """Tables of int32.

    Attributes
    ----------
    records
        [tiles, 4]: block of keys + blocks * (batch and key head); first entry; entries; 0.
    entries
        One word each.
    turns
        For each entry, how many blocks of keys that are drawn earlier see the same queries.
    """

    records: Array
    entries: Array
    turns: Array


def key_tile_lists(
    mask: BlockMask | None, shape: AttentionShape, sizes: tuple[int, int], draw: Draw
) -> TileLists:
    """Return the lists of a mask whose tiles have `sizes` (queries, keys); without one all tiles are full.

    Tiles that reach behind the last query or key are partial.

    Raises
    ------
    OptionError
        If the mask is of another problem, or of tiles of another size.
    UnsupportedError
        If more query heads share a key head than an entry can tell apart.

    Examples
    --------
    >>> from refimpl.attention.block_mask import block_mask
    >>> mask = block_mask(lambda b, h, i, j: j <= i, 1, 1, 4, 4, block_sizes=(2, 2))
    >>> shape = AttentionShape(B=1, Tq=4, Tk=4, Hq=1, Hkv=1, D=8, Dv=8)
    >>> lists = key_tile_lists(mask, shape, (2, 2), Draw(1, 1, False))
    >>> lists.records[:, :3].tolist(), [(word >> 8, word & 1) for word in lists.entries.tolist()]
    ([[0, 0, 2], [1, 2, 1]], [(0, 1), (1, 0), (1, 1)])
    """
    group, rows, columns = shape.group, -(-shape.Tq // sizes[0]), -(-shape.Tk // sizes[1])
    if group > MEMBERS:
        raise UnsupportedError(f"{group} query heads share a key head; lists of tiles take up to {MEMBERS}")
    states = _states(mask, shape, sizes, (rows, columns))
    if shape.Tq % sizes[0]:
        states[:, :, -1] = np.minimum(states[:, :, -1], 1)
    if shape.Tk % sizes[1]:
        states[:, :, :, -1] = np.minimum(states[:, :, :, -1], 1)
    # [sequences, key heads, their query heads, rows, columns], 1 where all are alike
    sequences, heads = states.shape[:2]
    states = states.reshape(sequences, -1, group if heads > 1 else 1, rows, columns)
    states = np.broadcast_to(states, (*states.shape[:2], group, rows, columns))
    live = states != DEAD
    # Who sees the same queries adds to them in falling order of keys.
    turns = np.cumsum(live[..., ::-1], axis=-1, dtype=np.int32)[..., ::-1] - live
    by_key = live.transpose(0, 1, 4, 2, 3)  # [sequences, key heads, columns, query heads, rows]
    where = np.nonzero(by_key)
    member, row = where[3], where[4]
    at = where[0], where[1], member, row, where[2]
    entries = row << BLOCK_SHIFT | member << MEMBER_SHIFT | np.where(states[at] == FULL, 0, PARTIAL)
    counts = by_key.sum(axis=(3, 4))
    first = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
    every = shape.B, shape.Hkv, columns
    lengths, begins = (np.broadcast_to(x, every).reshape(-1, columns) for x in (counts, first))
    order = _order(lengths, draw)
    records = np.zeros((lengths.size, RECORD_WORDS), np.int32)
    records[:, 0], records[:, 1], records[:, 2] = order, begins.ravel()[order], lengths.ravel()[order]
    return TileLists(records, entries.astype(np.int32), turns[at].astype(np.int32))


def _states(
    mask: BlockMask | None, shape: AttentionShape, sizes: tuple[int, int], tiles: tuple[int, int]
) -> Array:
    """Return a copy of the states of all tiles."""
    if mask is None:
        return np.full((1, 1, *tiles), FULL, np.uint8)
    lengths = shape.Tq, shape.Tk
    if (mask.block_sizes, mask.lengths) != (sizes, lengths):
        raise OptionError(
            f"block_mask: expected tiles of {sizes} for lengths of {lengths}, "
            f"got {mask.block_sizes} for {mask.lengths}"
        )
    if mask.states.shape[0] not in (1, shape.B) or mask.states.shape[1] not in (1, shape.Hq):
        raise OptionError(
            f"block_mask: expected {shape.B} or 1 sequences and {shape.Hq} or 1 heads, "
            f"got {mask.states.shape[:2]}"
        )
    return mask.states.copy()


def _order(lengths: Array, draw: Draw) -> Array:
    """Return the numbers of tiles [heads, columns] in the order in which they are drawn.

    Heads come in sections whose arrays fit the cache, and in a section long tiles come first, so that what is
    left for the end is short.  A tile that is longer than all of its section takes comes first of all.
    Where blocks take turns, nobody may wait for a tile that is drawn after its own: in a section keys fall.
    """
    heads = len(lengths)
    head, column = (axis.ravel() for axis in np.indices(lengths.shape))
    section, length = head // draw.section, lengths.ravel()
    if draw.deterministic:
        return np.lexsort((head, -column, section))
    work = np.bincount(section, length, -(-heads // draw.section))[section]
    late = length * draw.processors <= work
    return np.lexsort((head, column, -length, np.where(late, section, 0), late))
