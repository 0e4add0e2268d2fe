"""Words of the dropout as lanes of a Hopper consumer hold them, played, against the reference's Philox."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.attention import dropout_hopper
from refimpl.random import philox4x32
from tests.cuda.backward_hopper_played import mutated
from tests.cuda.hopper_instructions import install
from tests.cuda.hopper_machine import Machine, fragment

SEED, BATCH, HEAD, ROW, KEY = 2**63 + 5, 3, 2, 64, 168


def as_the_reference(module: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the 128 lanes hold the words of their rows and columns, eight columns at once."""
    machine = Machine(late=False)
    install(monkeypatch, machine, [module])
    machine.own.lanes = 128
    thread = np.arange(128, dtype=np.int32)
    row = np.int32(ROW) + 16 * (thread >> 5) + ((thread & 31) >> 2)
    words = module.build_row_words()
    found = np.stack(words(np.uint64(SEED), np.int32(BATCH), np.int32(HEAD), row, np.int32(KEY), thread & 3))
    rows, columns = fragment(8)
    columns = KEY + columns
    drawn = philox4x32(BATCH, HEAD, ROW + rows, columns // 4, SEED)
    return bool((np.take_along_axis(drawn, (columns % 4)[..., None], -1)[..., 0] == found).all())


def test_the_words_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_the_reference(dropout_hopper, monkeypatch)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("int32(query + 8 * odd)", "int32(query + odd)"),
        ("int32((key >> 2) + (quad_lane >> 1))", "int32((key >> 2) + odd)"),
        ("registers.select_word(odd, w0, w2), 1)", "registers.select_word(odd, w2, w0), 1)"),
        ("registers.select_word(odd, w1, w3), 1)", "registers.select_word(odd, w1, w3), 2)"),
        ("registers.select_word(odd, x, w0), registers", "registers.select_word(odd, w0, x), registers"),
        ("registers.select_word(odd, w3, y)", "registers.select_word(odd, y, w3)"),
        ("while step < ROUNDS", "while step < ROUNDS - 1"),
    ],
)
def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch, line: str, instead: str) -> None:
    assert not as_the_reference(mutated("dropout", line, instead), monkeypatch)
