"""What an int8 product needs around it: operands that fit, scales and bias, and the outliers' own product."""

from __future__ import annotations

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import Array, FloatArray, IntArray, contract, round_to, widen
from refimpl.quant.absmax import (
    LIMIT,
    Convention,
    Int8Columns,
    Int8Rows,
    dequantize_columns,
    quantize_columns,
)
from refimpl.validation import as_array, bind_axes, floating

__all__ = ["dequantize_product", "linear_operands", "outlier_product", "scaled_product", "stored_weight"]


def dequantize_product(
    product: IntArray,
    x_absmax: FloatArray,
    weight_absmax: FloatArray,
    /,
    *,
    dtype: np.dtype[np.floating],
    bias: FloatArray | None = None,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``product * c_x * c_w / 127² + bias``, rounded to `dtype`: the epilogue.

    Parameters
    ----------
    product : ndarray of int32, shape (T, N)
        As from `int8_matmul`.
    x_absmax, weight_absmax : ndarray of float, shapes (T,) and (N,)
        As from `quantize_rows` and `quantize_columns`; the arithmetic is done in their dtype.
    dtype : dtype
        Of the result.
    bias : ndarray of float, shape (N,), optional
        Added before rounding.
    memory : Memory, optional
        Counts what moves.

    Returns
    -------
    ndarray of float, shape (T, N)

    Raises
    ------
    ShapeError
        If the arrays do not fit.
    DTypeError
        If the product holds no integers, or an absmax or the bias no floating-point numbers.

    References
    ----------
    .. [1] bitsandbytes @12297f3, csrc/cuda/int8.cu, ``kdequant_mm_int32_fp16``, where the last product and
       the bias are one fused multiply-add.

    Examples
    --------
    >>> dequantize_product(np.array([[16129]]), np.array([2.0]), np.array([0.5]), dtype=np.dtype(np.float64))
    array([[1.]])
    """
    product, dtype = as_array("product", product), np.dtype(dtype)
    if product.dtype.kind != "i":
        raise DTypeError(f"product: expected integers, got {product.dtype}")
    x_absmax, weight_absmax = floating(x_absmax=x_absmax, weight_absmax=weight_absmax)
    axes: dict[str, tuple[Array, str]] = {"product": (product, "T N")}
    axes |= {"x_absmax": (x_absmax, "T"), "weight_absmax": (weight_absmax, "N")}
    if bias is not None:
        (bias,) = floating(bias=bias)
        axes["bias"] = (bias, "N")
    bind_axes(axes)
    hbm = memory or Memory()
    out = np.empty(product.shape, dtype)
    with hbm.on_chip():
        accumulated = hbm.load("int32 product", product)
        total = scaled_product(
            accumulated, hbm.load("X absmax", x_absmax), hbm.load("W absmax", weight_absmax)
        )
        if bias is not None:
            total = total + widen(hbm.load("bias", bias))
        hbm.store("Y", out, None, round_to(total, dtype))
    return out


def scaled_product(product: IntArray, x_absmax: FloatArray, weight_absmax: FloatArray) -> FloatArray:
    """Return ``((product * c_x) * c_w) / 127²``, in this order, each rounded in the dtype of the absmax."""
    wide = x_absmax.dtype
    with np.errstate(invalid="ignore", over="ignore"):  # a row that holds NaN or infinity becomes NaN
        rows = product.astype(wide) * x_absmax[:, None]
        scaled: FloatArray = rows * weight_absmax.astype(wide) * wide.type(1 / LIMIT**2)
    return scaled


def outlier_product(
    hbm: Memory,
    x: FloatArray,
    given: FloatArray | Int8Columns,
    w: Int8Columns,
    rows: Int8Rows,
    convention: Convention,
    *,
    scales_on_chip: bool = False,
) -> FloatArray:
    """Return the product of the outlier columns of `x` with their rows of the weight, in the wide dtype."""
    outliers = hbm.load("outliers", rows.outliers)
    features = widen(hbm.load("X outliers", x[:, outliers]))
    if convention == "released":
        codes = hbm.load("W outlier codes", w.codes[outliers])
        absmax = w.absmax if scales_on_chip else hbm.load("W absmax", w.absmax)
        weights = widen(round_to(dequantize_columns(Int8Columns(codes, absmax)), x.dtype))
    else:
        weights = widen(hbm.load("W outliers", np.asarray(given)[outliers]))
    with np.errstate(invalid="ignore", over="ignore"):  # infinity times 0 is NaN, and stays in its row
        return contract("tk,kn->tn", features, weights)


def linear_operands(
    x: FloatArray, weight: FloatArray | Int8Columns, bias: FloatArray | None
) -> tuple[FloatArray, FloatArray | Int8Columns, FloatArray | None]:
    """Return the operands as arrays of one floating dtype that fit together."""
    named: dict[str, Array | FloatArray] = {"x": x}
    if not isinstance(weight, Int8Columns):
        named["weight"] = weight
    if bias is not None:
        named["bias"] = bias
    found = dict(zip(named, floating(**named), strict=True))
    given: FloatArray | Int8Columns = found.get("weight", weight)
    if isinstance(given, Int8Columns):
        given = Int8Columns(as_array("weight codes", given.codes), as_array("weight absmax", given.absmax))
    matrix = given.codes if isinstance(given, Int8Columns) else given
    axes = {"x": (found["x"], "T K"), "weight": (matrix, "K N")}
    if bias is not None:
        axes["bias"] = (found["bias"], "N")
    bind_axes(axes)
    return found["x"], given, found.get("bias")


def stored_weight(
    weight: FloatArray | Int8Columns, convention: Convention, threshold: float | None
) -> Int8Columns:
    """Return the weight in int8, quantised now if it is not yet."""
    if not isinstance(weight, Int8Columns):
        return quantize_columns(weight)
    if convention == "paper" and threshold is not None:
        raise OptionError(
            "convention: 'paper' multiplies outliers with the weights as given; int8 codes need 'released'"
        )
    if weight.codes.dtype != np.int8 or np.any(weight.codes == -128):
        held = weight.codes.dtype if weight.codes.dtype != np.int8 else "-128"
        raise DTypeError(f"weight codes: expected int8 in [-127, 127], got {held}")
    if weight.absmax.dtype.kind != "f" or not np.all(np.isfinite(weight.absmax)):
        raise OptionError(
            f"weight absmax: expected finite floats, got {weight.absmax.dtype} or NaN, infinity"
        )
    if weight.absmax.shape != weight.codes.shape[1:]:
        raise ShapeError(f"weight absmax: expected shape {weight.codes.shape[1:]}, got {weight.absmax.shape}")
    return weight
