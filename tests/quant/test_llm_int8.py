"""LLM.int8(): its parts bit by bit, both conventions, odd numbers, traffic and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.linear_io import linear_traffic
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import round_to
from refimpl.quant import (
    Int8Columns,
    dequantize_columns,
    dequantize_product,
    int8_matmul,
    llm_int8_linear,
    llm_int8_linear_fused,
    llm_int8_linear_vjp,
    outlier_columns,
    quantize_columns,
    quantize_rows,
)
from refimpl.quant.samples import sample_linear
from refimpl.testing import check

LINEARS = (llm_int8_linear, llm_int8_linear_fused)
CONVENTIONS: tuple[Any, ...] = ("released", "paper")


def drawn(seed: int, dtype: Any = np.float32, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    shape: dict[str, Any] = {"T": 5, "K": 33, "N": 7, "outliers": "some", "threshold": 6.0, "bias": False}
    case = sample_linear(np.random.default_rng(seed), **{**shape, **options})
    x, weight = (round_to(array, dtype) for array in case.args)
    return x, weight, dict(case.kwargs)


def test_the_released_factor_is_the_nearest_float32() -> None:
    """``MM_DEQUANT_CONST 6.200012e-05f`` of csrc/cuda/int8.cu; the CPU's 6.200124e-05 is a misprint of it."""
    assert np.float32(6.200012e-05) == np.float32(1 / 127**2)
    assert abs(6.200124e-05 * 127**2 - 1) > 1e-5


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_codes_bit_for_bit(seed: int, dtype: Any) -> None:
    """One division a row and one product a number, in float32 for narrow inputs: what a kernel must do."""
    x, weight, _ = drawn(seed, dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    rows, columns = quantize_rows(x), quantize_columns(weight)
    for t in range(x.shape[0]):
        absmax = max(abs(wide(value)) for value in x[t])
        factor = wide(127) / absmax
        assert rows.absmax[t] == absmax
        assert rows.codes[t].tolist() == [int(np.rint(wide(value) * factor)) for value in x[t]]
    for n in range(weight.shape[1]):
        absmax = max(abs(wide(value)) for value in weight[:, n])
        factor = wide(127) / absmax
        assert columns.codes[:, n].tolist() == [int(np.rint(wide(v) * factor)) for v in weight[:, n]]
    assert (rows.absmax.dtype, columns.absmax.dtype) == (wide, wide)


@pytest.mark.parametrize(("absmax", "code"), [(29.0, 63), (11.0, 64), (15.0, 63), (9.0, 64)])
def test_half_of_the_absmax(absmax: float, code: int) -> None:
    """63.5 steps in exact arithmetic: what the code becomes tells ``x * (127 / c)`` from its rewrites.

    ``x / (c / 127)`` and ``x * (1 / (c / 127))`` give another code for at least one of the four, and so does
    ``127 * x / c``, which rounds once and always gets the even 64.
    """
    for dtype in (np.float16, np.float32):
        x = np.array([[absmax, absmax / 2, -absmax / 2]], dtype)
        assert quantize_rows(x).codes.tolist() == [[127, code, -code]]
        assert quantize_columns(x.T).codes.T.tolist() == [[127, code, -code]]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_parts_make_the_whole(convention: Any, dtype: Any) -> None:
    x, weight, options = drawn(3, dtype, convention=convention)
    whole = llm_int8_linear(x, weight, **options, return_parts=True)
    rows = quantize_rows(x, threshold=6.0, convention=convention)
    columns = quantize_columns(weight)
    for part, expected in zip(whole[1:], (rows.codes, rows.absmax, *columns, rows.outliers), strict=True):
        np.testing.assert_array_equal(part, expected)
    assert 0 < rows.outliers.size < x.shape[1]
    product = int8_matmul(rows.codes, columns.codes)
    out = dequantize_product(product, rows.absmax, columns.absmax, dtype=x.dtype)
    aside = x[:, rows.outliers].astype(np.float64) @ (
        weight[rows.outliers] if convention == "paper" else dequantize_columns(columns, rows=rows.outliers)
    ).astype(np.float64)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(whole.out, out + aside, rtol=4 * eps, atol=60 * eps)
    assert whole.out.dtype == dtype


def test_conventions_differ_at_the_threshold() -> None:
    x = np.array([[6.0, 1.0, np.nextafter(6.0, 7.0)], [0.0, -6.0, 0.0]])
    assert outlier_columns(x, convention="released").tolist() == [0, 1, 2]
    assert outlier_columns(x, convention="paper").tolist() == [2]
    assert outlier_columns(x, threshold=None).tolist() == []
    assert outlier_columns(x.astype(np.float16), convention="paper").tolist() == []  # 6 and an ulp is 6


def test_row_absmax_in_an_outlier_column() -> None:
    """Released: cells below the threshold count although their column is set aside.  Paper: they do not."""
    x = np.array([[9.0, 0.5], [5.0, 0.25]])
    released, paper = (quantize_rows(x, threshold=6.0, convention=c) for c in CONVENTIONS)
    assert released.absmax.tolist() == [0.5, 5.0]
    assert paper.absmax.tolist() == [0.5, 0.25]
    assert released.codes.tolist() == [[0, 127], [0, 6]]
    assert paper.codes.tolist() == [[0, 127], [0, 127]]


def test_outliers_meet_the_weights_of_their_convention() -> None:
    x, weight = np.array([[100.0, 0.0]]), np.array([[0.001, 1.0], [1.0, 1.0]])
    released, paper = (llm_int8_linear(x, weight, convention=c) for c in CONVENTIONS)
    assert paper.tolist() == [[0.1, 100.0]]
    assert released.tolist() == [[0.0, 100.0]]  # 0.001 is less than half a step of a column that reaches 1


@pytest.mark.parametrize("f", LINEARS)
def test_stored_weights(f: Any) -> None:
    x, weight, options = drawn(5, bias=True)
    stored = quantize_columns(weight)
    options["bias"] = options["bias"].astype(np.float32)
    np.testing.assert_array_equal(f(x, stored, **options), f(x, weight, **options))
    with pytest.raises(OptionError, match="need 'released'"):
        f(x, stored, convention="paper")
    with pytest.raises(ShapeError, match="absmax"):
        f(x, Int8Columns(stored.codes, stored.absmax[:2]))


@pytest.mark.parametrize("f", LINEARS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_numbers_that_are_not_finite(f: Any, convention: Any) -> None:
    """They are outliers under a threshold, and without one they make their row NaN; never another row."""
    x, weight, options = drawn(7, np.float64, outliers="none", convention=convention)
    clean = f(x, weight, **options)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[2, 4] = bad
        out = f(spoilt, weight, **options)
        met = weight if convention == "paper" else dequantize_columns(quantize_columns(weight))
        expected = bad * met[4]
        assert not np.isfinite(out[2]).any()
        np.testing.assert_array_equal(np.isnan(out[2]), np.isnan(expected))
        assert np.isfinite(np.delete(out, 2, axis=0)).all()
        for threshold in (6.0, np.inf):
            assert outlier_columns(spoilt, threshold=threshold, convention=convention).tolist() == [4]
        unguarded = f(spoilt, weight, threshold=None, convention=convention)
        assert np.isnan(unguarded[2]).all()
        np.testing.assert_array_equal(np.delete(unguarded, 2, axis=0), np.delete(clean, 2, axis=0))
    with pytest.raises(OptionError, match=r"weight: expected finite numbers, got nan at \[0, 1\]"):
        f(x, np.where(np.arange(weight.size).reshape(weight.shape) == 1, np.nan, weight))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_and_columns_of_zeros(dtype: Any) -> None:
    x, weight = np.zeros((2, 3), dtype), np.ones((3, 2), dtype)
    x[1], weight[:, 1] = 0.5, 0
    rows, columns = quantize_rows(x), quantize_columns(weight)
    assert (rows.absmax.tolist(), columns.absmax.tolist()) == ([0, 0.5], [1, 0])
    np.testing.assert_allclose(llm_int8_linear(x, weight), [[0, 0], [1.5, 0]], rtol=1e-6)


def test_a_row_too_small_to_scale_is_a_row_of_zeros() -> None:
    x = np.array([[1e-38, -1e-39]], np.float32)
    rows = quantize_rows(x)
    assert rows.codes.tolist() == [[0, 0]]
    assert rows.absmax[0] == np.float32(1e-38)


@pytest.mark.parametrize("f", LINEARS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("outliers", ["none", "some", "all", None])
def test_traffic_is_what_the_model_says(f: Any, dtype: str, convention: Any, outliers: Any) -> None:
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    threshold = None if outliers is None else 6.0
    x, weight, options = drawn(11, kind, outliers=outliers or "none", threshold=threshold, bias=True)
    options.update(bias=round_to(options["bias"], kind), convention=convention)
    hbm = Memory()
    f(x, weight, **options, memory=hbm)
    expected = linear_traffic(
        algorithm="int8" if f is llm_int8_linear else "int8_fused",
        T=5, K=33, N=7, bias=True, convention=convention, itemsize=kind.itemsize,
        statistics_itemsize=8 if dtype == "float64" else 4,
        outliers=None if outliers is None else outlier_columns(x, convention=convention).size,
    )  # fmt: skip
    assert hbm.totals() == expected
    assert hbm.held == 0


def test_gradient_is_that_of_the_dequantised_layer() -> None:
    """The released backward: dY times the dequantised int8 weight, as autograd has it for a plain linear."""
    torch = pytest.importorskip("torch")
    x, weight, _ = drawn(13, np.float64)
    bias, dy = np.ones(7), np.random.default_rng(0).standard_normal((5, 7))
    values = dequantize_columns(quantize_columns(weight))
    tensors = [torch.from_numpy(array.copy()).requires_grad_() for array in (x, bias)]
    (tensors[0] @ torch.from_numpy(values) + tensors[1]).backward(torch.from_numpy(dy))
    gradients = llm_int8_linear_vjp(x, weight, dy, bias=bias, threshold=6.0)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ShapeError, match="dy"):
        llm_int8_linear_vjp(x, weight, dy[:3])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_fused_is_as_good_in_every_format(dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    report = check("quant.llm_int8", llm_int8_linear_fused, examples=6, dtypes=[dtype])
    assert not report.failed, report.failed[0]
    assert report.ok


def test_inner_dimension_up_to_the_limit() -> None:
    K = 131_072
    x, weight = np.ones((1, K), np.float16), np.ones((K, 2), np.float16)
    parts: Any = llm_int8_linear(x, weight, threshold=None, return_parts=True)
    assert int8_matmul(parts.x_codes, parts.weight_codes).tolist() == [[127 * 127 * K] * 2]
    wide = np.ones((1, 133_145), np.float32)
    with pytest.raises(OptionError, match="at most 133144"):
        llm_int8_linear(wide, wide.T)


def test_what_is_refused() -> None:
    x, weight = np.ones((2, 3)), np.ones((3, 4))
    for threshold in (0.0, -1.0, np.nan):
        with pytest.raises(OptionError, match="threshold: expected a number above 0, or None"):
            llm_int8_linear(x, weight, threshold=threshold)
    with pytest.raises(OptionError, match="convention"):
        llm_int8_linear(x, weight, convention="printed")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="convention"):
        quantize_rows(x, convention="printed")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="axis K"):
        llm_int8_linear(x, np.ones((4, 4)))
    with pytest.raises(ShapeError, match="bias"):
        llm_int8_linear(x, weight, bias=np.ones(3))
    with pytest.raises(ShapeError, match="x: expected 2 axes"):
        llm_int8_linear(np.ones((1, 2, 3)), weight)
    with pytest.raises(DTypeError, match="x"):
        llm_int8_linear(np.ones((2, 3), complex), weight)
    with pytest.raises(ShapeError, match="weight"):
        dequantize_columns(Int8Columns(np.ones((2, 2), np.int8), np.ones(3)))


def test_arguments_stay_as_they_were() -> None:
    x, weight, options = drawn(17)
    copies = x.copy(), weight.copy()
    llm_int8_linear(x, weight, **options)
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(weight, copies[1])


def test_the_epilogue_refuses_what_it_would_compute_wrongly() -> None:
    """Integer scales once gave zeros, and a bias of one number was broadcast."""
    product, rows, columns = np.ones((2, 3), np.int32), np.ones(2), np.ones(3)
    dtype = np.dtype(np.float64)
    whole = dequantize_product(product, np.ones(2, np.int64), columns, dtype=dtype)  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole, dequantize_product(product, rows, columns, dtype=dtype))
    assert whole.all()
    with pytest.raises(DTypeError, match="product: expected integers"):
        dequantize_product(product * 0.5, rows, columns, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="bias"):
        dequantize_product(product, rows, columns, dtype=dtype, bias=np.ones(1))
    with pytest.raises(DTypeError, match="weight codes"):
        llm_int8_linear(np.ones((1, 2)), Int8Columns(np.ones((2, 1)), np.ones(1)))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="weight absmax"):
        llm_int8_linear(np.ones((1, 2)), Int8Columns(np.ones((2, 1), np.int8), np.array([np.nan])))


