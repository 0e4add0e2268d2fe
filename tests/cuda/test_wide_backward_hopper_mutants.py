"""Mistakes in the Hopper backward kernel for wide heads: the played machine sees each.

It plays a warpgroup as one, so what its warps wait for among themselves (dS) it cannot miss; nor what both
consumers wait for, of which one is earlier (dO of dV, Q of dK); nor, but by luck, that dO stays until it is
multiplied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.attention.variant_wide_backward_hopper import choose_wide_backward
from tests.cuda import hopper_machine
from tests.cuda.backward_hopper_played import played
from tests.cuda.test_backward_hopper_played import LIMITS, difference

V, K, X, S = "values", "keys", "exchange", "wide"
MUTANTS = {
    "K before it has arrived": (V, "barrier.wait(base + k_full, kv_parity)", "tile = 0"),
    "Q before it has arrived": (V, "barrier.wait(base + q_full + 8 * stage, parity)", "pass"),
    "scores not waited for": (V, "scores_done(s)", "pass"),
    "dS not waited for": (V, "barrier.take_turn(DS_TURN)", "pass"),
    "P is not given": (V, "barrier.give_turn(P_TURN)", "pass"),
    "first columns of dQ not waited for": (V, "queries_done(dq)", "pass"),
    "Q released before its shifts are read": (
        V,
        "scores_done(s)",
        "scores_done(s)\n                    barrier.arrive_warp(base + q_empty + 8 * stage, lane)",
    ),
    "mask off by one": (V, "mask(s, first_low - shift,", "mask(s, first_low - shift + 1,"),
    "mask of the other row": (V, "first_high - shift)", "first_low - shift)"),
    "mask left out too early": (V, "if row < seeing:", "if row < seeing - 64:"),
    "keys of padding count": (V, "int32(key >= tk), NONE", "int32(key > tk + 500), NONE"),
    "dropped weights kept for dV": (V, "keep(s, kept)", "pass"),
    "dropout of the first head": (
        V,
        "(kv_head - batch * heads) * group + member)",
        "(kv_head - batch * heads) * group)",
    ),
    "first columns of dQ in order": (V, "* blocks + block)", "* blocks + step)"),
    "last columns of dQ in order": (K, "* blocks + block)", "* blocks + step)"),
    "turns of the first columns in order": (V, "turn(key_block, step, block, sizes)", "key_block"),
    "V before it has arrived": (K, "barrier.wait(base + v_full, kv_parity)", "pass"),
    "dO before it has arrived": (K, "barrier.wait(base + do_full + 8 * stage, parity)", "pass"),
    "dP not waited for": (K, "dp_done(dp)", "pass"),
    "P before it is there": (K, "barrier.take_turn(P_TURN)", "pass"),
    "parity of dS": (K, "step_parity = int32(step_parity ^ 1)", "pass"),
    "dS not published": (K, "barrier.publish_stores()", "pass"),
    "last columns of dQ not waited for": (K, "queries_done(dq)", "pass"),
    "dK not waited for": (K, "keys_done(dk)", "pass"),
    "dK unscaled": (K, "int32(2 * half), factor,", "int32(2 * half), float32(1.0),"),
    "no turn": (X, "turns.wait_for_turn(words + uint64(line) * uint64(4), int32(WARPS * turn))", "pass"),
    "turn not passed": (K, "let(words, added, lane)\n                    dp_done", "dp_done"),
    "last turn not passed": (V, "let(words, added, lane)\n            added", "added"),
    "last turn passed twice": (
        K,
        "            added = int32(-1)\n            barrier",
        "            barrier",
    ),
    "turn of half the warps": (X, "WARPS = 8", "WARPS = 4"),
    "first columns of dQ twice": (X, "first * 128 * variant.block_n", "0 * 128 * variant.block_n"),
    "dQ to the first columns": (X, "uint64(first * share_bytes)", "uint64(0 * share_bytes)"),
    "tiles of dQ overlap": (X, "tile_bytes, deterministic = variant.shares", "tile_bytes, deterministic = 1"),
    "delta added": (X, "(dp[at] - pair[e % 2])", "(dp[at] + pair[e % 2])"),
    "delta of the neighbour": (X, "(dp[at] - pair[e % 2])", "(dp[at] - pair[1 - e % 2])"),
    "P of the other block": (X, "int32(0), place + 2048 * i)", "int32(0), place + 2048 * (i ^ 1))"),
    "dropped weights negative": (X, "dropped, -weight, weight)", "dropped, weight, weight)"),
    "dropout of dV alone": (X, "(dropped, float32(0.0), dp[at] * factor)", "(dropped, dp[at], dp[at])"),
    "K released by one consumer": (S, "(places.kv_empty, 1, both)", "(places.kv_empty, 1, one)"),
    "Q released by one consumer": (S, "(places.q_empty, stages, both)", "(places.q_empty, stages, one)"),
}
# Widths, lengths, whether the machine is late, mask, whether blocks take turns, options, blocks side by side.
CASES: tuple[tuple[Any, ...], ...] = (
    ((192, 128), (140, 200), True, "bottom_right", True, {}, 2),
    ((136, 256), (140, 200), False, "bottom_right", True, {}, 3),
    ((192, 128), (140, 200), False, False, True, {"opposed": True, "scale": 4.0}, 3),
    ((192, 128), (140, 200), True, False, False, {"dropout_p": 0.3, "rng": 7}, 2),
    ((192, 128), (200, 140), True, False, True, {}, 3),
)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hopper_machine, "PATIENCE", 1.5)
    assert any(seen(monkeypatch, MUTANTS[name], attempt, case) for attempt in range(4) for case in CASES)


def seen(monkeypatch: pytest.MonkeyPatch, mutant: tuple[str, str, str], attempt: int, case: Any) -> bool:
    """Return whether one case shows the mistake."""
    widths, lengths, late, causal, deterministic, options, processors = case
    variant = choose_wide_backward("f16", widths[0], widths[1], bool(causal), deterministic=deterministic)
    variant = variant._replace(dropout="rng" in options)
    played(monkeypatch, late=late, processors=processors, seed=attempt, mutant=mutant)
    try:
        with np.errstate(all="ignore"):
            error = difference("f16", (1, *lengths, 2, 1, *widths), causal, variant, **options)
    except Exception:
        return True
    return not error < LIMITS["f16"]


SOUND = {V: "scores_done(s)", K: "keys_done(dk)", X: "WARPS = 8", S: "(places.kv_empty, 1, both)"}


@pytest.mark.parametrize("module", SOUND)
def test_without_mistakes_nothing_is_seen(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    line = SOUND[module]
    assert not any(seen(monkeypatch, (module, line, line), 0, case) for case in CASES)
