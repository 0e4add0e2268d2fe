"""Mistakes in the Hopper backward kernel with functions of the user's, seen on the played machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cuda import hopper_machine
from tests.cuda.backward_hopper_played import played
from tests.cuda.test_flexible_backward_played import LIMITS, difference

# Module, what stands there, what instead, and the case that shows it, whoever of the threads is first.
MUTANTS = {
    "partial tiles unmasked": (
        "consumer",
        "if entry_partial(entry) != 0:",
        "if False:",
        "alibi",
    ),
    "entry of the other stage": (
        "consumer",
        "copy.load_warp_word(base + entry_places + 8 * stage, lane)",
        "copy.load_warp_word(base + entry_places + 8 * (1 - stage), lane)",
        "far",
    ),
    "first head for all": (
        "consumer",
        "copy.load_warp_word(base + entry_places + 8 * stage + 4, lane)",
        "0",
        "alibi",
    ),
    "first sequence for all": (
        "consumer",
        "batch = copy.load_warp_word(base + tile_slot + BATCH, lane)",
        "batch = 0",
        "both",
    ),
    "an entry less": (
        "consumer",
        "int32(-copy.load_warp_word(base + tile_slot + LENGTH, lane))",
        "int32(1 - copy.load_warp_word(base + tile_slot + LENGTH, lane))",
        "far",
    ),
    "scores not waited for": (
        "consumer",
        "scores_alone(s)",
        "pass",
        "far",
    ),
    "scores scaled twice": (
        "consumer",
        "weights(s, float32(LOG2_E), own_shifts)",
        "weights(s, scale, own_shifts)",
        "alibi",
    ),
    "P not fetched": (
        "consumer",
        "fetch(p, ds_lane + ds_stage * ds_bytes)",
        "pack(p, s)",
        "far",
    ),
    "dO before it has arrived": (
        "consumer",
        "barrier.wait(base + do_full + 8 * stage, parity)\n                            wgmma.fence()",
        "wgmma.fence()",
        "far",
    ),
    "mask turned": (
        "mods",
        "int32(first + 8 * (column >> 1) + (column & 1))",
        "int32(first + column)",
        "alibi",
    ),
    "keys of the row below": (
        "mods",
        "int32(min(key + 8, int32(tk - 1)))",
        "int32(min(key + 1, int32(tk - 1)))",
        "alibi",
    ),
    "low bits for both": (
        "mods",
        "int32(high & bit)",
        "int32(low & bit)",
        "alibi",
    ),
    "-inf is changed": (
        "mods",
        "x = registers.select_float(int32(s == float32(MASKED)), s, found)",
        "x = found",
        "both",
    ),
    "gradient of another score": (
        "mods",
        "pull(float32(1.0), s * factor,",
        "pull(float32(1.0), found,",
        "both",
    ),
    "no number where masked": (
        "mods",
        "registers.select_float(int32(p > float32(0.0)), p * slope, float32(0.0))",
        "p * slope",
        "far",
    ),
    "words of P exchanged": (
        "mods",
        "words[2 * half + 1] = pack_pair(p0, p1)",
        "words[2 - half] = pack_pair(p0, p1)",
        "far",
    ),
    "list of the first tile": (
        "lists",
        "            at = record[1]\n",
        "            at = int32(0)\n",
        "alibi",
    ),
    "all entries but one": (
        "lists",
        "int32((state ^ 16) + 32 * record[2])",
        "int32((state ^ 16) + 32 * (record[2] - 1))",
        "far",
    ),
    "Q of the first head": (
        "lists",
        "head = int32(own_head * group + member)",
        "head = int32(own_head * group)",
        "alibi",
    ),
    "entry of the stage before": (
        "stages",
        "base + entry_places + 8 * stage, entry)",
        "base + entry_places + 8 * (1 - stage), entry)",
        "far",
    ),
    "head of the stage before": (
        "stages",
        "base + entry_places + 8 * stage + 4, head)",
        "base + entry_places + 8 * (1 - stage) + 4, head)",
        "alibi",
    ),
    "sums of the next block": (
        "lists",
        "* blocks + entry_block(entry))",
        "* blocks + entry_block(entry) ^ 1)",
        "both",
    ),
}

# By functions: whether things happen late, sizes, whether blocks take turns.
CASES: dict[str, tuple[bool, Any, bool]] = {
    "both": (True, (2, 70, 140, 2, 1, 64, 64), True),
    "alibi": (False, (1, 140, 140, 2, 1, 128, 128), True),
    "far": (True, (1, 70, 70, 1, 1, 64, 64), False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hopper_machine, "PATIENCE", 3.0)
    *mutant, functions = MUTANTS[name]
    assert seen(monkeypatch, mutant, functions)


def seen(monkeypatch: pytest.MonkeyPatch, mutant: Any, functions: str) -> bool:
    """Return whether a case shows the mistake."""
    late, sizes, deterministic = CASES[functions]
    played(monkeypatch, late=late, processors=4, mutant=mutant)
    try:
        with np.errstate(all="ignore"):
            error = difference("f16", sizes, functions, deterministic=deterministic)
    except Exception:
        return True
    return not error < LIMITS["f16"]


SOUND = {
    "consumer": "scores_alone(s)",
    "mods": "int32(high & bit)",
    "lists": "state = int32(state - 32)",
    "stages": "bulk.wait_added()",
}


@pytest.mark.parametrize("module", SOUND)
def test_without_mistakes_nothing_is_seen(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    same = SOUND[module]
    assert not any(seen(monkeypatch, (module, same, same), functions) for functions in CASES)
