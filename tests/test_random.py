"""Philox4x32-10 against the known answers of the Random123 distribution, and the dropout made from it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import DTypeError, OptionError
from refimpl.random import as_seed, drop_threshold, dropout_keep, philox4x32
from tests.oracles.attention import philox_word

ONES = 0xFFFFFFFF
# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert tuple(philox4x32(*counter, seed=key[0] | key[1] << 32)) == words


@given(seed=st.integers(0, 2**64 - 1), b=st.integers(0, 9), h=st.integers(0, 9), start=st.integers(0, 99))
def test_tiles_agree_with_single_words(seed: int, b: int, h: int, start: int) -> None:
    rows, columns = np.array([start, start + 7]), np.arange(start, start + 6)
    kept = dropout_keep(seed, 0.3, b, h, rows, columns)
    for i, j in np.ndindex(kept.shape):
        word = philox_word(b, h, int(rows[i]), int(columns[j]), seed)
        assert kept[i, j] == (word >= drop_threshold(0.3))


def test_leading_indices_broadcast() -> None:
    b, h = np.arange(2)[:, None], np.arange(3)[None, :]
    whole = dropout_keep(5, 0.5, b, h, np.arange(4), np.arange(9))
    assert whole.shape == (2, 3, 4, 9)
    np.testing.assert_array_equal(whole[1, 2], dropout_keep(5, 0.5, 1, 2, np.arange(4), np.arange(9)))


def test_the_share_of_dropped_entries_is_p() -> None:
    kept = dropout_keep(2024, 0.1, np.arange(4), 0, np.arange(100), np.arange(250))
    assert scipy.stats.binomtest(int((~kept).sum()), kept.size, 0.1).pvalue > 1e-6


def test_words_are_uniform() -> None:
    words = philox4x32(np.arange(20_000), 1, 2, 3, seed=7).ravel()
    counts = np.bincount(words >> np.uint32(28), minlength=16)
    assert scipy.stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (0.5, 2**31), (2.0**-32, 1), (1e-12, 1)])
def test_threshold_rounds_up(p: float, threshold: int) -> None:
    assert drop_threshold(p) == threshold


@pytest.mark.parametrize("bad", [-1, 2**64])
def test_seeds_out_of_range(bad: int) -> None:
    with pytest.raises(OptionError, match="seed in"):
        as_seed(bad)


@pytest.mark.parametrize("bad", ["7", 1.5, True])
def test_seeds_of_a_wrong_type(bad: object) -> None:
    with pytest.raises(DTypeError, match="rng: expected"):
        as_seed(bad)  # type: ignore[arg-type]


def test_generators_give_seeds() -> None:
    assert as_seed(np.random.default_rng(3)) == as_seed(np.random.default_rng(3))
    assert as_seed(None) != as_seed(None)
