"""Lists of tiles by block of keys, against a walk through the mask tile by tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.attention.tile_lists import Draw, TileLists, key_tile_lists
from refimpl.attention.block_mask import FULL, BlockMask
from refimpl.attention.scores import AttentionShape
from refimpl.errors import OptionError, UnsupportedError

SIZES = 64, 128


def mask_of(shape: AttentionShape, sequences: int, heads: int, seed: int) -> BlockMask:
    tiles = sequences, heads, -(-shape.Tq // SIZES[0]), -(-shape.Tk // SIZES[1])
    states = np.random.default_rng(seed).choice(3, tiles, p=(0.5, 0.2, 0.3)).astype(np.uint8)
    return BlockMask(states, SIZES, (shape.Tq, shape.Tk))


def walked(lists: TileLists, shape: AttentionShape) -> list[tuple[int, int, int, int, int, int]]:
    """Return batch, head, block of queries, block of keys, partial and turn, in the order of drawing."""
    columns, found = -(-shape.Tk // SIZES[1]), []
    for number, first, count, _ in lists.records.tolist():
        head, column = divmod(number, columns)
        batch, kv_head = divmod(head, shape.Hkv)
        for at in range(first, first + count):
            entry = int(lists.entries[at])
            member, block = entry >> 1 & 127, entry >> 8
            turn = int(lists.turns[at])
            found.append((batch, kv_head * shape.group + member, block, column, entry & 1, turn))
    return found


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("sequences", "heads"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_lists_have_every_live_tile_once(sequences: int, heads: int, deterministic: bool) -> None:
    shape = AttentionShape(B=2, Tq=300, Tk=700, Hq=4, Hkv=2, D=8, Dv=8)
    mask = mask_of(shape, sequences, heads, 1)
    lists = key_tile_lists(mask, shape, SIZES, Draw(3, 2, deterministic))
    assert sorted(lists.records[:, 0].tolist()) == list(range(2 * 2 * 6))
    states = np.broadcast_to(mask.states, (2, 4, *mask.states.shape[2:]))
    rows, columns = states.shape[2:]
    expected = {
        (b, h, r, c): int(states[b, h, r, c] != FULL or r == rows - 1 or c == columns - 1)
        for b, h, r, c in np.ndindex(states.shape)
        if states[b, h, r, c]
    }
    found = walked(lists, shape)
    assert {entry[:4]: entry[4] for entry in found} == expected
    assert len(found) == len(expected)
    if deterministic:
        counts: dict[Any, int] = {}
        for *tile, _, turn in found:
            assert turn == counts.get(tuple(tile[:3]), 0), "nobody waits for who comes later"
            counts[tuple(tile[:3])] = turn + 1


def test_a_tile_that_is_longer_than_the_rest_comes_first() -> None:
    """One block of keys is seen by all queries: it must not be what is left for the end."""
    shape = AttentionShape(B=1, Tq=64 * 40, Tk=128 * 20, Hq=6, Hkv=6, D=8, Dv=8)
    states = np.zeros((1, 1, 40, 20), np.uint8)
    states[:, :, :, 7], states[:, :, 3] = 1, 1
    mask = BlockMask(states, SIZES, (shape.Tq, shape.Tk))
    lengths = key_tile_lists(mask, shape, SIZES, Draw(16, 1, False)).records[:, 2].tolist()
    assert lengths == [40] * 6 + [1] * 114
    by_section = key_tile_lists(mask, shape, SIZES, Draw(1, 1, False)).records
    assert by_section[::20, 2].tolist() == [40] * 6, "where no block waits, heads stay together"


def test_without_a_mask_all_tiles_are_full() -> None:
    shape = AttentionShape(B=1, Tq=128, Tk=256, Hq=1, Hkv=1, D=8, Dv=8)
    lists = key_tile_lists(None, shape, SIZES, Draw(1, 1, False))
    assert [entry[2:5] for entry in walked(lists, shape)] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]


def test_what_is_refused() -> None:
    shape = AttentionShape(B=1, Tq=128, Tk=256, Hq=1, Hkv=1, D=8, Dv=8)
    mask = mask_of(shape, 1, 1, 0)
    with pytest.raises(OptionError, match="expected tiles of"):
        key_tile_lists(mask, shape, (128, 128), Draw(1, 1, False))
    with pytest.raises(OptionError, match="expected 1 or 1 sequences"):
        key_tile_lists(mask_of(shape, 2, 1, 0), shape, SIZES, Draw(1, 1, False))
    with pytest.raises(UnsupportedError, match="129 query heads"):
        key_tile_lists(mask, shape._replace(Hq=129), SIZES, Draw(1, 1, False))
