"""Sparse attention beyond its records: blocks, gradients, memory at 65,536 tokens, errors, the plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from refimpl import attention, registry
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from refimpl.registry import Case
from refimpl.tolerances import outputs

registry.load()

# Each blocked form, and the vjp's that must agree: of the mask, and of the tiles.
PAIRS = {
    "attention.sliding_window": ("sliding_window_attention_banded", "sliding_window_attention"),
    "attention.dilated_window": ("dilated_window_attention_banded", "dilated_window_attention"),
    "attention.global_tokens": ("global_tokens_attention_blocked", "global_tokens_attention"),
    "attention.bigbird": ("bigbird_attention_blocked", "bigbird_attention"),
    "attention.shifted_groups": ("shifted_groups_attention_grouped", "shifted_groups_attention"),
}


def _case(name: str, seed: int, **fixed: Any) -> Case:
    from refimpl.testing import draw

    record = registry.get(name)
    assert record.sample is not None
    return record.sample(np.random.default_rng(seed), **draw(record, seed, fixed)).without("return_lse")


@pytest.mark.parametrize("name", PAIRS)
@given(seed=st.integers(0, 2**32 - 1))
def test_gradients_of_the_tiles_are_those_of_the_mask(name: str, seed: int) -> None:
    """The blocked gradient, never tested by differences, equals the one that is, to the rounding of sums."""
    case = _case(name, seed).without("bias")
    blocked, dense = (getattr(attention, f"{f}_vjp") for f in PAIRS[name])
    do = np.random.default_rng(seed).standard_normal(case.call(getattr(attention, PAIRS[name][1])).shape)
    args = (*case.args, do)
    for found, expected in zip(blocked(*args, **case.kwargs), dense(*args, **case.kwargs), strict=True):
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["sliding_window", "dilated_window", "global_tokens", "longformer"])
@given(seed=st.integers(0, 2**32 - 1), block_size=st.integers(1, 50))
def test_blocks_of_any_size_give_the_same(name: str, seed: int, block_size: int) -> None:
    case = _case(f"attention.{name}", seed)
    (item,) = registry.implementations_of(f"attention.{name}")
    found = case.replace(block_size=block_size).call(item.load())
    expected = case.call(registry.get(f"attention.{name}").function)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [*PAIRS, "attention.longformer"])
def test_blocked_forms_are_kernels_in_low_precision(name: str, dtype: Any) -> None:
    """In the formats of kernels the blocked form is as near to the truth as a kernel must be."""
    from refimpl.testing import check

    (item,) = registry.implementations_of(name)
    report = check(name, item.load(), examples=3, edges=False, dtypes=[np.dtype(dtype).name])
    assert report.ok, [outcome.detail for outcome in report.failed]


MEASURE = """
import resource, sys, numpy as np
from refimpl import attention
x = np.random.default_rng(0).standard_normal((1, 65536, 1, 64))
hub = np.arange(65536) < 16
call = {
    "sliding": lambda: attention.sliding_window_attention_banded(x, x, x, radius=128),
    "dilated": lambda: attention.dilated_window_attention_banded(x, x, x, radius=128, dilation=4),
    "global": lambda: attention.global_tokens_attention_blocked(x, x, x, radius=128, is_global=hub),
    "bigbird": lambda: attention.bigbird_attention_blocked(
        x, x, x, plan=attention.bigbird_plan(1024, heads=1, rng=0)
    ),
    "groups": lambda: attention.shifted_groups_attention_grouped(x, x, x, group_size=256),
    "sliding gradient": lambda: attention.sliding_window_attention_banded_vjp(x, x, x, x, radius=128),
}
assert np.isfinite(np.asarray(call[sys.argv[1]]()[0])).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is of Unix")
@pytest.mark.parametrize("which", ["sliding", "dilated", "global", "bigbird", "groups", "sliding gradient"])
def test_65536_tokens_take_less_than_two_gigabytes(which: str) -> None:
    """w = 256 keys a query, H = 1, D = 64, in float64: the scores of full attention would take 34 GB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, which], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(done.stdout) < 2e9


@pytest.mark.parametrize(
    ("convention", "window", "radius"),
    [("longformer_paper", 512, 256), ("longformer_code", 256, 256), ("mistral", 4096, 4095)],
)
def test_a_window_by_its_source(convention: Any, window: int, radius: int) -> None:
    assert attention.window_radius(window, convention=convention) == radius


X = np.ones((1, 6, 2, 3))
HUB = np.zeros(6, dtype=bool)
CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: attention.window_radius(7, convention="longformer_paper"), OptionError, "must be even, got 7"),
    (lambda: attention.window_radius(0, convention="mistral"), OptionError, "at least 1, got 0"),
    (lambda: attention.window_radius(8, convention="w"), OptionError, "convention: expected"),  # type: ignore[arg-type]
    (
        lambda: attention.sliding_window_attention(X, X, X, radius=-1),
        OptionError,
        "radius: expected at least 0",
    ),
    (lambda: attention.sliding_window_attention(X, X[:, :4], X[:, :4], radius=1), ShapeError, "Tk=4, Tq=6"),
    (
        lambda: attention.sliding_window_attention(X, X, X, radius=1, attn_mask=np.ones((6, 6))),
        DTypeError,
        "attn_mask: expected bool",
    ),
    (
        lambda: attention.sliding_window_attention_banded(X, X, X, radius=1, block_size=0),
        OptionError,
        "block_size",
    ),
    (
        lambda: attention.sliding_window_attention_banded_vjp(X, X, X, X, radius=1, bias=np.zeros((6, 6))),
        UnsupportedError,
        "bias: its gradient",
    ),
    (
        lambda: attention.dilated_window_attention(X, X, X, radius=1, dilation=0),
        OptionError,
        "at least 1, got 0",
    ),
    (
        lambda: attention.dilated_window_attention(X, X, X, radius=1, dilation=1.5),
        DTypeError,
        "whole numbers",
    ),
    (
        lambda: attention.dilated_window_attention(X, X, X, radius=1, dilation=np.array([1, 2, 3])),
        ShapeError,
        "one number or shape \\(2,\\)",
    ),
    (
        lambda: attention.global_tokens_attention(X, X, X, radius=1, is_global=np.zeros(6)),
        DTypeError,
        "is_global: expected bool",
    ),
    (
        lambda: attention.global_tokens_attention(X, X, X, radius=1, is_global=HUB[:5]),
        ShapeError,
        "is_global: expected a shape that broadcasts to \\(1, 6\\)",
    ),
    (
        lambda: attention.longformer_attention(X, X, X, X, X[:, :5], X, radius=1, is_global=HUB),
        ShapeError,
        "k_global: axis T",
    ),
    (
        lambda: attention.bigbird_attention(X, X, X, block_size=0),
        OptionError,
        "block_size: expected at least 1",
    ),
    (lambda: attention.bigbird_attention(X, X, X, window_blocks=2), OptionError, "0 or an odd number, got 2"),
    (
        lambda: attention.bigbird_attention(X, X, X, block_size=2, global_blocks=(3,)),
        OptionError,
        "global_blocks: expected blocks below 3, got 3",
    ),
    (
        lambda: attention.bigbird_attention(X, X, X, block_size=2, plan=np.zeros((2, 4, 1), int)),
        ShapeError,
        "plan: expected shape \\(2 or 1, 3, r\\), got \\(2, 4, 1\\)",
    ),
    (
        lambda: attention.bigbird_attention(X, X, X, block_size=2, plan=np.full((1, 3, 1), 3)),
        OptionError,
        "plan: expected blocks from -1",
    ),
    (
        lambda: attention.bigbird_attention(X, X, X, block_size=2, plan=np.zeros((1, 3, 1))),
        DTypeError,
        "plan: expected whole numbers",
    ),
    (lambda: attention.shifted_groups_attention(X, X, X, group_size=3), OptionError, "must be even, got 3"),
    (lambda: attention.shifted_groups_attention(X, X, X, group_size=4), ShapeError, "T=6, group_size=4"),
    (
        lambda: attention.shifted_groups_attention(X, X, X, group_size=2, ends="cut"),  # type: ignore[arg-type]
        OptionError,
        "'roll' or 'no_wrap', got 'cut'",
    ),
    (
        lambda: attention.shifted_groups_attention(
            X, X, X, group_size=2, causal="bottom_right", k_lengths=np.array([3])
        ),
        OptionError,
        "padded sequences",
    ),
    (lambda: attention.rapid_mixing(np.ones((2, 3), bool)), ShapeError, "expected shape \\(N, N\\)"),
    (lambda: attention.rapid_mixing(np.ones((2, 2))), DTypeError, "mask: expected bool"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[message for _, _, message in CALLS])
def test_what_does_not_fit_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", [*PAIRS, "attention.longformer"])
def test_blocked_forms_draw_dropout_as_the_dense_one(name: str) -> None:
    """The same words of the same seed, at the places of the whole sequence."""
    case = _case(name, 5, extra="dropout" if name == "attention.shifted_groups" else "all", B=1)
    (item,) = registry.implementations_of(name)
    found, expected = outputs(case.call(item.load())), outputs(case.call(registry.get(name).function))
    assert case.kwargs["dropout_p"] == 0.25
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-11, atol=1e-12)


def test_a_plan_is_drawn_without_window_and_global_blocks() -> None:
    plan = attention.bigbird_plan(20, heads=5, random_blocks=3, rng=1)
    assert (plan[:, [0, 19]] == -1).all()
    for h, i in np.ndindex(5, 20):
        drawn = set(plan[h, i].tolist()) if i not in (0, 19) else set()
        assert len(drawn) == (3 if 0 < i < 19 else 0)
        assert not drawn & {0, 19, i - 1, i, i + 1}
    assert len({plan[h].tobytes() for h in range(5)}) == 5, "each head has draws of its own"
    assert np.array_equal(plan, attention.bigbird_plan(20, heads=5, random_blocks=3, rng=1))


def test_a_plan_draws_uniformly() -> None:
    """Row 4 of 10 blocks: 5 of them are left to draw two from, each as likely; chi-square at 1 in 1000."""
    plan = attention.bigbird_plan(10, heads=4000, random_blocks=2, rng=0)[:, 4]
    blocks, counts = np.unique(plan, return_counts=True)
    assert blocks.tolist() == [1, 2, 6, 7, 8]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_a_plan_takes_what_is_left() -> None:
    assert attention.bigbird_plan(6, heads=1, random_blocks=3, rng=0)[0, 2].tolist() == [4, -1, -1]
    assert attention.bigbird_plan(0, heads=2, rng=0).shape == (2, 0, 3)
