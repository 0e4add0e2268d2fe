"""The Hopper kernel with functions of the user's, played without a GPU, against the reference; mistakes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from cuda_backend.attention import (
    consumer_flexible_hopper,
    forward_flexible_hopper,
    modifiers_hopper,
    producer_flexible_hopper,
)
from refimpl.attention import flexible_attention, mods
from tests.cuda.flexible_hopper_played import attention

pytestmark = pytest.mark.cudasim


def _arrays(Tq: int, Tk: int, H: int, group: int, D: int, Dv: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(Tq + Tk)
    shapes = (1, Tq, H, D), (1, Tk, H // group, D), (1, Tk, H // group, Dv)
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    return q, k, v


def _difference(found: tuple[Any, Any], q: Any, k: Any, v: Any, options: dict[str, Any]) -> float:
    """Return the largest error in units of what float16 allows: P and the output are rounded."""
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact, lse = flexible_attention(*wide, return_lse=True, **options)  # type: ignore[misc]
    out = float(np.abs(found[0].astype(np.float64) - exact).max() / (2.0**-10 * np.abs(exact).max()))
    empty = np.isneginf(lse)
    assert np.array_equal(np.isneginf(found[1]), empty)
    apart = np.abs(found[1][~empty] - lse[~empty]).max(initial=0)
    return max(out, float(apart / 1e-4))


def _odd(_b: Any, h: Any, i: Any, j: Any) -> bool:
    """A mask with branches, rows without keys (64 to 69) and a dead tile amid others."""
    if 64 <= i < 70 or 128 <= j < 256:
        return False
    return bool(j <= i + 150 + 40 * h)


SLOPES = np.array([0.5, 0.125], np.float32)
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "branches, ragged, grouped": ((150, 300, 2, 2, 64, 64), {"mask_mod": _odd}, 0),
    "three warpgroups": ((200, 128, 1, 1, 64, 64), {"mask_mod": mods.causal, "scale": 0.2}, 1),
    "score of aux, no mask": ((70, 140, 2, 1, 128, 64), {"score_mod": mods.alibi(), "aux": (SLOPES,)}, 0),
    "both": ((66, 260, 1, 1, 64, 64), {"mask_mod": mods.sliding(90), "score_mod": mods.softcap(2.0)}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, options, which = CASES[case]
    q, k, v = _arrays(*sizes)
    found = attention(monkeypatch, forward_flexible_hopper.build, q, k, v, which=which, **options)
    assert _difference(found, q, k, v, options) <= 1


# Where something stands in a source, and what is put in its place.
MISTAKES: dict[str, tuple[Any, str, str]] = {
    "the next step's word": (consumer_flexible_hopper, "step_slot + 4 * stage)\n                step", "step_slot)\n                step"),
    "the mask of another warpgroup": (consumer_flexible_hopper, "(step >> group_index) & 1", "step & 1"),
    "the other row's mask": (modifiers_hopper, "allows(b, h, i_high", "allows(b, h, i_low"),
    "columns of the mask": (modifiers_hopper, "8 * (e // 2) + e % 2", "e"),
    "the list of the first tile": (producer_flexible_hopper, "uint64(words[2])", "uint64(0)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong = MISTAKES[mistake]
    text = inspect.getsource(module)
    assert text.count(right) == 1
    space: dict[str, Any] = {"__name__": "changed"}
    exec(compile(text.replace(right, wrong), str(module.__file__), "exec"), space)
    for user in (forward_flexible_hopper, consumer_flexible_hopper):
        for name in ("build_flexible_consumer", "build_flexible_producer", "build_modifiers"):
            if name in space and hasattr(user, name):
                monkeypatch.setattr(user, name, space[name])
    q, k, v = _arrays(140, 256, 1, 1, 64, 64)
    options = {"mask_mod": lambda b, h, i, j: (j <= i) & (i - j <= 70)}
    found = attention(monkeypatch, forward_flexible_hopper.build, q, k, v, **options)
    assert not _difference(found, q, k, v, options) <= 1
