"""Hopper int8 calls from end to end, their kernels played by NumPy; and mistakes around the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_backend.int8 import plan_hopper, product_hopper, rows_hopper, variant_hopper
from cuda_backend.int8.call_hopper import int8_matmul_hopper, quantize_rows_hopper, scaled_int8_matmul
from cuda_backend.int8.linear_hopper import llm_int8_linear_hopper, prepare_weight
from refimpl import quant
from refimpl.errors import OptionError, UnsupportedError
from refimpl.testing import check
from tests.cuda.int8_hopper_driver import forget_plans
from tests.cuda.int8_hopper_played import played
from tests.cuda.int8_judge import case_of, differing, linear_difference, matrix
from tests.cuda.judge import DTYPES

HALVES = ("float16", "bfloat16")
FUSED = "llm_int8_linear_fused"


CHANGES: dict[str, Callable[[list[int]], list[int]]] = {}  # to the arguments of a kernel


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    yield played(monkeypatch, CHANGES)
    forget_plans()


@pytest.mark.parametrize("orders", ["CF", "CC", "FF", "FC"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 32, 5), (5, 35, 9), (130, 40, 4300), (2, 0, 3), (0, 3, 2)])
def test_products(launched: list[SimpleNamespace], sizes: tuple[int, int, int], orders: str) -> None:
    M, K, N = sizes
    rng = np.random.default_rng(K)
    a = np.array(rng.integers(-127, 128, (M, K)), np.int8, order=orders[0])  # type: ignore[call-overload]
    b = np.array(rng.integers(-127, 128, (K, N)), np.int8, order=orders[1])  # type: ignore[call-overload]
    product = quant.int8_matmul(a, b)
    assert np.array_equal(int8_matmul_hopper(a, b), product)
    scales = rng.random(M, np.float32), rng.random(N, np.float32)
    for bias in (None, rng.standard_normal(N).astype(np.float16)):
        found = scaled_int8_matmul(a, b, a_absmax=scales[0], b_absmax=scales[1], dtype=np.float16, bias=bias)
        expected = quant.dequantize_product(product, *scales, dtype=np.dtype(np.float16), bias=bias)
        assert np.array_equal(found, expected)
    if sizes == (3, 32, 5) and orders == "CF":
        assert [item.name for item in launched] == ["narrow"] * 3, "nothing is copied that lies well"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(0, 5), st.integers(0, 40)),
    dtype=st.sampled_from(HALVES),
    threshold=st.sampled_from([None, 2.5, 6.0, 1e-60, 1e39]),
    convention=st.sampled_from(["released", "paper"]),
    special=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_rows(
    launched: list[SimpleNamespace],
    seed: int,
    shape: Any,
    dtype: str,
    threshold: Any,
    convention: Any,
    special: float,
) -> None:
    x = matrix(seed, shape, dtype, special)
    options = {"threshold": threshold, "convention": convention}
    with np.errstate(all="ignore"):
        expected = quant.quantize_rows(x, **options)
    for _ in range(2):  # the second finds what the first has left
        assert differing(quantize_rows_hopper(x, **options), expected) is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("convention", ["released", "paper"])
@pytest.mark.parametrize("outliers", ["none", "some", "all", "zero_row"])
def test_linear_layers(launched: list[SimpleNamespace], outliers: str, convention: str, dtype: str) -> None:
    for seed, (T, K, N) in enumerate(
        ((1, 1, 1), (5, 33, 7), (3, 64, 40), (2, 0, 3), (2, 3, 0), (0, 3, 2), (130, 40, 4300))
    ):
        case = case_of(seed, dtype, T=T, K=K, N=N, convention=convention, outliers=outliers)
        assert linear_difference(llm_int8_linear_hopper, FUSED, case, dtype) is None, (T, K, N)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("outliers", ["none", "some", "all", "zero_row"])
def test_layers_in_one_kernel(
    launched: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch, outliers: str, dtype: str
) -> None:
    """Of up to 16 rows, whatever the weight: as if no layer had too many columns for one kernel."""
    monkeypatch.setattr(variant_hopper, "FEW_COLUMNS", 1 << 30)
    for seed, (T, K, N) in enumerate(((1, 8, 1), (2, 136, 130), (3, 64, 40), (9, 40, 7), (16, 520, 9))):
        case = case_of(seed, dtype, T=T, K=K, N=N, convention="released", outliers=outliers)
        assert linear_difference(llm_int8_linear_hopper, FUSED, case, dtype) is None, (T, K, N)
        assert "layer_few" in [item.name for item in launched]
        del launched[:]


def test_more_outliers_than_find_room(
    launched: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (product_hopper, rows_hopper):
        monkeypatch.setattr(module, "side_by_side", lambda K: 16)
    for convention in ("released", "paper"):
        for T, N in ((3, 9), (130, 4300)):
            case = case_of(0, "float16", T=T, K=40, N=N, convention=convention, outliers="all")
            assert linear_difference(llm_int8_linear_hopper, FUSED, case, "float16") is None


def test_all_ways_to_give_a_weight(launched: list[SimpleNamespace]) -> None:
    for K in (32, 35, 40):
        case = case_of(0, "float16", T=3, K=K, N=5, outliers="some")
        x, weight = case.args
        expected = llm_int8_linear_hopper(x, weight)
        del launched[:]
        stored = quant.quantize_columns(weight)
        prepared = prepare_weight(quant.Int8Columns(np.asfortranarray(stored.codes), stored.absmax))
        assert np.array_equal(prepared.codes, stored.codes)
        assert np.array_equal(llm_int8_linear_hopper(x, stored), expected)
        assert np.array_equal(llm_int8_linear_hopper(x, prepared), expected)
    with pytest.raises(OptionError, match="int8 codes need 'released'"):
        llm_int8_linear_hopper(x, stored, convention="paper")


def test_options_are_those_of_the_reference(launched: list[SimpleNamespace]) -> None:
    x, weight = case_of(0, "float16", T=3, K=16, N=5).args
    with pytest.raises(OptionError, match="above 0"):
        llm_int8_linear_hopper(x, weight, threshold=0.0)
    with pytest.raises(OptionError, match="'paper' or 'released'"):
        quantize_rows_hopper(x, convention="other")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="got -128"):
        int8_matmul_hopper(np.full((2, 3), -128, np.int8), np.ones((3, 2), np.int8))


def inliers(T: int, K: int) -> Any:
    return np.clip(matrix(0, (T, K), "float16"), -2, 2).astype(DTYPES["float16"])


def refused(x: Any, weight: Any) -> None:
    """Make a call whose codes begin at an odd address, seen when x is quantised already."""
    run = plan_hopper.LinearPlan.run
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(
            plan_hopper.LinearPlan, "run", lambda self, x, codes, *rest: run(self, x, codes + 1, *rest)
        )
        with pytest.raises(UnsupportedError, match="multiple of 16"):
            llm_int8_linear_hopper(x, weight)


@pytest.mark.parametrize(("T", "N", "columns"), [(5, 7, 0), (5, 7, 1 << 30), (130, 4300, 0)])
def test_a_refused_call_leaves_no_marks(
    launched: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch, T: int, N: int, columns: int
) -> None:
    monkeypatch.setattr(variant_hopper, "FEW_COLUMNS", columns)
    x, weight = inliers(T, 32), matrix(1, (32, N), "float16")
    wild = x.copy()
    wild[2, 5], wild[3, 17] = 60.0, -50.0
    expected = llm_int8_linear_hopper(x, weight)
    refused(wild, weight)
    assert np.array_equal(llm_int8_linear_hopper(x, weight), expected)


def test_a_refused_call_leaves_counters_at_zero(
    launched: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shorter row the counters lie where a longer one has marks; the product asserts that they are 0."""
    monkeypatch.setattr(variant_hopper, "FEW_COLUMNS", 0)
    wild = inliers(5, 512)
    wild[2, 264] = 60.0
    refused(wild, matrix(1, (512, 7), "float16"))
    case = case_of(1, "float16", T=5, K=256, N=7).replace(inliers(5, 256), matrix(1, (256, 7), "float16"))
    assert linear_difference(llm_int8_linear_hopper, FUSED, case, "float16") is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("technique", "f"),
    [("quant.llm_int8_fused", llm_int8_linear_hopper), ("quant.int8_matmul", int8_matmul_hopper)],
)
def test_the_records_of_what_is_registered(
    launched: list[SimpleNamespace], technique: str, f: Any, dtype: str
) -> None:
    """Laws, reference, oracles' tolerances and edges, as `frugal verify --backend cuda` asks for them."""
    report = check(technique, f, backend="cuda", examples=6, dtypes=[dtype])
    assert not report.failed, report.failed[0]
    counts = report.counts()
    assert counts["passed"] > 20
    assert counts["refused"] == 0


