"""Hopper backward calls from end to end, their kernels run on a played machine, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.attention.call_backward_hopper import flash_attention_vjp_hopper
from cuda_backend.attention.schedule_backward_hopper import spacing_of
from cuda_backend.attention.variant_backward_hopper import BackwardVariant, choose_backward
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from refimpl.attention import flash_attention_vjp, scaled_dot_product_attention
from tests.cuda.backward_hopper_played import played
from tests.cuda.hopper_machine import KINDS


def difference(
    kind: str,
    sizes: Any,
    causal: Any,
    variant: BackwardVariant | WideBackwardVariant | None = None,
    *,
    opposed: bool = False,
    **options: Any,
) -> float:
    """Return the largest error of a gradient, as a part of its largest number.

    Queries and keys that are `opposed` have negative scores throughout.
    """
    B, Tq, Tk, Hq, Hkv, D, Dv = sizes
    rng = np.random.default_rng(7)
    shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv), (B, Tq, Hq, Dv)
    q, k, v, do = (rng.standard_normal(shape).astype(KINDS[kind]) for shape in shapes)
    if opposed:
        q, k = np.abs(q), -np.abs(k)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    forward = scaled_dot_product_attention(*wide, causal=causal, return_lse=True, **options)
    out, lse = forward.out.astype(KINDS[kind]), forward.lse.astype(np.float32)
    given = (*wide, forward.out, forward.lse, do.astype(np.float64))
    truth = flash_attention_vjp(*given, causal=causal, **options)
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


SHAPES = {
    "one of everything": ((1, 1, 1, 1, 1, 8, 8), False),
    "more keys, grouped": ((2, 70, 300, 4, 2, 64, 64), "bottom_right"),
    "more queries, rows without keys": ((1, 300, 70, 2, 1, 64, 64), "bottom_right"),
    "keys that no query sees": ((1, 130, 400, 1, 1, 64, 64), "top_left"),
    "narrow heads": ((1, 70, 140, 2, 1, 40, 24), "top_left"),
    "unequal heads": ((1, 150, 140, 1, 1, 72, 128), False),
    "wide, grouped, ragged": ((1, 161, 257, 2, 1, 128, 128), "bottom_right"),
}


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(monkeypatch: pytest.MonkeyPatch, shape: str, deterministic: bool, kind: str) -> None:
    sizes, causal = SHAPES[shape]
    variant = choose_backward(kind, sizes[5], sizes[6], bool(causal), deterministic=deterministic)
    played(monkeypatch, late=deterministic, processors=3)
    assert difference(kind, sizes, causal, variant) < LIMITS[kind]


@pytest.mark.parametrize("block_m", [64, 80, 96])
def test_turned_dq(monkeypatch: pytest.MonkeyPatch, block_m: int) -> None:
    played(monkeypatch)
    for ds_stages in (1, 2):
        variant = choose_backward("f16", 128, 128, True)._replace(
            block_m=block_m, swapped=True, ds_stages=ds_stages
        )
        assert difference("f16", (1, 170, 257, 2, 1, 128, 128), "bottom_right", variant) < LIMITS["f16"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_early_dv(monkeypatch: pytest.MonkeyPatch, d: int, late: bool) -> None:
    played(monkeypatch, late=late)
    variant = choose_backward("f16", d, d, True)._replace(early_dv=True)
    assert difference("f16", (1, 170, 257, 2, 1, d, d), "bottom_right", variant) < LIMITS["f16"]


@pytest.mark.parametrize(
    ("sizes", "turned"),
    [
        ((1, 70, 40, 2, 1, 20, 13), False),
        ((2, 65, 40, 1, 1, 128, 72), False),
        ((1, 90, 40, 1, 1, 128, 128), True),
    ],
)
def test_all_three_kernels(monkeypatch: pytest.MonkeyPatch, sizes: Any, turned: bool) -> None:
    """Widths that are no multiple of 8, whose arrays are copied; rows that see no key; the turned dQ."""
    launched = played(monkeypatch, quick=False)
    variant = choose_backward("f16", sizes[5], sizes[6], True)
    if turned:
        variant = variant._replace(block_m=80, swapped=True)
    assert difference("f16", sizes, "bottom_right", variant) < LIMITS["f16"]
    assert launched == ["prepare", "main", "finish"]


def test_the_scale_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch)
    assert difference("f16", (1, 70, 70, 1, 1, 64, 64), "top_left", scale=0.3) < LIMITS["f16"]


def test_padding_weighs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-sum-exps near -150: a score of 0, as keys of padding have, would weigh more than float32 holds."""
    played(monkeypatch)
    sizes = (1, 70, 70, 1, 1, 64, 64)
    assert difference("f16", sizes, False, opposed=True, scale=4.0) < LIMITS["f16"]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("d", [64, 128])
