"""The Hopper kernel with functions of the user's, played without a GPU, against the reference; mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.attention import flexible_attention, mods
from refimpl.attention.varlen import key_ranges, packing
from tests.cuda import hopper_machine
from tests.cuda.flexible_hopper_played import Mutant, played
from tests.cuda.hopper_machine import KINDS


def _arrays(kind: str, B: int, Tq: int, Tk: int, H: int, group: int, D: int, Dv: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(Tq + Tk)
    shapes = (B, Tq, H, D), (B, Tk, H // group, D), (B, Tk, H // group, Dv)
    q, k, v = (rng.standard_normal(shape).astype(KINDS[kind]) for shape in shapes)
    return q, k, v


def _difference(found: tuple[Any, Any], q: Any, k: Any, v: Any, options: dict[str, Any]) -> float:
    """Return the largest error in units of what rounding P to its format allows."""
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact, lse = flexible_attention(*wide, return_lse=True, **options)
    unit = 2.0**-11 if q.dtype == np.float16 else 2.0**-8
    out = float(np.abs(found[0] - exact).max() / (unit * max(1e-3, np.abs(exact).max())))
    empty = np.isneginf(lse)
    if not np.array_equal(np.isneginf(found[1]), empty):
        return np.inf
    apart = np.abs(found[1][~empty] - lse[~empty]).max(initial=0)
    return float(max(out, apart / 1e-4))


def _odd(b: Any, h: Any, i: Any, j: Any) -> bool:
    """A mask with branches, rows without keys (64 to 69) and a dead tile amid others."""
    if 64 <= i < 70 or 128 <= j < 256:
        return False
    return bool(j <= i + 150 + 40 * h - 20 * b)


def _uneven(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Warpgroups that see all, some, and, three blocks long, none; at last, keys with a hole."""
    return (i < 64) | (i < 128) & (j <= i) & (j != 41) | (i >= 512) & (j > 100) & (j != 141)


SLOPES = np.array([0.5, 0.125], np.float32)
NUMBERS = np.sort(np.random.default_rng(0).integers(0, 4, (2, 300)), axis=1)
BOTH = {"mask_mod": mods.sliding(90), "score_mod": mods.softcap(2.0)}
JOINED = mods.both(mods.causal, mods.documents())
STARTS = np.array([0, 40, 40, 110, 131])  # of packed sequences; what is behind them is padding
PACKED = np.ones((150, 1, 1))
RANGES = tuple(
    x.astype(np.int32) for x in key_ranges(packing(PACKED, PACKED, PACKED, STARTS, STARTS), "bottom_right")
)
GIVEN = np.random.default_rng(1).random((2, 1, 70, 140)) < 0.5
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "branches, ragged, grouped": ((2, 150, 300, 2, 2, 64, 64), {"mask_mod": _odd}, 0),
    "three warpgroups": ((1, 450, 384, 1, 1, 64, 64), {"mask_mod": mods.causal, "scale": 0.2}, 1),
    "documents": ((2, 300, 300, 1, 1, 128, 128), {"mask_mod": mods.documents(), "aux": (NUMBERS,)}, 0),
    "joined": ((2, 130, 130, 1, 1, 64, 64), {"mask_mod": JOINED, "aux": (NUMBERS[:, :130],)}, 0),
    "packed": ((1, 150, 150, 1, 1, 64, 64), {"mask_mod": mods.ranges(), "aux": RANGES}, 0),
    "given": ((2, 70, 140, 2, 1, 64, 64), {"mask_mod": mods.given(True, False), "aux": (GIVEN,)}, 0),
    "window": ((1, 300, 300, 1, 1, 64, 64), {"mask_mod": mods.both(mods.causal, mods.sliding(31))}, 0),
    "ragged alone": ((1, 70, 140, 1, 1, 64, 128), {}, 0),
    "score of aux": ((1, 70, 140, 2, 1, 128, 64), {"score_mod": mods.alibi(), "aux": (SLOPES,)}, 0),
    "64 keys": ((1, 200, 300, 2, 1, 64, 64), {"mask_mod": _odd}, 2),
    "score folded": ((1, 70, 140, 2, 1, 128, 64), {"score_mod": mods.alibi(), "aux": (SLOPES,)}, 0),
    "both": ((1, 66, 260, 1, 1, 64, 64), BOTH, 0),
    "both, wide": ((1, 66, 170, 1, 1, 192, 256), BOTH, 0),
    "scale below 0": ((1, 66, 128, 1, 1, 64, 64), {"score_mod": mods.softcap(2.0), "scale": -0.3}, 0),
    "no keys at all": ((1, 66, 128, 1, 1, 64, 64), {"mask_mod": lambda b, h, i, j: j < 0}, 0),
}


