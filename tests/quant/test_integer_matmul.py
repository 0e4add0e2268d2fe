"""Integer products: exact up to the longest sum that int32 holds, refused beyond."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.quant import MAX_INNER, dequantize, int8_matmul, integer_matmul, uniform


@pytest.mark.parametrize("K", [131_072, 133_144])
def test_the_longest_sums(K: int) -> None:
    a = np.full((1, K), 127, np.int8)
    assert int8_matmul(a, a.T).tolist() == [[127 * 127 * K]]
    assert int8_matmul(a, -a.T).tolist() == [[-127 * 127 * K]]
    rng = np.random.default_rng(K)
    left, right = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((2, K), (K, 2)))
    product = int8_matmul(left, right)
    assert product.dtype == np.int32
    np.testing.assert_array_equal(product, left.astype(np.int64) @ right.astype(np.int64))


def test_one_more_may_overflow() -> None:
    assert MAX_INNER == 133_144
    assert 127 * 127 * MAX_INNER <= 2**31 - 1 < 127 * 127 * (MAX_INNER + 1)
    a = np.zeros((1, MAX_INNER + 1), np.int8)
    with pytest.raises(OptionError, match="133144"):
        int8_matmul(a, a.T)


def test_what_is_refused() -> None:
    a = np.ones((2, 3), np.int8)
    with pytest.raises(OptionError, match="-128"):
        int8_matmul(np.full((2, 3), -128, np.int8), a.T)
    with pytest.raises(DTypeError, match="b: expected int8"):
        int8_matmul(a, a.T.astype(np.int16))
    with pytest.raises(DTypeError, match="int8 or uint8"):
        integer_matmul(a.astype(np.int32), a.T)
    with pytest.raises(ShapeError, match="axis K"):
        int8_matmul(a, a)
    with pytest.raises(ShapeError, match="a_zero_point"):
        integer_matmul(a, a.T, a_zero_point=np.zeros((1, 3), np.int8))
    with pytest.raises(DTypeError, match="a_zero_point"):
        integer_matmul(a, a.T, a_zero_point=0.5)  # type: ignore[arg-type]


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    granularity=st.sampled_from(["tensor", "vector"]),
)
def test_the_dequantised_product_in_integers(seed: int, bits: int, signed: bool, granularity: str) -> None:
    """Jacob et al. eq. 7: the expanded sums are the product of the dequantised matrices, exactly."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((3, 20)), rng.standard_normal((20, 4))
    block_x, block_w = (None, None) if granularity == "tensor" else ((1, None), (None, 1))
    q_x = uniform(x, bits=bits, scheme="affine", block=block_x, signed=signed)
    q_w = uniform(w, bits=bits, scheme="affine", block=block_w, signed=signed)
    # Scales that are powers of two make the floating-point product exact as well.
    q_x, q_w = (q._replace(scale=np.exp2(np.round(np.log2(q.scale)))) for q in (q_x, q_w))
    product = integer_matmul(q_x.codes, q_w.codes, a_zero_point=q_x.zero_point, b_zero_point=q_w.zero_point)
    assert product.dtype == np.int64
    expected = dequantize(q_x, block=block_x) @ dequantize(q_w, block=block_w)
    np.testing.assert_array_equal(q_x.scale * product * q_w.scale, expected)
