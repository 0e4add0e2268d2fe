"""Uniform quantisation: PyTorch's codes and gradients, special cases, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.quant import (
    Quantized,
    dequantize,
    error,
    quantize,
    quantize_vjp,
    uniform,
    uniform_mse,
    uniform_sqnr,
)
from refimpl.quant.blocks import block_sizes, expand, reduce_blocks
from refimpl.quant.grid import round_half

SCHEMES: tuple[Any, ...] = ("symmetric", "symmetric_full", "affine")
BLOCKS: tuple[Any, ...] = (None, (1, None), (None, 1), (1, 8), (3, 5), (None, 4))
seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, rows=st.integers(0, 7), columns=st.integers(0, 20), block=st.sampled_from(BLOCKS))
def test_blocks_cover_the_array(seed: int, rows: int, columns: int, block: Any) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, columns))
    largest = expand(reduce_blocks(np.maximum, x, block), x.shape, block)
    high, wide = block_sizes(x.shape, block)
    for i, j in np.ndindex(x.shape):
        top, left = i // high * high, j // wide * wide
        assert largest[i, j] == max(x[a, b] for a in range(top, min(top + high, rows))
                                    for b in range(left, min(left + wide, columns)))  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@given(seed=seeds, signed=st.booleans())
def test_codes_are_those_of_torch(seed: int, signed: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x = (3 * rng.standard_normal(50)).astype(np.float32)
    scale, zero = 2.0 ** int(rng.integers(-7, -1)), int(rng.integers(-100, 100)) + (0 if signed else 100)
    kind = torch.qint8 if signed else torch.quint8
    judge = torch.quantize_per_tensor(torch.from_numpy(x), scale, zero, kind)
    given_scale, given_zero = np.array([scale], np.float32), np.array([zero])
    codes = quantize(x, given_scale, given_zero, scheme="affine", signed=signed)
    np.testing.assert_array_equal(codes, judge.int_repr().numpy())
    values = dequantize(Quantized(codes, given_scale, given_zero))
    np.testing.assert_array_equal(values, judge.dequantize().numpy())


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@given(seed=seeds)
def test_channel_codes_are_those_of_torch(seed: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 9)).astype(np.float32)
    scale = np.exp2(rng.integers(-8, -3, (5, 1))).astype(np.float32)
    judge = torch.quantize_per_channel(
        torch.from_numpy(x), torch.from_numpy(scale.ravel()), torch.zeros(5, dtype=torch.long), 0, torch.qint8
    )
    codes = quantize(x, scale, np.zeros((5, 1), np.int8), scheme="affine", block=(1, None))
    np.testing.assert_array_equal(codes, judge.int_repr().numpy())


@given(seed=seeds, bits=st.integers(2, 8))
def test_straight_through_gradient_is_that_of_torch(seed: int, bits: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(60).astype(np.float32)
    scale, zero = 2.0 ** (1 - bits), int(rng.integers(0, 2**bits))
    tensor = torch.from_numpy(x).requires_grad_()
    cotangent = rng.standard_normal(60).astype(np.float32)
    judge = torch.fake_quantize_per_tensor_affine(tensor, scale, zero, 0, 2**bits - 1)
    judge.backward(torch.from_numpy(cotangent))
    parameters = np.array([scale], np.float32), np.array([zero])
    options: Any = {"bits": bits, "scheme": "affine", "signed": False}
    gradient = quantize_vjp(x, *parameters, cotangent, **options)
    np.testing.assert_array_equal(gradient, tensor.grad.numpy())
    values = dequantize(Quantized(quantize(x, *parameters, **options), *parameters))
    np.testing.assert_array_equal(values, judge.detach().numpy())
    assert 0 < np.count_nonzero(gradient) < 60 or bits > 6  # the mask is at work


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block", BLOCKS)
@given(seed=seeds, bits=st.integers(2, 8), signed=st.booleans())
def test_codes_are_fixed_points_of_their_grid(
    scheme: Any, block: Any, seed: int, bits: int, signed: bool
) -> None:
    x = np.random.default_rng(seed).standard_normal((4, 11))
    options: Any = {"bits": bits, "scheme": scheme, "block": block, "signed": signed}
    q = uniform(x, **options)
    again = quantize(dequantize(q, block=block), q.scale, q.zero_point, **options)
    np.testing.assert_array_equal(again, q.codes)


def test_onnx_dynamic_quantize_linear() -> None:
    """The affine scheme in uint8 is the operator, ranges and zero point included."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    info = onnx.helper.make_tensor_value_info
    outputs = [info(name, kind, None) for name, kind in (("y", 2), ("scale", 1), ("zero", 2))]
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, None)], outputs)
    session = ReferenceEvaluator(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    )
    rng = np.random.default_rng(0)
    for scale, shift in ((1.0, 0.0), (5.0, 9.0), (0.01, -3.0)):
        x = (scale * rng.standard_normal(200) + shift).astype(np.float32)
        codes, step, zero = session.run(None, {"x": x})
        q = uniform(x, scheme="affine", signed=False)
        assert q.scale.dtype == np.float32
        assert (q.scale[0], q.zero_point[0]) == (step, zero)
        np.testing.assert_array_equal(q.codes, codes)


def test_halves() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, np.nextafter(0.5, 0)])
    assert round_half(x, "half_even").tolist() == [0, 2, 2, 0, -2, -2, 0]
    assert round_half(x, "half_away").tolist() == [1, 2, 3, -1, -2, -3, 0]
    with pytest.raises(OptionError, match="half_even"):
        round_half(x, "half_up")  # type: ignore[arg-type]