@pytest.mark.parametrize(("late", "words"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str, late: bool, words: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, options, which = CASES[case]
    kind = "bf16" if case == "both" else "f16"
    q, k, v = _arrays(kind, *sizes)
    how: dict[str, Any] = {
        "which": which,
        "late": late,
        "short": late,
        "words": words,
        "folded": case == "score folded",
    }
    found = played(monkeypatch, q, k, v, **how, **options)
    assert _difference(found, q, k, v, options) <= 1


# Where something stands in a source, and what is put in its place.
MISTAKES: dict[str, Mutant] = {
    "the word of the first stage": ("consumer", "step_slot + STEP_BYTES * stage", "step_slot"),
    "the mask of the first warpgroup": ("consumer", "slot + 4 + 4 * group_index", "slot + 4"),
    "the mask of the first keys": ("consumer", "int32(step * block_n + column)", "column"),
    "no mask": ("consumer", "mask(s, low, high, where)", "pass"),
    "K not waited for": ("consumer", "barrier.wait(base + k_full + 8 * stage, parity)", "pass"),
    "Q not released without keys": (
        "consumer", "            else:\n                barrier.arrive_warp",
        "            elif False:\n                barrier.arrive_warp",
    ),
    "first column": ("consumer", "int32(2 * quad_lane)", "int32(quad_lane)"),
    "the other row's mask": ("modifiers", "allows(b, h, i_high", "allows(b, h, i_low"),
    "columns of the mask": ("modifiers", "e // 2) + e % 2", "e // 2)"),
    "a bit of the other row": ("modifiers", "int32(high & bit)", "int32(low & bit)"),
    "keys of padding": ("modifiers", "inside = j < tk", "inside = j <= tk"),
    "score not scaled": ("consumer", "(scale, inverse), factor", "(1, inverse), factor"),
    "columns of the score": ("modifiers", "c = float32(8 * i + e)", "c = float32(8 * i)"),
    "not over the scale": ("consumer", "float32(1.0) / scale", "scale"),
    "the first row's score": ("modifiers", "float32(8.0)", "float32(0.0)"),
    "the list of the first tile": ("producer", "uint64(words[2])", "uint64(0)"),
    "a list one longer": ("producer", "int32(words[3])", "int32(words[3] + 1)"),
    "the step after K": ("producer", "STEP_BYTES * stage, at", "STEP_BYTES * stage, at + uint64(16)"),
    "the bits of the first tile": ("modifiers", "uint64(max(seen, int32(0)))", "uint64(1)"),
    "bits of another thread": ("consumer", "thread & 127", "(thread + 1) & 127"),
    "drawn twice": ("producer", "if left == 1:", "if left <= 2:"),
}  # fmt: skip


ASKED = (
    *("the other row's mask", "columns of the mask", "keys of padding", "first column"),
    "the mask of the first keys",
)
ROLLED = ("columns of the mask", "a bit of the other row", "the bits of the first tile")
READ = ("the bits of the first tile", "bits of another thread", "not over the scale")


@pytest.mark.parametrize("how", ["rolled", "short", "words"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong numbers, an error or a hang."""
    other = {"rolled": READ, "short": ROLLED, "words": ASKED}[how]
    if mistake in other or (how == "short" and MISTAKES[mistake][0] != "modifiers"):
        pytest.skip("other code, or code that another way has as well")
    monkeypatch.setattr(hopper_machine, "PATIENCE", 1.0)
    q, k, v = _arrays("f16", 1, 640, 300, 1, 1, 64, 64)
    options: dict[str, Any] = {"mask_mod": _uneven, "score_mod": lambda score, b, h, i, j: 2.0 * score}
    try:
        found = played(
            monkeypatch,
            q,
            k,
            v,
            late=True,
            blocks=1,
            short=how == "short",
            words=how == "words",
            folded=how == "words",
            mutant=MISTAKES[mistake],
            **options,
        )
    except (AssertionError, IndexError, KeyError, ValueError):
        return
    assert not _difference(found, q, k, v, options) <= 1
