"""The kernel that asks a mask for its bits, in the simulator, against a walk through registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import view
from cuda_backend.attention.mask_words import mask_words
from cuda_backend.attention.user_device import Mods
from refimpl.attention import mods
from refimpl.attention.user_functions import as_mod
from tests.cuda.flexible_hopper_played import words_of

pytestmark = pytest.mark.cudasim

LENGTH = 300  # ragged for every tile


@pytest.mark.parametrize("block_n", [64, 80, 128])
@pytest.mark.parametrize("arrays", [False, True])
def test_bits_lie_as_threads_hold_scores(block_n: int, arrays: bool) -> None:
    numbers = np.sort(np.random.default_rng(0).integers(0, 3, (2, LENGTH)), axis=1).astype(np.int32)
    aux: tuple[Any, ...] = (numbers,) if arrays else ()
    mask = as_mod("mask_mod", mods.documents() if arrays else mods.sliding(40))
    last = LENGTH // block_n
    partial = np.array([[0, 0, 4, last], [1, 0, 1, 64 // block_n], [0, 1, 4, last]], np.int32)
    given = Mods(mask, aux=tuple((x.dtype.name, x.ndim) for x in aux))
    views = tuple(view("aux", x, 0) for x in aux)
    found = mask_words(given, views, view("partial", partial, 0), (LENGTH, LENGTH), block_n, 0)
    bits = np.asarray(found.owner)
    assert np.array_equal(bits, words_of(mask, partial, LENGTH, LENGTH, block_n, aux))
    assert not bits[0].any(), "nothing"
    assert bits[1].any()
    assert bits[2].any()
