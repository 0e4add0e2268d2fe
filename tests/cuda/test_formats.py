"""float16 and bfloat16 by bits, against NumPy and ml_dtypes; Philox on the device against refimpl."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_backend.formats import narrow, widen
from cuda_backend.random import dropout_keeps, philox_word
from refimpl.random import drop_threshold, dropout_keep, philox4x32

pytestmark = [pytest.mark.cudasim, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

NUMPY = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def python(function: Any) -> Any:
    """Return the Python function behind a device function."""
    return function.py_func


@pytest.mark.parametrize("kind", sorted(NUMPY))
def test_every_number_widens_exactly(kind: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    to_float = python(widen(kind))
    found = np.array([to_float(x) for x in bits], np.float32)
    expected = bits.view(NUMPY[kind]).astype(np.float32)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("kind", sorted(NUMPY))
def test_narrowing_rounds_to_nearest_even(kind: str) -> None:
    """At every number of the format, halfway to the next, and one float32 on either side of halfway."""
    numbers = np.arange(0, 2**15, 7, dtype=np.uint16).view(NUMPY[kind]).astype(np.float32)
    following = (
        np.arange(1, 2**15 + 1, 7, dtype=np.uint16)[: numbers.size].view(NUMPY[kind]).astype(np.float32)
    )
    with np.errstate(all="ignore"):
        halfway = numbers / 2 + following / 2
        x = np.concatenate([numbers, halfway, np.nextafter(halfway, 0), np.nextafter(halfway, np.inf)])
        x = np.concatenate([x, -x, np.float32([0, 65519.99, 65520, 3.4e38, np.inf, np.nan, 1e-8, 6e-8])])
        expected = x.astype(NUMPY[kind])
    x = x.astype(np.float32)
    to_bits = python(narrow(kind))
    found = np.array([to_bits(value) for value in x], np.uint16).view(NUMPY[kind])
    same = (found.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), x[~same][:5]


WORDS = st.integers(0, 2**32 - 1)


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), seed=st.integers(0, 2**64 - 1))
def test_philox_words(counter: tuple[int, int, int, int], seed: int) -> None:
    found = [int(python(philox_word)(*counter, np.uint64(seed), word)) for word in range(4)]
    assert found == philox4x32(*counter, seed=seed).tolist()


def test_philox_known_answer() -> None:
    """Random123, kat_vectors: counter and key of digits of pi."""
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    seed = np.uint64(0x299F31D0A4093822)
    words = [int(python(philox_word)(*counter, seed, word)) for word in range(4)]
    assert [f"{word:08x}" for word in words] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_dropout_is_that_of_the_reference() -> None:
    threshold = np.uint64(drop_threshold(0.3))
    found = [[python(dropout_keeps)(7, threshold, 1, 2, i, j) for j in range(9)] for i in range(3)]
    assert np.array_equal(found, dropout_keep(7, 0.3, 1, 2, np.arange(3), np.arange(9)))
