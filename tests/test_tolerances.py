"""The policy itself: what it lets through and what it must not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import registry
from refimpl.attention import scaled_dot_product_attention
from refimpl.numerics import round_to, ulp, widen
from refimpl.registry import Case
from refimpl.testing import check, poisoned
from refimpl.tolerances import Limit, baseline_limits, cast, mismatch, rewrite_limits

WIDE = Limit(np.asarray(1e9))


@pytest.mark.parametrize("actual", [np.nan, np.inf, -np.inf])
def test_non_finite_never_passes_for_a_number(actual: float) -> None:
    assert "finite" in str(mismatch(np.array([actual]), np.array([0.0]), WIDE))


def test_the_same_infinity_passes_and_the_other_one_does_not() -> None:
    down = np.array([-np.inf])
    assert mismatch(down, down, WIDE) is None
    assert mismatch(-down, down, WIDE) is not None
    assert mismatch(np.array([np.nan]), down, WIDE) is not None


def test_shapes_come_first() -> None:
    assert "shape" in str(mismatch(np.zeros((2, 1)), np.zeros(2), WIDE))


def test_exact_outputs_compare_equal_or_not_at_all() -> None:
    assert mismatch(np.array([1, 2]), np.array([1, 2]), None) is None
    assert "output[1]" in str(mismatch(np.array([1, 3]), np.array([1, 2]), None))


def test_a_broad_bias_fails_in_rms_where_the_maximum_passes() -> None:
    expected = np.zeros(1000)
    limit = Limit(np.asarray(1.0), rms=0.1)
    assert "rms" in str(mismatch(np.full(1000, 0.5), expected, limit))
    lone = expected.copy()
    lone[0] = 0.9
    assert mismatch(lone, expected, limit) is None


def test_the_worst_cell_is_named() -> None:
    actual = np.zeros((3, 4))
    actual[2, 1], actual[0, 0] = 5.0, 2.0
    assert "output[2, 1]" in str(mismatch(actual, np.zeros((3, 4)), Limit(np.asarray(1.0))))


def _large_scores() -> Case:
    """Scores near 1e4 that differ by a few units: their rounding decides the weights."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 16, 1, 8))
    return Case((1e4 * np.sign(q), np.ones_like(k) + 1e-4 * k, v))


def test_rewrites_of_large_scores_are_judged_by_conditioning() -> None:
    """One ulp of a score of 1e4 moves exp by 1e-12: the summation bound alone would call that wrong."""
    record, case = registry.get("attention.dense"), _large_scores()
    q, k, v = case.args
    small = rewrite_limits(record, Case((1e-4 * q, k, v)))[1]["output"].largest.max()
    large = rewrite_limits(record, case)[1]["output"].largest.max()
    assert small < 1e-13
    assert 10 * small < large < 1e-8


def test_a_useless_baseline_makes_a_case_invalid() -> None:
    case = cast(_large_scores(), np.dtype(np.float16))
    *_, invalid = baseline_limits(registry.get("attention.dense"), case, np.dtype(np.float16))
    assert invalid is not None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_kernel_as_good_as_the_baseline_passes_and_a_worse_one_fails(dtype: str) -> None:
    def rounded_scores(q, k, v, /):  # type: ignore[no-untyped-def]
        """Lose three bits of every input before computing."""
        coarse = {"float32": np.float16, "float16": ml_dtypes.float8_e5m2, "bfloat16": ml_dtypes.float8_e5m2}
        low = [widen(x).astype(coarse[dtype]).astype(np.float32) for x in (q, k, v)]
        return round_to(scaled_dot_product_attention(*low), q.dtype)

    def wide(q, k, v, /):  # type: ignore[no-untyped-def]
        return round_to(
            scaled_dot_product_attention(*(widen(x).astype(np.float64) for x in (q, k, v))), q.dtype
        )

    axes = {"B": 1, "extra": "none", "causal": False, "return_lse": False}
    good = check("attention.dense", wide, backend="cuda", dtypes=[dtype], axes=axes, examples=4)
    assert good.ok, good.failed
    bad = check("attention.dense", rounded_scores, backend="cuda", dtypes=[dtype], axes=axes, examples=4)
    assert bad.failed