def test_the_gradient_refuses_what_the_forward_pass_does() -> None:
    x, weight, dy = np.ones((1, 2)), np.ones((2, 3)), np.ones((1, 3))
    for options in ({"convention": "printed"}, {"threshold": -1.0}, {"nonsense": 1}):
        with pytest.raises(OptionError):
            llm_int8_linear_vjp(x, weight, dy, **options)  # type: ignore[arg-type]


def test_gradients_and_outlier_weights_are_rounded_to_the_dtype() -> None:
    """One outlier 8 meets a weight whose stored value, 3 of 127 parts of 0.1, is no float16."""
    weight = Int8Columns(np.array([[3]], np.int8), np.array([0.1], np.float32))
    x = np.array([[8.0]], np.float16)
    rounded = np.float16(np.float32(3) * np.float32(0.1) * np.float32(1 / 127))
    out = llm_int8_linear(x, weight, threshold=6.0)
    assert out[0, 0] == np.float16(8) * rounded
    dx = llm_int8_linear_vjp(x, weight, np.array([[4.0]], np.float16)).x
    assert dx.dtype == np.float16
    assert dx[0, 0] == np.float16(4) * rounded


def test_a_bias_is_added_before_rounding() -> None:
    """2049 is no float16: rounded first, 2048 + 1 would stay 2048, and 2049 + 1 is 2050."""
    product = np.array([[2049 * 127]], np.int32)
    out = dequantize_product(
        product, np.array([127.0], np.float32), np.array([1.0], np.float32),
        dtype=np.dtype(np.float16), bias=np.ones(1, np.float16),
    )  # fmt: skip
    assert out[0, 0] == 2050
