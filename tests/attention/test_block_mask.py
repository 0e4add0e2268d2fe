"""States of tiles: against single scores, cut smaller, once for heads that are alike, refused where wrong."""

from __future__ import annotations

import itertools
import sys
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from refimpl.attention import block_mask, flexible_attention, mods
from refimpl.attention.samples_flexible import MASKS, sample_flexible
from refimpl.errors import OptionError, ShapeError

SHAPE: dict[str, Any] = {"B": 2, "Tq": 11, "Tk": 13, "Hkv": 1, "group": 2, "D": 1, "Dv": 1}
Q, K = np.zeros((2, 11, 2, 1)), np.zeros((2, 13, 1, 1))


def by_hand(mask: Any, aux: Any, sizes: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Ask for one score at a time."""
    asked = (lambda *x: mask(*x, aux)) if mask.__code__.co_argcount == 5 else mask
    Br, Bc = sizes
    found = np.zeros((2, 2, -(-11 // Br), -(-13 // Bc)), np.uint8)
    for b, h, r, c in np.ndindex(found.shape):
        rows, columns = range(r * Br, min(r * Br + Br, 11)), range(c * Bc, min(c * Bc + Bc, 13))
        inside = [bool(asked(b, h, i, j)) for i, j in itertools.product(rows, columns)]
        found[b, h, r, c] = 2 if all(inside) else 1 if any(inside) else 0
    return found


@pytest.mark.parametrize("sizes", [(3, 4), (4, 13), (16, 1)])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
def test_states_are_those_of_single_scores(mask: str, sizes: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.modules["refimpl.attention.block_mask"], "AT_ONCE", 30)  # some tiles at a time
    options = sample_flexible(np.random.default_rng(0), mask=mask, **SHAPE).kwargs
    function, aux = options["mask_mod"], options.get("aux", ())
    found = block_mask(function, 2, 2, 11, 13, block_sizes=sizes, aux=aux)
    expected = by_hand(function, aux, sizes)
    assert np.array_equal(np.broadcast_to(found.states, expected.shape), expected)
    assert np.array_equal(found.live, found.states > 0)
    assert np.array_equal(found.full, found.states == 2)
    single = found.spread().states
    for b, h, i, j in np.ndindex(2, 2, 11, 13):
        state = expected[b, h, i // sizes[0], j // sizes[1]]
        assert single[b % len(single), h % single.shape[1], i, j] == state


def test_heads_that_are_alike_are_asked_once() -> None:
    window = mods.both(mods.causal, mods.either(mods.sliding(2), mods.global_tokens(1)))
    assert block_mask(window, 3, 8, 9, 9).states.shape[:2] == (1, 1)
    assert block_mask(mods.both(window, mods.shifted_groups(2, 8, 8)), 3, 8, 9, 9).states.shape[:2] == (1, 8)
    documents = block_mask(mods.documents(), 3, 8, 9, 9, aux=(np.zeros((3, 9), int),))
    assert documents.states.shape[:2] == (3, 1)


def test_long_masks_are_made_in_seconds_and_little_memory() -> None:
    """16k x 16k scores, of which no more than a few megabytes are kept; about 0.2 s here."""
    tracemalloc.start()
    start = time.perf_counter()
    found = block_mask(
        mods.both(mods.causal, mods.sliding(1024)), 1, 1, 1 << 14, 1 << 14, block_sizes=(128, 128)
    )
    seconds, (_, most) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.states.sum() > 0
    assert seconds < 20
    assert most < 1 << 26


def test_a_function_made_anew_is_no_other_function() -> None:
    tiles = block_mask(mods.sliding(3), 2, 2, 11, 13, block_sizes=(4, 4))
    found = flexible_attention(Q, K, K, mask_mod=mods.sliding(3), block_mask=tiles)
    assert np.array_equal(found, flexible_attention(Q, K, K, block_mask=tiles))


def test_what_is_refused() -> None:
    tiles = block_mask(mods.causal, 2, 2, 11, 13, block_sizes=(4, 4))
    with pytest.raises(ShapeError, match=r"states of 2 sequences, 2 heads and \(11, 12\) scores"):
        flexible_attention(Q, K[:, :12], K[:, :12], block_mask=tiles)
    with pytest.raises(OptionError, match="another function"):
        flexible_attention(Q, K, K, mask_mod=mods.sliding(1), block_mask=tiles)
    with pytest.raises(OptionError, match="knows no function"):
        flexible_attention(Q, K, K, block_mask=tiles.__class__(tiles.states, (4, 4), (11, 13)))
    with pytest.raises(OptionError, match="divisors"):
        tiles.spread((3, 4))
    with pytest.raises(OptionError, match="block_sizes"):
        block_mask(mods.causal, 1, 1, 4, 4, block_sizes=(0, 4))
