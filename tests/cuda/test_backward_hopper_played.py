"""Hopper backward calls from end to end, their kernels' source run on a played machine, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.attention.call_backward_hopper import flash_attention_vjp_hopper
from cuda_backend.attention.variant_backward_hopper import BackwardVariant, choose_backward
from refimpl.attention import flash_attention_vjp, scaled_dot_product_attention
from tests.cuda.backward_hopper_played import played
from tests.cuda.hopper_machine import KINDS


def difference(kind: str, sizes: Any, causal: Any, variant: BackwardVariant | None = None, **options: Any) -> float:
    """Return the largest error of a gradient, as a part of its largest number."""
    B, Tq, Tk, Hq, Hkv, D, Dv = sizes
    rng = np.random.default_rng(7)
    shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv), (B, Tq, Hq, Dv)
    q, k, v, do = (rng.standard_normal(shape).astype(KINDS[kind]) for shape in shapes)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    forward = scaled_dot_product_attention(*wide, causal=causal, return_lse=True, **options)
    out, lse = forward.out.astype(KINDS[kind]), forward.lse.astype(np.float32)
    truth = flash_attention_vjp(*wide, forward.out, forward.lse, do.astype(np.float64), causal=causal, **options)
    if variant is not None:
        options = {**options, "deterministic": variant.deterministic}
    found = flash_attention_vjp_hopper(q, k, v, out, lse, do, causal=causal, variant=variant, **options)
    errors = []
    for name in ("dq", "dk", "dv"):
        gradient, exact = getattr(found, name).astype(np.float64), getattr(truth, name)
        assert gradient.shape == exact.shape
        assert not np.isnan(gradient).any(), name
        errors.append(float(np.abs(gradient - exact).max() / max(1.0, np.abs(exact).max())))
    return max(errors)


LIMITS = {"f16": 3e-3, "bf16": 2.5e-2}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("d", [64, 128])
def test_square(monkeypatch: pytest.MonkeyPatch, d: int, causal: Any, late: bool) -> None:
    launched = played(monkeypatch, late=late)
    assert difference("f16", (1, 200, 200, 1, 1, d, d), causal) < LIMITS["f16"]
    assert launched == ["prepare", "main", "finish"]