def test_gradients_that_cancel_are_judged_by_the_terms_they_sum() -> None:
    """Under a causal mask row 0 sees one key: dQ is 0 there but for rounding."""
    record = registry.get("attention.flash_backward")
    shape = {"B": 1, "Tq": 40, "Tk": 40, "Hkv": 1, "group": 1, "D": 16, "Dv": 16}
    drawn = record.sample(np.random.default_rng(0), **shape, causal="top_left", blocks="default")  # type: ignore[misc]
    case = cast(drawn, np.dtype(np.float32))
    truth, _, limits, _ = baseline_limits(record, case, np.dtype(np.float32))
    assert np.abs(truth["dq"][0, 0]).max() < 1e-14
    _, _, v, _, _, do = case.args
    eps = np.finfo(np.float32).eps
    terms = np.sqrt(np.mean(do[0, 0] ** 2 @ v[0, 0, 0][:, None] ** 2))  # of dP, the sum over the head
    allowed = float(limits["dq"].largest[0, 0].max())
    assert eps * terms / 16 < allowed < 16 * eps * terms
    assert float(limits["dq"].largest.max()) < 64 * eps * np.abs(truth["dq"]).max()


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)])
def test_no_row_that_cancels_may_be_zeroed(dtype: np.dtype[Any]) -> None:
    """Saturated softmaxes leave rows of small gradients: each is judged by what the baseline errs there."""
    rng = np.random.default_rng(0)
    q, do = rng.standard_normal((2, 1, 48, 1, 32))
    k, v = rng.standard_normal((2, 1, 80, 1, 32))
    q, k, v, do = (round_to(x, dtype) for x in (6 * q, k, v, do))
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    case = Case((q, k, v, out, lse, do), {"block_sizes": (48, 80)})
    truth, _, limits, _ = baseline_limits(registry.get("attention.flash_backward"), case, dtype)
    for name in ("dq", "dk", "dv"):
        size = np.abs(truth[name]).max(axis=-1)
        rows = [index for index in np.ndindex(size.shape) if size[index] > 0.08 * size.max()]
        kept = []
        for index in rows:
            zeroed = truth[name].copy()
            zeroed[index] = 0
            if mismatch(zeroed, truth[name], limits[name]) is None:
                kept.append(index)
        assert not kept, f"{name}: zeroed rows pass: {kept}"


def _base_two(*, exponent: Any = np.float32, scores: Any = np.float32) -> Any:
    """Return attention whose log-sum-exp is made as kernels make it, with parts of it in other formats."""

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        out, _ = scaled_dot_product_attention(q, k, v, return_lse=True)
        q, k = (widen(x).astype(np.float32) for x in (q, k))
        factor = np.float32(q.shape[-1] ** -0.5 * np.log2(np.e))
        s = round_to(np.einsum("bihd,bjhd->bhij", q, k), scores).astype(np.float32)
        top = s.max(-1)
        total = np.exp2((s - top[..., None]) * factor).sum(-1)
        ln2 = np.float32(exponent(np.log(2.0)))
        return out, (top * factor + np.log2(total)) * ln2

    return attention


@pytest.mark.parametrize("keys", [1, 2, 40])
def test_log_sum_exps_keep_the_roundings_of_float32_and_no_others(keys: int) -> None:
    """In bfloat16 the baseline's of one key is exact: a kernel is held to what float32 can hold."""
    dtype = np.dtype(ml_dtypes.bfloat16)
    record, rng = registry.get("attention.dense"), np.random.default_rng(0)
    failed = {"kernel": 0, "ln2": 0, "scores": 0, "moved": 0}
    for _ in range(60):
        q, k = (round_to(rng.standard_normal((1, n, 1, 1)), dtype) for n in (1, keys))
        v = np.ones_like(k)
        case = Case((q, k, v), {"return_lse": True})
        truth, _, limits, invalid = baseline_limits(record, case, dtype)
        assert invalid is None
        found = {
            "kernel": _base_two()(q, k, v)[1],
            "ln2": _base_two(exponent=np.float16)(q, k, v)[1],
            "scores": _base_two(scores=dtype)(q, k, v)[1],
            "moved": truth["lse"] + 2e-6 * np.abs(truth["lse"]),
        }
        for name, lse in found.items():
            failed[name] += mismatch(lse, truth["lse"], limits["lse"], name="lse") is not None
    assert failed["kernel"] == 0
    assert min(failed["ln2"], failed["scores"], failed["moved"]) > 50


@given(st.floats(-1e30, 1e30, allow_nan=False))
def test_bfloat16_rounds_to_nearest_even(x: float) -> None:
    ours = round_to(np.array([x]), ml_dtypes.bfloat16)
    # ml_dtypes goes through float32 and rounds twice; the two differ only where that first rounding lies.
    exact = min(
        (float(candidate) for candidate in _neighbours(ours)), key=lambda value: (abs(value - x), _odd(value))
    )
    assert float(widen(ours)[0]) == exact


def _neighbours(x: np.ndarray) -> list[np.ndarray]:
    bits = x.view(np.uint16).astype(np.int32)
    near = [np.clip(bits + step, 0, 0xFFFF).astype(np.uint16).view(x.dtype) for step in (-1, 0, 1)]
    return [value.astype(np.float64)[0] for value in near if np.isfinite(value.astype(np.float64)[0])]


def _odd(value: float) -> int:
    return int(np.array([value], dtype=ml_dtypes.bfloat16).view(np.uint16)[0]) & 1


def test_special_values_survive_bfloat16() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e39], dtype=np.float64)
    back = widen(round_to(x, ml_dtypes.bfloat16))
    assert np.isnan(back[0])
    np.testing.assert_array_equal(back[1:], [np.inf, -np.inf, 0.0, -0.0, np.inf])
    assert np.signbit(back[4])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_ulp_is_numpys_spacing(dtype: type[np.floating]) -> None:
    x = np.array([1.0, 1.5, 1024.0, 0.1, 3e-3], dtype=dtype)
    np.testing.assert_array_equal(ulp(x, dtype), np.spacing(x).astype(np.float64))


def test_poisoned_memory_reaches_torch() -> None:
    torch = pytest.importorskip("torch")
    with poisoned():
        assert torch.isnan(torch.empty(3)).all()
        assert torch.empty(3, dtype=torch.int32).eq(1).all()
