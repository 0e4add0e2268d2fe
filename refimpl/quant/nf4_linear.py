"""A linear layer with its weight in NF4, the scales quantised too: 4.127 bits a weight.

The released layer keeps its weight as [out, in] and quantises it in that order, so a block of 64 weights
belongs to one output feature.  `refimpl.quant.qlora_quantize` takes a weight [K, N] in its own order, in
which a block belongs to one input feature; here it is given the transpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.quant.qlora import NF4Weight, qlora_dequantize, qlora_quantize
from refimpl.quant.weight_only import (
    EDGES,
    NF4_EDGES,
    WeightOnlyGradients,
    gradients,
    linear_terms,
    sample_weight_only,
)
from refimpl.registry import Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["nf4_linear", "nf4_linear_vjp", "nf4_quantize"]


def nf4_quantize(weight: FloatArray, /, *, block_size: int = 64, scale_block_size: int = 256) -> NF4Weight:
    """Return a weight in NF4 with its blocks along the input features.

    Parameters
    ----------
    weight : ndarray of float, shape (K, N)
        Used as ``x @ weight``.
    block_size, scale_block_size : int
        As for `refimpl.quant.qlora_quantize`.

    Returns
    -------
    NF4Weight
        ``turned``: of the transpose, ``shape`` is (N, K).

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `refimpl.quant.qlora_quantize`.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3.
    .. [2] bitsandbytes, functional.py, ``quantize_4bit`` of a weight [out, in].

    Examples
    --------
    >>> nf4_quantize(np.ones((128, 2))).shape
    (2, 128)
    """
    (weight,) = floating(weight=weight)
    bind_axes({"weight": (weight, "K N")})
    turned = np.ascontiguousarray(weight.T)
    stored = qlora_quantize(turned, block_size=block_size, scale_block_size=scale_block_size)
    return stored._replace(turned=True)


@technique(
    "quant.weight_only_nf4",
    entries=(73, 74),
    kind="function",
    source=Source("Dettmers et al. 2023", "arXiv:2305.14314", "eq. 5 without the adapter, and eq. 6"),
    axes={"M": (1, 4), "K": (1, 40), "N": (1, 7), "block_size": (1, 40), "scale_block_size": (1, 5)},
    options={"bias": (False, True), "values": ("normal", "zero", "scaled")},
    edges=(*EDGES, *NF4_EDGES),
    sample=sample_weight_only,
    terms=linear_terms,
    vjp="refimpl.quant.nf4_linear:nf4_linear_vjp",
)
def nf4_linear(
    x: FloatArray,
    weight: FloatArray | NF4Weight,
    /,
    *,
    bias: FloatArray | None = None,
    block_size: int = 64,
    scale_block_size: int = 256,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``x @ doubleDequant(weight) + bias``.

    Parameters
    ----------
    x : ndarray of float, shape (M, K)
        Tokens by features.
    weight : ndarray of float, shape (K, N), or NF4Weight
        The weight, or as `nf4_quantize` stores it, ahead and once; its ``shape`` is then (N, K).
    bias : ndarray of float, shape (N,), optional
        Added before rounding.
    block_size, scale_block_size : int
        As for `nf4_quantize`, if `weight` is not stored yet.
    memory : Memory, optional
        Counts what moves: every operand once as it is stored, the output once.

    Returns
    -------
    ndarray of float, shape (M, N)
        In the dtype of `x`: the stored weight is rounded to it before it multiplies, as in the released code.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, are not real, or cannot be quantised.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, eq. 5 and 6.
    .. [2] bitsandbytes, autograd/_functions.py, ``MatMul4Bit``.

    Examples
    --------
    >>> nf4_linear(np.array([[1.0, 2.0]]), np.array([[3.0], [-3.0]]))
    array([[-3.]])
    """
    x, stored, bias = _operands(x, weight, bias, block_size, scale_block_size)
    hbm = memory or Memory()
    out = np.empty((x.shape[0], stored.shape[0]), x.dtype)
    with hbm.on_chip():
        features = hbm.load("X", x)
        stored = stored._replace(
            codes=hbm.load("W codes", stored.codes),
            absmax_codes=hbm.load("W absmax codes", stored.absmax_codes),
            scale=hbm.load("W scale", stored.scale),
            offset=hbm.load("W offset", stored.offset),
        )
        values = _values(stored, x)
        total = contract("mk,nk->mn", features, values)
        if bias is not None:
            total = total + widen(hbm.load("bias", bias))
        hbm.store("Y", out, None, round_to(total, x.dtype))
    return out


def nf4_linear_vjp(
    x: FloatArray,
    weight: FloatArray | NF4Weight,
    dy: FloatArray,
    /,
    *,
    bias: FloatArray | None = None,
    block_size: int = 64,
    scale_block_size: int = 256,
) -> WeightOnlyGradients:
    """Return the gradients of `nf4_linear` in x and bias; the stored weight is frozen.

    Parameters
    ----------
    x, weight, bias, block_size, scale_block_size
        As for `nf4_linear`.
    dy : ndarray of float, shape (M, N)
        Gradient of the output.

    Returns
    -------
    WeightOnlyGradients
        In the dtype of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `nf4_linear`.

    References
    ----------
    .. [1] bitsandbytes, autograd/_functions.py, ``MatMul4Bit.backward``: the weight is dequantised again.

    Examples
    --------
    >>> nf4_linear_vjp(np.ones((1, 1)), np.array([[2.0]]), np.ones((1, 1))).x
    array([[2.]])
    """
    x, dy = floating(x=x, dy=dy)
    x, stored, bias = _operands(x, weight, bias, block_size, scale_block_size)
    values = _values(stored, x)
    bind_axes({"x": (x, "M K"), "dy": (dy, "M N"), "weight": (values, "N K")})
    return gradients(x, np.ascontiguousarray(values.T), dy, bias)


def _operands(x: Any, weight: Any, bias: Any, block_size: int, scale_block_size: int) -> tuple[Any, Any, Any]:
    """Return x, the stored weight and the bias, which fit together."""
    (x,) = floating(x=x)
    if not isinstance(weight, NF4Weight):
        x, weight = floating(x=x, weight=weight)
        weight = nf4_quantize(weight, block_size=block_size, scale_block_size=scale_block_size)
    weight.check_turned(True)
    axes: dict[str, tuple[Any, str]] = {"x": (x, "M K")}
    if bias is not None:
        x, bias = floating(x=x, bias=bias)
        axes["bias"] = (bias, "N")
    size = bind_axes(axes)
    if (size.get("N", weight.shape[0]), size["K"]) != tuple(weight.shape):
        raise ShapeError(
            f"weight: expected the transpose of (K, N) with K={size['K']}, stored as (N, K); "
            f"got {tuple(weight.shape)}, and a bias of {size.get('N', 'none')}"
        )
    return x, weight, bias


def _values(stored: NF4Weight, x: FloatArray) -> FloatArray:
    """Return the weight [N, K] in the dtype of `x`, widened if NumPy does not know that."""
    return widen(round_to(qlora_dequantize(stored), x.dtype))
