"""Bad input gets one clear line that says what, expected, got, where; good input is never changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.attention import (
    flash_attention,
    flash_attention_vjp,
    multi_head_attention,
    online_softmax,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
    standard_attention,
)
from refimpl.errors import DTypeError, OptionError, ShapeError, UnknownNameError
from refimpl.registry import get

ATTENTIONS = [scaled_dot_product_attention, standard_attention, flash_attention]
Q, K = np.ones((2, 5, 4, 8)), np.ones((2, 7, 2, 8))


@pytest.mark.parametrize("f", ATTENTIONS)
@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ((Q[0], K, K), ShapeError, "q: expected 4 axes"),
        ((Q, K[:1], K), ShapeError, "k: axis B must equal that of q; got 1, expected 2"),
        ((Q, K, K[:, :3]), ShapeError, "v: axis Tk must equal that of k; got 3, expected 7"),
        ((Q, K[..., :4], K), ShapeError, "k: axis D must equal that of q"),
        (
            (Q, np.ones((2, 7, 3, 8)), np.ones((2, 7, 3, 8))),
            ShapeError,
            "Hkv must divide Hq; got Hkv=3, Hq=4",
        ),
        ((Q[..., :0], K[..., :0], K), ShapeError, "axis D must be at least 1"),
        ((Q.astype(complex), K, K), DTypeError, "q: expected float64"),
        ((np.array([["a"]], dtype=object), K, K), DTypeError, "q: expected an array of numbers"),
        ((np.ma.masked_array(Q), K, K), DTypeError, "got a masked array"),
    ],
)
def test_arrays(f: Any, arrays: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        f(*arrays)


@pytest.mark.parametrize("f", ATTENTIONS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"causal": True}, OptionError, "ambiguous for Tq=5, Tk=7"),
        ({"causal": "upper_left"}, OptionError, "causal: expected False, True"),
        ({"attn_mask": np.ones((5, 7))}, DTypeError, "expected bool, True = attend, got float64"),
        ({"attn_mask": np.ones((7, 5), bool)}, ShapeError, "attn_mask: expected a shape that broadcasts"),
        ({"bias": np.ones((3, 7))}, ShapeError, "bias: expected a shape that broadcasts"),
        ({"alibi_slopes": np.ones(4)}, OptionError, "ambiguous for Tq=5, Tk=7"),
        (
            {"alibi_slopes": np.ones(3), "causal": "top_left"},
            ShapeError,
            r"alibi_slopes: expected shape \(4,\)",
        ),
        ({"softcap": 0.0}, OptionError, "softcap: expected a finite number above 0"),
        ({"softcap": -1.0}, OptionError, "softcap: expected a finite number above 0"),
        ({"scale": float("nan")}, OptionError, "scale: expected a finite number"),
        ({"scale": "big"}, DTypeError, "scale: expected a number, got str"),
        ({"dropout_p": -0.1}, OptionError, r"dropout_p: expected a number in \[0, 1\)"),
        ({"dropout_p": 1.0}, OptionError, r"dropout_p: expected a number in \[0, 1\)"),
        ({"dropout_p": float("nan")}, OptionError, r"dropout_p: expected a number in \[0, 1\)"),
        ({"dropout_p": 0.5, "rng": -1}, OptionError, "rng: expected a seed"),
        ({"dropout_mask": np.ones((5, 7), bool)}, OptionError, "dropout_mask: given, but dropout_p is 0"),
        ({"k_lengths": np.array([1, 8])}, OptionError, r"k_lengths: expected lengths in \[0, 7\]"),
        ({"k_lengths": np.array([1])}, ShapeError, r"k_lengths: expected shape \(2,\)"),
        ({"q_lengths": np.array([1.0, 2.0])}, DTypeError, "q_lengths: expected integers"),
    ],
)
def test_options(f: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        f(Q, K, K, **options)
    assert "\n" not in str(caught.value)


def test_bfloat16_mixes_with_nothing() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(DTypeError, match="bfloat16 does not mix"):
        scaled_dot_product_attention(Q.astype(ml_dtypes.bfloat16), K, K)


def test_gradient_shapes() -> None:
    with pytest.raises(ShapeError, match="do: axis Tq"):
        scaled_dot_product_attention_vjp(Q, K, K, Q[:, :3])
    with pytest.raises(ShapeError, match="lse"):
        flash_attention_vjp(Q, K, K, Q, np.ones((2, 5, 4)), Q)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (
            ((4, 6), (4, 6), (4, 6), (6, 4)),
            {"num_heads": 4},
            ShapeError,
            "6 columns do not divide into 4 heads",
        ),
        (((5, 6), (4, 6), (4, 6), (6, 4)), {"num_heads": 2}, ShapeError, "w_q: axis M"),
        (((4, 6), (4, 6), (4, 6), (5, 4)), {"num_heads": 2}, ShapeError, "w_o: expected 6 rows"),
        (((4, 6), (4, 6), (4, 6), (6, 4)), {"num_heads": 0}, OptionError, "num_heads: expected at least 1"),
        (((4, 6), (4, 6), (4, 6), (6, 4)), {"num_heads": 2, "b_q": np.ones(5)}, ShapeError, "b_q: expected"),
    ],
)
def test_multi_head(shapes: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multi_head_attention(np.ones((1, 3, 4)), *(np.ones(shape) for shape in shapes), **options)


def test_softmax_blocks() -> None:
    with pytest.raises(OptionError, match="block_size: expected at least 1"):
        online_softmax(np.ones(3), block_size=0)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown technique 'attention.flsh'; did you mean attention.flash"
    ):
        get("attention.flsh")


def test_integers_become_float64() -> None:
    out = scaled_dot_product_attention(Q.astype(int), K.astype(int), K.astype(int))
    assert out.dtype == np.float64


def test_bias_gradient_sums_over_broadcast_axes() -> None:
    """Against central differences, for a bias that lacks axes and one that is broadcast along some."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((2, 3, 2, 4)) for _ in range(4))
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    for shape in ((3,), (3, 1), (1, 2, 1, 3), (2, 1, 3, 3), (2, 2, 3, 3)):
        bias = rng.standard_normal(shape)
        direction = rng.standard_normal(shape)
        moved = (bias + step * direction for step in (1e-6, -1e-6))
        sides = [scaled_dot_product_attention(q, k, v, bias=side) for side in moved]
        numeric = np.sum(do * (sides[0] - sides[1])) / 2e-6
        dense = scaled_dot_product_attention_vjp(q, k, v, do, bias=bias).dbias
        out, lse = scaled_dot_product_attention(q, k, v, bias=bias, return_lse=True)
        tiled = flash_attention_vjp(q, k, v, out, lse, do, bias=bias, block_sizes=(2, 2)).dbias
        assert dense is not None
        assert tiled is not None
        assert dense.shape == tiled.shape == shape
        np.testing.assert_allclose(np.sum(dense * direction), numeric, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(tiled, dense, rtol=1e-12, atol=1e-12)
