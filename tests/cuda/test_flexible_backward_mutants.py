"""Mistakes in the Hopper backward kernel with functions of the user's, seen on the played machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cuda import hopper_machine
from tests.cuda.backward_hopper_played import played
from tests.cuda.test_flexible_backward_played import LIMITS, difference

MUTANTS = {
    "partial tiles unmasked": (
        "consumer",
        "if entry_partial(entry) != 0:",
        "if False:",
    ),
    "entry of the other stage": (
        "consumer",
        "copy.load_shared_word(base + entry_places + 8 * stage))",
        "copy.load_shared_word(base + entry_places + 8 * (1 - stage)))",
    ),
    "first head for all": (
        "consumer",
        "copy.load_shared_word(base + entry_places + 8 * stage + 4))",
        "0)",
    ),
    "first sequence for all": (
        "consumer",
        "batch = registers.uniform(copy.load_shared_word(base + tile_slot + BATCH))",
        "batch = 0",
    ),
    "an entry less": (
        "consumer",
        "int32(-registers.uniform(copy.load_shared_word(base + tile_slot + LENGTH)))",
        "int32(1 - registers.uniform(copy.load_shared_word(base + tile_slot + LENGTH)))",
    ),
    "scores not waited for": (
        "consumer",
        "scores_alone(s)",
        "pass",
    ),
    "scores scaled twice": (
        "consumer",
        "weights(s, float32(LOG2_E), own_shifts)",
        "weights(s, scale, own_shifts)",
    ),
    "P not fetched": (
        "consumer",
        "fetch(p, ds_lane + ds_stage * ds_bytes)",
        "pack(p, s)",
    ),
    "dO before it has arrived": (
        "consumer",
        "barrier.wait(base + do_full + 8 * stage, parity)\n                            wgmma.fence()",
        "wgmma.fence()",
    ),
    "mask turned": (
        "mods",
        "int32(first + 8 * (column >> 1) + (column & 1))",
        "int32(first + column)",
    ),
    "keys of the row below": (
        "mods",
        "int32(min(key + 8, int32(tk - 1)))",
        "int32(min(key + 1, int32(tk - 1)))",
    ),
    "low bits for both": (
        "mods",
        "int32(high & bit)",
        "int32(low & bit)",
    ),
    "-inf is changed": (
        "mods",
        "x = registers.select_float(int32(s == float32(MASKED)), s, found)",
        "x = found",
    ),
    "gradient of another score": (
        "mods",
        "pull(float32(1.0), s * factor,",
        "pull(float32(1.0), found,",
    ),
    "no number where masked": (
        "mods",
        "registers.select_float(int32(p > float32(0.0)), p * slope, float32(0.0))",
        "p * slope",
    ),
    "words of P exchanged": (
        "mods",
        "words[2 * half + 1] = pack_pair(p0, p1)",
        "words[2 - half] = pack_pair(p0, p1)",
    ),
    "list of the first tile": (
        "lists",
        "            at = record[1]\n",
        "            at = int32(0)\n",
    ),
    "all entries but one": (
        "lists",
        "int32((state ^ 16) + 32 * record[2])",
        "int32((state ^ 16) + 32 * (record[2] - 1))",
    ),
    "Q of the first head": (
        "lists",
        "head = int32(own_head * group + member)",
        "head = int32(own_head * group)",
    ),
    "sums of the next block": (
        "lists",
        "* blocks + entry_block(entry))",
        "* blocks + entry_block(entry) ^ 1)",
    ),
    "no turns": (
        "lists",
        "while turns.word_seen(word) != mine:",
        "while False:",
    ),
}

# Kind of machine, sizes, functions, whether blocks take turns.
CASES: tuple[tuple[bool, Any, str, bool], ...] = (
    (True, (2, 140, 270, 2, 1, 64, 64), "both", True),
    (False, (1, 200, 200, 2, 1, 128, 128), "alibi", True),
    (True, (1, 70, 70, 1, 1, 64, 64), "far", False),
)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hopper_machine, "PATIENCE", 1.5)
    assert any(seen(monkeypatch, MUTANTS[name], case, seed) for seed in range(2) for case in CASES)


def seen(monkeypatch: pytest.MonkeyPatch, mutant: Any, case: Any, seed: int) -> bool:
    """Return whether one case shows the mistake."""
    late, sizes, functions, deterministic = case
    played(monkeypatch, late=late, processors=4, seed=seed, mutant=mutant)
    try:
        with np.errstate(all="ignore"):
            error = difference("f16", sizes, functions, deterministic=deterministic)
    except Exception:
        return True
    return not error < LIMITS["f16"]


@pytest.mark.parametrize("module", ["consumer", "mods", "lists"])
def test_without_mistakes_nothing_is_seen(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    same = {"consumer": "scores_alone(s)", "mods": "int32(high & bit)", "lists": "bulk.wait_read()"}[module]
    assert not any(seen(monkeypatch, (module, same, same), case, 0) for case in CASES)