def test_the_negative_end() -> None:
    """-128 is a code of the full range and not of the restricted one, and the scale is another."""
    x = np.array([-4.0, 4.0])
    assert uniform(x).codes.tolist() == [-127, 127]
    full = uniform(x, scheme="symmetric_full")
    assert full.codes.tolist() == [-128, 127]
    assert full.scale[0] == 4 / 127.5
    assert uniform(x, scheme="symmetric_full", signed=False).codes.tolist() == [0, 255]
    assert uniform(x, signed=False).codes.tolist() == [1, 255]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_of_zeros_has_scale_one(scheme: Any) -> None:
    x = np.array([[0.0, 0.0], [1.0, -2.0]])
    q = uniform(x, scheme=scheme, block=(1, None))
    assert q.scale[0, 0] == 1
    np.testing.assert_array_equal(dequantize(q, block=(1, None))[0], 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_constant_is_represented(scheme: Any) -> None:
    x = np.full(5, -3.0)
    values = dequantize(uniform(x, scheme=scheme))
    assert np.max(np.abs(values - x)) <= 3 / 254


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_are_never_subnormal(scheme: Any) -> None:
    x = np.array([5e-324, -1e-310, 0.0])
    q = uniform(x, scheme=scheme)
    assert q.scale[0] >= np.finfo(np.float64).tiny
    assert np.all(np.abs(dequantize(q) - x) <= q.scale[0] / 2)


def test_narrow_inputs_have_float32_scales() -> None:
    for dtype in (np.float16, np.float32):
        q = uniform(np.ones(3, dtype))
        assert (q.scale.dtype, dequantize(q).dtype) == (np.float32, np.float32)
    assert uniform([1, 2, 3]).scale.dtype == np.float64
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    brain = uniform(x.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(brain.codes, uniform(x.astype(ml_dtypes.bfloat16).astype(np.float32)).codes)


def test_numbers_beyond_the_grid_saturate() -> None:
    codes = quantize(np.array([1e308, -1e308]), np.array([1e-300]), np.array([0]))
    assert codes.tolist() == [127, -127]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.array([[1.0, 2.0], [bad, 0.0]])
    for call in (lambda: uniform(x), lambda: quantize(x, np.ones((1, 1)), np.zeros((1, 1), np.int8))):
        with pytest.raises(OptionError, match=r"x: expected finite numbers, got .* at \[1, 0\]"):
            call()


def test_what_is_refused() -> None:
    x = np.ones((2, 3))
    with pytest.raises(OptionError, match="bits"):
        uniform(x, bits=9)
    with pytest.raises(OptionError, match="bits"):
        uniform(x, bits=1)
    with pytest.raises(OptionError, match="scheme"):
        uniform(x, scheme="logarithmic")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="each of the 2 axes"):
        uniform(x, block=(1,))
    with pytest.raises(OptionError, match="at least 1"):
        uniform(x, block=(0, 1))
    with pytest.raises(OptionError, match="range of x"):
        uniform(np.array([1.7e308, -1.7e308]), scheme="affine")
    with pytest.raises(OptionError, match="above 0"):
        quantize(x, np.zeros((1, 1)), np.zeros((1, 1), np.int8))
    with pytest.raises(OptionError, match=r"into \(2,\) blocks"):
        quantize(np.ones(3), np.ones(1), np.zeros(1, np.int8), block=(2,))
    with pytest.raises(ShapeError, match="dy"):
        quantize_vjp(x, np.ones((1, 1)), np.zeros((1, 1), np.int8), np.ones(3))
    with pytest.raises(DTypeError):
        uniform(np.ones(2, complex))
    with pytest.raises(ShapeError, match="quantized"):
        error(x, np.ones(3))
    with pytest.raises(OptionError, match="scale"):
        uniform_mse(0.0)


def test_sizes_zero_and_one() -> None:
    for shape in ((0,), (0, 3), (3, 0)):
        q = uniform(np.zeros(shape), block=(1,) * len(shape))
        assert q.codes.shape == q.scale.shape == dequantize(q, block=(1,) * len(shape)).shape == shape
    scalar = uniform(np.array(-2.0))
    assert (int(scalar.codes), float(scalar.scale)) == (-127, 2 / 127)
    assert error(np.empty(0), np.empty(0)).sqnr_db == math.inf


def test_theory_of_the_error() -> None:
    """Uniform numbers lose S²/12, and 6.02 dB for every bit less."""
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    ratios = []
    for bits in range(2, 9):
        step = 2.0 ** (1 - bits)  # 2**bits steps of the affine grid -1, ..., 1 - step; half a step is moved
        parameters = np.array([step]), np.array([0])
        codes = quantize(x - step / 2, *parameters, bits=bits, scheme="affine")
        found = error(x, dequantize(Quantized(codes, *parameters)) + step / 2)
        assert found.mse == pytest.approx(uniform_mse(step), rel=0.02)
        assert found.sqnr_db == pytest.approx(uniform_sqnr(bits), abs=0.1)
        assert abs(float(np.mean(found.error))) < 4 * step / math.sqrt(12 * x.size)
        ratios.append(found.sqnr_db)
    assert np.diff(ratios) == pytest.approx(6.02, abs=0.1)
    assert error(np.zeros(2), np.ones(2)).sqnr_db == -math.inf


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@pytest.mark.parametrize("low", [-63.5, -63.499996, -0.5])
def test_unsigned_codes_are_the_signed_ones_shifted(rounding: Any, low: float) -> None:
    """Also where the zero point lies at a tie, or next to one in float32."""
    x = np.array([low, low + 255], np.float32)
    signed, unsigned = (uniform(x, scheme="affine", signed=s, rounding=rounding) for s in (True, False))
    np.testing.assert_array_equal(signed.codes.astype(int) + 128, unsigned.codes)
    np.testing.assert_array_equal(signed.zero_point.astype(int) + 128, unsigned.zero_point)
