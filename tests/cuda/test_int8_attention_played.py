"""The Hopper kernel for attention in int8, played without a GPU, against the definition; its mistakes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from cuda_backend.attention import int8_consumer_hopper, int8_forward_hopper
from refimpl.attention import int8_attention
from tests.cuda import int8_attention_played
from tests.cuda.int8_attention_played import attention

pytestmark = pytest.mark.cudasim


def _arrays(Tq: int, Tk: int, H: int, group: int, D: int, Dv: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(Tq + Tk)
    q = rng.standard_normal((1, Tq, H, D))
    k = rng.standard_normal((1, Tk, H // group, D)) + 2 * rng.standard_normal((1, 1, H // group, D))
    k[:, Tk // 2 :] *= 0.25  # scales of key tiles that differ
    v = rng.standard_normal((1, Tk, H // group, Dv))
    return q.astype(np.float16), k.astype(np.float16), v.astype(np.float16)


def _difference(found: Any, q: Any, k: Any, v: Any, causal: Any) -> float:
    """Return the largest error in units of the error that float16 allows."""
    exact = int8_attention(*(x.astype(np.float64) for x in (q, k, v)), causal=causal)
    rounded = np.abs(int8_attention(q, k, v, causal=causal).astype(np.float64) - exact).max()
    # P is rounded unnormalised: twice the error of rounding it, as for the fp16 kernel.
    return float(
        np.abs(found.astype(np.float64) - exact).max() / (2 * rounded + 2.0**-11 * np.abs(exact).max())
    )


@pytest.mark.parametrize(
    ("sizes", "causal"),
    [
        # A second warpgroup with few rows, three key tiles, the last ragged.
        ((70, 300, 1, 1, 128, 64), False),
        # Grouped heads, two row blocks, key tiles that are skipped.
        ((150, 260, 2, 2, 72, 40), "bottom_right"),
    ],
)
def test_outputs(sizes: Any, causal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _arrays(*sizes)
    found = attention(monkeypatch, int8_forward_hopper.build, q, k, v, causal)
    assert _difference(found, q, k, v, causal) <= 1


# What stands in the source of the consumer, and what is put in its place.
MISTAKES = {
    "scale of the first key tile": ("of_keys + uint64(4) * uint64(j)", "of_keys"),
    "scale of the first queries": ("+ uint64(block))", "+ uint64(0))"),
    "no rescaling": ("rescale(o, factor_low, factor_high)", "rescale(o, float32(1.0), float32(1.0))"),
    "sums that start elsewhere": ("s[i], zero, float32(middle)", "s[i], zero, float32(middle + 4096)"),
    "late weights are not summed": ("sum_high += weights(", "sum_high += 0 * weights("),
    "an early weight is taken again": ("shift_low, EARLY, QUADS)", "shift_low, EARLY - 1, QUADS)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _arrays(66, 140, 1, 1, 128, 64)
    q[:, 64:] *= 3  # a second block of queries with another scale
    text = inspect.getsource(int8_consumer_hopper)
    changed = text.replace(*MISTAKES[mistake])
    assert changed != text
    space: dict[str, Any] = {"__name__": "changed"}
    exec(compile(changed, int8_consumer_hopper.__file__, "exec"), space)
    monkeypatch.setattr(int8_forward_hopper, "build_consumer", space["build_consumer"])
    found = attention(monkeypatch, int8_forward_hopper.build, q, k, v, False)
    assert _difference(found, q, k, v, False) > 1


def test_maxima_that_rise_and_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key tiles come last first: some maxima rise by less than `LAG`, others by more, others not at all."""
    q, k, v = _arrays(16, 260, 1, 1, 128, 64)
    q[:, ::2] *= 4
    k[:, :256] *= 4
    k[:, :128] *= 2
    found = attention(monkeypatch, int8_forward_hopper.build, q, k, v, False)
    assert _difference(found, q, k, v, False) <= 1
    text = inspect.getsource(int8_consumer_hopper)
    changed = text.replace("if registers.any_lane(moved) != 0", "if registers.any_lane(moved) > 1")
    assert changed != text
    space: dict[str, Any] = {"__name__": "changed"}
    exec(compile(changed, int8_consumer_hopper.__file__, "exec"), space)
    monkeypatch.setattr(int8_forward_hopper, "build_consumer", space["build_consumer"])
    found = attention(monkeypatch, int8_forward_hopper.build, q, k, v, False)
    assert _difference(found, q, k, v, False) > 1


def test_a_turn_given_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once between the products of the loop, and once more behind them."""
    text = inspect.getsource(int8_consumer_hopper)
    behind = "wgmma.commit()\n                    scores_first_done(codes)"
    changed = text.replace(behind, f"barrier.give_turn(other_turn)\n                    {behind}")
    assert changed != text
    space: dict[str, Any] = {"__name__": "changed"}
    exec(compile(changed, int8_consumer_hopper.__file__, "exec"), space)
    monkeypatch.setattr(int8_forward_hopper, "build_consumer", space["build_consumer"])
    monkeypatch.setattr(int8_attention_played, "PATIENCE", 10)  # others wait for whoever stopped
    q, k, v = _arrays(66, 260, 1, 1, 128, 64)
    with pytest.raises((RuntimeError, AssertionError), match=r"turn is given|completes a barrier"):
        attention(monkeypatch, int8_forward_hopper.build, q, k, v, False)