# Mistakes around the kernels: each exchanges or shifts one argument, and must be seen.
MISTAKES: dict[str, tuple[str, Callable[[list[int]], list[int]]]] = {
    "scales exchanged": ("narrow", lambda v: [*v[:3], v[4], v[3], *v[5:]]),
    "no bias": ("narrow", lambda v: [*v[:5], 0, *v[6:]]),
    "row of x": ("quantize", lambda v: [v[0], v[1] - 2, *v[2:]]),
    "limit": ("quantize", lambda v: [*v[:7], v[7] + 1]),
    "marks stay": ("narrow", lambda v: [*v[:7], v[6], *v[8:]]),
    "weight turned": ("narrow", lambda v: [*v[:15], v[16], v[15], *v[17:]]),
    "outliers of another row": ("narrow", lambda v: [*v[:11], v[11] + 2, *v[12:]]),
    "a feature less": ("outliers", lambda v: [*v[:6], v[6] - 1]),
    "codes not cleared": ("outliers", lambda v: [*v[:3], v[3] + 1, *v[4:]]),
    "row of x, few": ("layer_few", lambda v: [*v[:2], v[2] - 16, *v[3:]]),
    "no scales, few": ("layer_few", lambda v: [*v[:4], v[4] + 4, *v[5:]]),
    "no bias, few": ("layer_few", lambda v: [*v[:5], 0, *v[6:]]),
    "limit, few": ("layer_few", lambda v: [*v[:14], v[14] + 1]),
    "weight turned, few": ("layer_few", lambda v: [*v[:7], v[8], v[7], *v[9:]]),
    "marks stay, many": ("product", lambda v: [*v[:9], v[8], *v[10:]]),
    "weight of outliers, many": ("product", lambda v: [*v[:13], v[13] + 1, *v[14:]]),
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_around_the_kernels_are_seen(
    launched: list[SimpleNamespace], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change = MISTAKES[wrong]
    K, (T, N) = 32, (130, 4300) if name == "product" else (5, 7)
    if name != "layer_few":
        monkeypatch.setattr(variant_hopper, "FEW_COLUMNS", 0)
    x = inliers(T, K)
    x[2, 5], x[3, K - 1], x[4, 7] = 6.0, 9.0, -20.0
    case = case_of(1, "float16", T=T, K=K, N=N).replace(x, matrix(1, (K, N), "float16"))
    assert linear_difference(llm_int8_linear_hopper, FUSED, case, "float16") is None
    monkeypatch.setitem(CHANGES, name, change)
    problems = [linear_difference(llm_int8_linear_hopper, FUSED, case, "float16") for _ in range(2)]
    plain = case.replace(np.clip(x, -2, 2), case.args[1])
    problems.append(linear_difference(llm_int8_linear_hopper, FUSED, plain, "float16"))
    assert any(problems)