def test_dropout(monkeypatch: pytest.MonkeyPatch, d: int, kind: str) -> None:
    """The reference's Philox: a weight dropped or kept otherwise is an error as large as the gradient."""
    played(monkeypatch)
    dropped: dict[str, Any] = {"dropout_p": 0.3, "rng": 2**63 + 5}
    assert difference(kind, (2, 70, 150, 4, 2, d, d), "bottom_right", **dropped) < LIMITS[kind]


def repeats(monkeypatch: pytest.MonkeyPatch, tokens: int, width: int, causal: bool, processors: int) -> bool:
    """Return whether gradients in turn are alike bit for bit, in whatever order blocks run."""
    rng = np.random.default_rng(3)
    q, k, v, do = (rng.standard_normal((1, tokens, 1, width)).astype(np.float16) for _ in range(4))
    out, lse = scaled_dot_product_attention(q, k, v, causal=causal, return_lse=True)
    found = []
    for seed in range(3):
        played(monkeypatch, processors=processors, seed=seed, late=seed == 1)
        given = q, k, v, out, lse.astype(np.float32), do
        found.append(flash_attention_vjp_hopper(*given, causal=causal, deterministic=True))
    return all(
        np.array_equal(one, same)
        for other in found[1:]
        for one, same in zip(found[0][:3], other[:3], strict=True)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_turns_make_dq_repeat(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Sums of 300 queries are added to by three blocks of keys."""
    assert repeats(monkeypatch, 300, 64, causal, processors=3)


FULL = {
    "as many as run": ((1, 300, 300, 2, 2, 64, 64), 3, 1),
    "two apart, grouped": ((2, 250, 250, 4, 2, 128, 128), 3, 2),
    "more queries, ragged": ((1, 321, 130, 2, 1, 64, 64), 2, 1),
    "a grid of fewer blocks": ((1, 200, 330, 2, 1, 128, 128), 2, 0),
    "more keys": ((1, 100, 300, 2, 1, 64, 64), 3, 0),
    "one block of keys": ((2, 300, 90, 2, 2, 128, 128), 3, 5),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", FULL)
def test_turns_without_a_mask(monkeypatch: pytest.MonkeyPatch, shape: str, late: bool) -> None:
    """Blocks of keys begin apart where all of a head run side by side; `played` knows the order of turns."""
    sizes, processors, spacing = FULL[shape]
    variant = choose_backward("f16", sizes[5], sizes[6], False, deterministic=True)
    key_blocks, blocks = -(-sizes[2] // variant.block_n), -(-sizes[1] // variant.block_m)
    tiles = key_blocks * sizes[0] * sizes[4]
    assert spacing_of(key_blocks, blocks, min(processors, tiles)) == spacing
    played(monkeypatch, late=late, processors=processors, seed=int(late))
    assert difference("f16", sizes, False, variant) < LIMITS["f16"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_record(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Laws, reference, tolerances and edges, as `frugal verify --backend cuda` asks for them."""
    from refimpl.testing import check

    played(monkeypatch)
    technique = "attention.flash_backward"
    report = check(technique, flash_attention_vjp_hopper, backend="cuda", examples=3, dtypes=[dtype])
    assert not report.failed, report.failed[0]
    assert report.counts()["passed"] > 10
