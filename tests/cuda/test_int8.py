"""The portable int8 kernels in Numba's simulator: codes, products, linear layers, and mistakes in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_backend
from cuda_backend.arrays import poisoned_outputs
from cuda_backend.int8 import arithmetic, gemm, quantize
from cuda_backend.int8.gemm import dequantize_product, int8_matmul
from cuda_backend.int8.linear import llm_int8_linear, llm_int8_linear_fused
from cuda_backend.int8.quantize import outlier_columns, quantize_columns, quantize_rows
from refimpl import quant
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from refimpl.quant import Int8Columns
from refimpl.quant.absmax import outlier_columns as reference_outliers
from refimpl.registry import Case
from refimpl.testing import check
from tests.cuda.int8_judge import DTYPES, NAMES, case_of, differing, linear_difference, matrix, numbers

pytestmark = pytest.mark.cudasim

LINEAR = {"llm_int8_linear": llm_int8_linear, "llm_int8_linear_fused": llm_int8_linear_fused}
CONVENTIONS = ("released", "paper")


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(0, 5), st.integers(0, 25)),
    dtype=st.sampled_from(sorted(DTYPES)),
    threshold=st.sampled_from([None, 2.5, 6.0, 1e-60, 1e39]),
    convention=st.sampled_from(CONVENTIONS),
    special=st.sampled_from([0.0, 0.1, 0.5]),
    layout=st.sampled_from(["C", "F", "every second"]),
)
def test_rows_equal_the_reference(
    seed: int, shape: Any, dtype: str, threshold: Any, convention: Any, special: float, layout: str
) -> None:
    x = matrix(seed, shape, dtype, special)
    if layout == "F":
        x = np.asfortranarray(x)
    elif layout == "every second":
        x = np.repeat(x, 2, axis=1)[:, ::2]
    options = {"threshold": threshold, "convention": convention}
    with np.errstate(all="ignore"):
        expected = quant.quantize_rows(x, **options)
    with poisoned_outputs():
        assert differing(quantize_rows(x, **options), expected) is None


@pytest.mark.parametrize("width", [1, 8, 9, 23, 24, 25])  # around a round of the scan, wide reads and bytes
def test_outlier_columns_in_order(width: int) -> None:
    x = matrix(width, (33, width), "float32", 0.02)
    for convention in CONVENTIONS:
        expected = reference_outliers(x, convention=convention)  # type: ignore[arg-type]
        assert np.array_equal(outlier_columns(x, convention=convention), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (12, 5), (13, 4)])
def test_columns_equal_the_reference(shape: tuple[int, int], order: Any) -> None:
    for dtype in DTYPES:
        weight = np.array(matrix(1, shape, dtype), order=order)
        weight[:, -1:] = 0
        found = quantize_columns(weight)
        assert differing(found, quant.quantize_columns(weight)) is None
        assert found.codes.flags.f_contiguous


def test_ties_go_to_the_even_code() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], np.float32)
    assert quantize_rows(x).codes.tolist() == [[127, 0, 2, 2, 0, -2, 126]]


def test_rows_without_codes() -> None:
    """Zeros, and numbers so small that 127 / absmax is infinite, have codes 0; NaN and infinity stay seen."""
    x = np.array([[0, 0], [1e-40, -1e-40], [np.nan, 1], [1, np.inf]], np.float32)
    codes, absmax, _ = quantize_rows(x)
    assert not codes.any()
    assert np.array_equal(absmax, np.array([0, 1e-40, np.nan, np.inf], np.float32), equal_nan=True)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 9)),
    orders=st.tuples(st.sampled_from("CF"), st.sampled_from("CF")),
)
def test_products_are_exact(seed: int, sizes: tuple[int, int, int], orders: Any) -> None:
    M, K, N = sizes
    rng = np.random.default_rng(seed)
    a = np.array(rng.integers(-127, 128, (M, K)), np.int8, order=orders[0])
    b = np.array(rng.integers(-127, 128, (K, N)), np.int8, order=orders[1])
    with poisoned_outputs():
        found = int8_matmul(a, b)
    assert found.dtype == np.int32
    assert np.array_equal(found, a.astype(np.int64) @ b.astype(np.int64))


@pytest.mark.parametrize("K", [1064, 1067])  # words and bytes
def test_long_sums_beyond_float32(K: int) -> None:
    a, b = np.full((1, K), 127, np.int8), np.full((K, 2), -127, np.int8, order="F")
    assert K * 127**2 > 2**24
    assert int8_matmul(a, b).tolist() == [[-K * 127**2] * 2]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_epilogue_equals_the_reference(dtype: str) -> None:
    rng = np.random.default_rng(0)
    product = rng.integers(-(2**31), 2**31, (5, 7), dtype=np.int32)
    scales = [rng.random(n, np.float32) * np.float32(1e-4) for n in (5, 7)]
    scales[0][2] = np.nan
    bias = rng.standard_normal(7).astype(DTYPES[dtype])
    for options in ({}, {"bias": bias}):
        found = dequantize_product(product, *scales, dtype=DTYPES[dtype], **options)
        expected = quant.dequantize_product(product, *scales, dtype=DTYPES[dtype], **options)  # type: ignore[arg-type]
        assert found.dtype == expected.dtype
        assert np.array_equal(numbers(found), numbers(expected), equal_nan=True)


@pytest.mark.parametrize("outliers", ["none", "some", "all", "zero_row"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_linear_layers(name: str, convention: str, outliers: str) -> None:
    for seed, (dtype, K) in enumerate(zip(DTYPES, (7, 16, 12), strict=True)):
        case = case_of(seed, dtype, T=5, K=K, N=6, convention=convention, outliers=outliers)
        assert linear_difference(LINEAR[name], name, case, dtype) is None


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (1, 1, 1), (4, 8, 4), (5, 9, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_around_a_tile(name: str, sizes: tuple[int, int, int]) -> None:
    T, K, N = sizes
    case = case_of(3, "float32", T=T, K=K, N=N)
    assert linear_difference(LINEAR[name], name, case, "float32") is None


def test_weights_quantised_once_give_the_same_bits() -> None:
    case = case_of(0, "float16", T=5, K=12, N=6)
    x, weight = case.args
    stored = quantize_columns(weight)
    for f in LINEAR.values():
        whole, again = (case.replace(x, w).call(f) for w in (weight, stored))
        assert np.array_equal(whole, again)
        assert np.array_equal(whole, case.call(f))
    parts = llm_int8_linear_fused(x, stored, return_parts=True)
    assert parts.weight_codes is stored.codes


def test_nan_and_infinity_stay_in_their_row() -> None:
    x, weight = (array.astype(np.float32) for array in case_of(1, "float32", T=4, K=9, N=3).args)
    x[1, 2], x[2, 5] = np.nan, -np.inf
    for f in LINEAR.values():
        with_outliers, without = f(x, weight), f(x, weight, threshold=None)
        assert np.isnan(with_outliers[1]).all()
        assert not np.isfinite(with_outliers[2]).any()
        assert np.isfinite(with_outliers[[0, 3]]).all()
        assert np.isnan(without[[1, 2]]).all()
        assert np.isfinite(without[[0, 3]]).all()


# Mistakes: each changes one thing that a kernel does, and must be seen by the tests above and by the laws.
MISTAKES = ("half up", "threshold", "scales exchanged", "last tile of K", "last outlier", "row of the scale")


def break_kernels(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    real_launch, real_limit = gemm.launch, quantize.inlier_limit

    def launch(kernel: Any, arguments: Any, **shape: Any) -> None:
        changed = list(arguments)
        if wrong == "last tile of K":
            changed[2] = np.int64(int(changed[2]) // 8 * 8)
        if wrong == "scales exchanged":
            changed[4], changed[5] = changed[5], changed[4]
        if wrong == "row of the scale":
            changed[4] = changed[4]._replace(owner=np.roll(changed[4].owner, 1))
        if wrong == "last outlier":
            changed[10] = changed[10]._replace(owner=np.maximum(changed[10].owner - 1, 0))
        real_launch(kernel, changed, **shape)

    if wrong == "half up":
        monkeypatch.setattr(arithmetic, "nearest", lambda x: int(np.floor(x + 0.5)))
    elif wrong == "threshold":
        other = {"released": "paper", "paper": "released"}
        monkeypatch.setattr(quantize, "inlier_limit", lambda t, c: real_limit(t, other[c]))  # type: ignore[arg-type]
    else:
        monkeypatch.setattr(gemm, "launch", launch)


def broken_case() -> Case:
    """Return a call in which each mistake shows: ties, a number at the threshold, an odd K, two outliers."""
    x = matrix(0, (5, 13), "float32")
    x = np.clip(x, -2, 2)
    x[:, 0], x[0, :4] = 4.0, [127 / 32, 0.5 / 32, 2.5 / 32, 4.5 / 32]
    x[2, 5], x[3, 12], x[4, 7] = 6.0, 9.0, -20.0
    return Case((x, matrix(1, (13, 5), "float32")), {"threshold": 6.0})


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_in_kernels_are_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, name = broken_case(), "llm_int8_linear_fused"
    assert linear_difference(llm_int8_linear_fused, name, case, "float32") is None
    break_kernels(monkeypatch, wrong)
    assert linear_difference(llm_int8_linear_fused, name, case, "float32") is not None


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_in_kernels_break_laws(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {
        "T": 3,
        "K": 11,
        "N": 3,
        "outliers": "some",
        "threshold": 6.0,
        "convention": "released",
        "bias": False,
    }
    break_kernels(monkeypatch, wrong)
    report = check(
        "quant.llm_int8_fused", llm_int8_linear_fused, backend="cudasim", axes=axes, dtypes=("float32",)
    )
    assert {outcome.check for outcome in report.failed} - {"reference"}


def test_refusals() -> None:
    x, weight = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    codes = np.ones((3, 4), np.int8)
    with pytest.raises(ShapeError, match="axis K must equal that of x"):
        llm_int8_linear(x, weight[:2])
    with pytest.raises(ShapeError, match="axis N must equal"):
        llm_int8_linear(x, weight, bias=np.ones(3, np.float32))
    with pytest.raises(ShapeError, match="expected 2 axes"):
        quantize_rows(x[0])
    with pytest.raises(ShapeError, match="axis K must equal that of a"):
        int8_matmul(codes, codes)
    with pytest.raises(OptionError, match="threshold: expected a number above 0"):
        llm_int8_linear_fused(x, weight, threshold=-1.0)
    with pytest.raises(OptionError, match="expected 'paper' or 'released'"):
        quantize_rows(x, convention="other")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="int8 codes need 'released'"):
        llm_int8_linear(x, quantize_columns(weight), convention="paper")
    with pytest.raises(OptionError, match="weight: expected finite numbers, got nan in column 1"):
        quantize_columns(np.where(np.arange(4) == 1, np.nan, weight))
    with pytest.raises(OptionError, match=r"b: expected codes in \[-127, 127\], got -128"):
        int8_matmul(codes.T, np.where(codes == 1, -128, 0).astype(np.int8))
    with pytest.raises(OptionError, match="K: expected at most 133144"):
        int8_matmul(np.ones((1, 133_145), np.int8), np.ones((133_145, 1), np.int8))
    with pytest.raises(DTypeError, match="a: expected int8, got float32"):
        int8_matmul(x, codes)
    with pytest.raises(DTypeError, match="weight absmax: expected float32, got float64"):
        llm_int8_linear(x, Int8Columns(codes, np.ones(4)))
    with pytest.raises(DTypeError, match="product: expected int32, got int64"):
        dequantize_product(np.ones((2, 4), np.int64), x[:, 0], weight[0], dtype=np.float32)
    with pytest.raises(UnsupportedError, match="inputs are float64; the kernel takes float32"):
        llm_int8_linear(x.astype(np.float64), weight)
    with pytest.raises(UnsupportedError, match="dequantize_product: inputs are float64"):
        dequantize_product(np.ones((2, 4), np.int32), x[:, 0], weight[0], dtype=np.float64)


def test_arrays_of_other_libraries_are_refused_in_words() -> None:
    kind = type("Tensor", (), {"__module__": "torch", "dtype": "torch.float16", "is_cuda": True})
    x = kind()
    x.shape = (2, 3)
    host = np.ones((3, 4), np.float32)
    with pytest.raises(DTypeError, match="expected arrays of one library"):
        llm_int8_linear(x, host)
    with pytest.raises(DTypeError, match="expected arrays of one library"):
        llm_int8_linear(x, quantize_columns(host))
    other = kind()
    other.shape, other.dtype = (3, 4), "torch.float32"
    with pytest.raises(DTypeError, match="x, weight: expected one dtype"):
        llm_int8_linear(x, other)
    with pytest.raises(DTypeError, match="x: the simulator takes NumPy arrays, got Tensor"):
        quantize_rows(x)


def test_the_package_names_them() -> None:
    for name in ("quantize_rows", "quantize_columns", "outlier_columns", "int8_matmul", "dequantize_product"):
        assert callable(getattr(cuda_backend, name))
    assert cuda_backend.llm_int8_linear is llm_int8_linear
