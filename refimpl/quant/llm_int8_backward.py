"""The straight-through gradient of LLM.int8()."""

from __future__ import annotations

from typing import NamedTuple, TypedDict, Unpack

import numpy as np

from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, round_to, wide_dtype, widen
from refimpl.quant.absmax import Convention, Int8Columns, dequantize_columns, outlier_columns
from refimpl.quant.epilogue import linear_operands, stored_weight
from refimpl.validation import bind_axes, floating

__all__ = ["Int8LinearGradients", "Int8LinearOptions", "llm_int8_linear_vjp"]


class Int8LinearGradients(NamedTuple):
    """Gradients of the input [T, K] and of the bias [N]; a weight stored in int8 has none."""

    x: FloatArray
    bias: FloatArray


class Int8LinearOptions(TypedDict, total=False):
    """Options of `llm_int8_linear`."""

    bias: FloatArray | None
    threshold: float | None
    convention: Convention
    return_parts: bool
    memory: Memory | None


def llm_int8_linear_vjp(
    x: FloatArray,
    weight: FloatArray | Int8Columns,
    dy: FloatArray,
    /,
    **options: Unpack[Int8LinearOptions],
) -> Int8LinearGradients:
    """Return the straight-through gradients of `llm_int8_linear`, as the released autograd function has them.

    ``dX = dY Wᵀ`` with the dequantised int8 weight, in outlier columns too; the rounding of x is taken for
    the identity, and its absmax for a constant.

    Parameters
    ----------
    x, weight
        As for `llm_int8_linear`.
    dy : ndarray of float, shape (T, N)
        Gradient of the output.
    **options
        Those of the forward call; none of them changes the gradient: also under the convention of the
        paper, whose forward pass meets outliers with the weights as given, dX is that of the int8 weights.

    Returns
    -------
    Int8LinearGradients
        In the dtype of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `llm_int8_linear`.

    References
    ----------
    .. [1] bitsandbytes @0155ecc, autograd/_functions.py, ``MatMul8bitLt.backward`` with weights in int8.

    Examples
    --------
    >>> llm_int8_linear_vjp(np.ones((1, 2)), np.diag([2.0, 4.0]), np.ones((1, 2))).x
    array([[2., 4.]])
    """
    unknown = set(options) - set(Int8LinearOptions.__annotations__)
    if unknown:
        raise OptionError(f"llm_int8_linear_vjp takes no option {', '.join(sorted(unknown))}")
    x, given, _ = linear_operands(x, weight, options.get("bias"))
    convention, threshold = options.get("convention", "released"), options.get("threshold", 6.0)
    outlier_columns(x[:0], threshold=threshold, convention=convention)  # for what it refuses
    w = stored_weight(given, convention, threshold)
    (dy,) = floating(dy=dy)
    bind_axes({"x": (x, "T K"), "weight codes": (w.codes, "K N"), "dy": (dy, "T N")})
    wide = widen(dy)
    values = widen(round_to(dequantize_columns(w), x.dtype))
    dx = contract("tn,kn->tk", wide, values)
    dbias = np.sum(wide, axis=0, dtype=wide_dtype(x.dtype))
    return Int8LinearGradients(round_to(dx, x.dtype), round_to(dbias, x.dtype))
