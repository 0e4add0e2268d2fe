"""Mistakes in the Hopper backward kernel: the played machine sees wrong numbers, an error or a hang."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.attention.variant_backward_hopper import choose_backward
from tests.cuda import hopper_machine
from tests.cuda.backward_hopper_played import played
from tests.cuda.test_backward_hopper_played import LIMITS, difference

MUTANTS = {
    "dO before it has arrived": (
        "consumer",
        "                    if not modified:\n"
        "                        barrier.wait(base + do_full + 8 * stage, parity)",
        "                    if not modified:",
    ),
    "Q before it has arrived": (
        "consumer",
        "barrier.wait(base + q_full + 8 * stage, parity)",
        "pass",
    ),
    "V before it has arrived": (
        "consumer",
        "barrier.wait(base + v_full, kv_parity)",
        "pass",
    ),
    "scores not waited for": (
        "consumer",
        "scores_done(s)",
        "pass",
    ),
    "dP not waited for": (
        "consumer",
        "dp_done(dp)",
        "pass",
    ),
    "dQ not waited for": (
        "consumer",
        "dq_done(dq)",
        "pass",
    ),
    "dK not waited for": (
        "consumer",
        "dk_done(dk)",
        "pass",
    ),
    "dS not published": (
        "consumer",
        "barrier.publish_stores()\n                    if not early_dv:",
        "if not early_dv:",
    ),
    "dQ not published": (
        "consumer",
        "barrier.publish_stores()\n                    barrier.arrive_warp",
        "barrier.arrive_warp",
    ),
    "consumers do not meet": (
        "consumer",
        "meet()\n                    if early_dv:",
        "if early_dv:",
    ),
    "mask off by one": (
        "consumer",
        "mask(s, first_low - shift,",
        "mask(s, first_low - shift + 1,",
    ),
    "mask of the other row": (
        "consumer",
        "first_high - shift)",
        "first_low - shift)",
    ),
    "mask left out too early": (
        "consumer",
        "if row < seeing:",
        "if row < seeing - 64:",
    ),
    "keys of padding count": (
        "consumer",
        "int32(key >= tk), NONE",
        "int32(key > tk + 500), NONE",
    ),
    "one tile of dS": (
        "consumer",
        "store_ds(ds, ds_lane + ds_stage * ds_bytes)",
        "store_ds(ds, ds_lane)",
    ),
    "dQ of the other consumer's keys": (
        "consumer",
        "+ w * k_part)",
        "+ (1 - w) * k_part)",
    ),
    "dK unscaled": (
        "consumer",
        "store_row(dk, int32(2 * half), factor,",
        "store_row(dk, int32(2 * half), float32(1.0),",
    ),
    "K released early": (
        "consumer",
        "            begin, end, members = first_block(key_block, blocks, tq, offset), blocks, group\n",
        "            begin, end, members = first_block(key_block, blocks, tq, offset), blocks, group\n"
        "            barrier.arrive_warp(base + kv_empty, lane)\n",
    ),
    "parity of dQ": (
        "consumer",
        "dq_parity = int32(dq_parity ^ 1)",
        "pass",
    ),
    "delta added": (
        "gradient",
        "(dp[4 * i + e] - pair[e % 2])",
        "(dp[4 * i + e] + pair[e % 2])",
    ),
    "columns exchanged": (
        "gradient",
        "(dp[4 * i + e] - pair[e % 2])",
        "(dp[4 * i + e] - pair[1 - e % 2])",
    ),
    "blocks of dS exchanged": (
        "gradient",
        "ds[at], ds[at + 1], ds[at + 2]",
        "ds[at], ds[at + 2], ds[at + 1]",
    ),
    "words of a row exchanged": (
        "gradient",
        "registers.select_word(odd, w0, w1), 1)",
        "registers.select_word(odd, w1, w0), 1)",
    ),
    "first block late": (
        "schedule",
        "int32(max(query, int32(0)))",
        "int32(max(query + 2, int32(0)))",
    ),
    "bytes of the statistics": (
        "stages",
        "        load_shifts(base",
        "        barrier.expect_bytes(full, 16)\n        load_shifts(base",
    ),
    "Q of the first head": (
        "producer",
        "head = int32(own_head * group + member)",
        "head = int32(own_head * group)",
    ),
    "half of dQ": (
        "stages",
        "base + dq_tile + w * share_bytes, share_bytes)",
        "base + dq_tile, share_bytes)",
    ),
    "dQ given back before it is read": (
        "stages",
        "bulk.wait_read()\n            barrier",
        "barrier",
    ),
    "turn passed before dQ is added": (
        "stages",
        "bulk.wait_added()\n        turns.pass_addition(word)",
        "turns.pass_addition(word)\n        bulk.wait_added()",
    ),
    "no turns": (
        "stages",
        "while turns.addition_seen(word) != mine:",
        "while False:",
    ),
    "dO of the stage before": (
        "stages",
        "load_do(base + do_tiles + stage * do_bytes,",
        "load_do(base + do_tiles + (1 - stage) * do_bytes,",
    ),
    "deltas of the stage before": (
        "stages",
        "load_deltas(base + delta_places + stage * stat_pitch,",
        "load_deltas(base + delta_places + (1 - stage) * stat_pitch,",
    ),
    "Q written before it is given back": (
        "stages",
        "barrier.wait(base + q_empty + 8 * stage, parity)",
        "pass",
    ),
    "the ring goes on": (
        "stages",
        "if (state & 15) == 2 * stages:",
        "if False:",
    ),
    "the counter stays": (
        "stages",
        "copy.store_global_word(counter, 0)",
        "pass",
    ),
    "columns of the first sub-tile": (
        "loads",
        "full, c * SUBTILE, row",
        "full, 0 * SUBTILE, row",
    ),
    "dropout of another key": (
        "dropout",
        "2 * (part >> 1))",
        "(part >> 1))",
    ),
    "dropout's words turned": (
        "dropout",
        "registers.select_word(upper, w1, w3), 8)",
        "registers.select_word(upper, w3, w1), 8)",
    ),
    "dropout of dV alone": (
        "gradient",
        "(dp[at] * kept - delta)",
        "(dp[at] - delta)",
    ),
    "dropout of another block of queries": (
        "consumer",
        "block = block_at(at, key_block, section, blocks)",
        "block = at",
    ),
    "Q in order": (
        "producer",
        "block = block_at(step, key_block, section, blocks)\n"
        "                    line = int32((kv_head * group + member) * blocks + block)\n"
        "                    where",
        "block = step\n"
        "                    line = int32((kv_head * group + member) * blocks + block)\n"
        "                    where",
    ),
    "dQ in order": (
        "producer",
        "block = block_at(step, key_block, section, blocks)\n"
        "                    line = int32((kv_head * group + member) * blocks + block)\n"
        "                    sizes",
        "block = step\n"
        "                    line = int32((kv_head * group + member) * blocks + block)\n"
        "                    sizes",
    ),
    "turns of a ring that does not turn": (
        "schedule",
        "if spacing == 0:",
        "if spacing >= 0:",
    ),
    "turns from the wrong end": (
        "schedule",
        "block_n) - 1 - key_block)",
        "block_n) - key_block)",
    ),
}


# Width, whether the machine is late, mask, whether blocks take turns, options, blocks side by side.
CASES: tuple[tuple[Any, ...], ...] = (
    (64, True, "bottom_right", True, {}, 2),
    (128, False, "bottom_right", True, {}, 3),
    (64, False, False, True, {"opposed": True, "scale": 4.0}, 3),
    (128, True, False, False, {"dropout_p": 0.3, "rng": 7}, 2),
    (128, True, False, True, {"dropout_p": 0.3, "rng": 7}, 3),
)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hopper_machine, "PATIENCE", 1.5)
    assert any(seen(monkeypatch, name, attempt, case) for attempt in range(4) for case in CASES)


def seen(monkeypatch: pytest.MonkeyPatch, name: str, attempt: int, case: Any) -> bool:
    """Return whether one case shows the mistake."""
    d, late, causal, deterministic, options, processors = case
    variant = choose_backward("f16", d, d, bool(causal), deterministic=deterministic)
    variant = variant._replace(dropout="rng" in options)
    played(monkeypatch, late=late, processors=processors, seed=attempt, mutant=MUTANTS[name])
    try:
        with np.errstate(all="ignore"):
            error = difference("f16", (1, 200, 330, 2, 1, d, d), causal, variant, **options)
    except Exception:
        return True
    return not error < LIMITS["f16"]


SOUND = {
    "consumer": "dk_done(dk)",
    "dropout": "2 * (part >> 1))",
    "gradient": "(dp[at] * kept - delta)",
    "loads": "full, c * SUBTILE, row",
    "producer": "head = int32(own_head * group + member)",
    "schedule": "block_n) - 1 - key_block)",
    "stages": "bulk.wait_added()",
}


@pytest.mark.parametrize("module", SOUND)
def test_without_mistakes_nothing_is_seen(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(MUTANTS, "none", (module, SOUND[module], SOUND[module]))
    assert not any(seen(monkeypatch, "none", 0, case) for case in CASES[-1 if module != "consumer" else 0 :])
