"""Hopper backward calls with heads wider than 128, their kernels run on a played machine."""

from __future__ import annotations

from typing import Any

import pytest

from cuda_backend.attention.variant_wide_backward_hopper import choose_wide_backward
from tests.cuda.backward_hopper_played import played
from tests.cuda.test_backward_hopper_played import LIMITS, difference, repeats


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("causal", [False, "top_left"])
def test_square(monkeypatch: pytest.MonkeyPatch, causal: Any, late: bool) -> None:
    launched = played(monkeypatch, late=late)
    assert difference("f16", (1, 150, 150, 1, 1, 256, 256), causal) < LIMITS["f16"]
    assert launched == ["prepare", "main", "finish"]


SHAPES = {
    "one of everything": ((1, 1, 1, 1, 1, 136, 8), False),
    "more keys, grouped": ((2, 70, 200, 4, 2, 256, 256), "bottom_right"),
    "more queries, rows without keys": ((1, 200, 70, 2, 1, 192, 128), "bottom_right"),
    "keys that no query sees": ((1, 70, 300, 1, 1, 192, 192), "top_left"),
    "narrow values": ((1, 70, 140, 2, 1, 160, 40), "top_left"),
    "wide values": ((1, 90, 140, 1, 1, 72, 200), False),
}


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(monkeypatch: pytest.MonkeyPatch, shape: str, deterministic: bool, kind: str) -> None:
    sizes, causal = SHAPES[shape]
    variant = choose_wide_backward(kind, sizes[5], sizes[6], bool(causal), deterministic=deterministic)
    played(monkeypatch, late=deterministic, processors=3)
    assert difference(kind, sizes, causal, variant) < LIMITS[kind]


@pytest.mark.parametrize("late", [False, True])
def test_stages(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    played(monkeypatch, late=late)
    for stages in (1, 2, 3):
        variant = choose_wide_backward("f16", 192, 128, True)._replace(stages=stages)
        assert difference("f16", (1, 200, 130, 1, 1, 192, 128), "bottom_right", variant) < LIMITS["f16"]


@pytest.mark.parametrize("sizes", [(1, 70, 40, 2, 1, 150, 133), (1, 70, 40, 1, 1, 256, 192)])
def test_all_three_kernels(monkeypatch: pytest.MonkeyPatch, sizes: Any) -> None:
    """Widths that are no multiple of 8, whose arrays are copied; rows that see no key."""
    launched = played(monkeypatch, quick=False)
    assert difference("f16", sizes, "bottom_right") < LIMITS["f16"]
    assert launched == ["prepare", "main", "finish"]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("widths", [(256, 256), (192, 128)])
def test_dropout(monkeypatch: pytest.MonkeyPatch, widths: tuple[int, int], kind: str) -> None:
    """The reference's Philox: a weight dropped or kept otherwise is an error as large as the gradient."""
    played(monkeypatch)
    dropped: dict[str, Any] = {"dropout_p": 0.3, "rng": 2**63 + 5}
    assert difference(kind, (2, 70, 150, 4, 2, *widths), "bottom_right", **dropped) < LIMITS[kind]


@pytest.mark.parametrize("causal", [False, True])
def test_turns_make_dq_repeat(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Sums of 200 queries are added to by four blocks of keys."""
    assert repeats(monkeypatch, 200, 192, causal, processors=4)
