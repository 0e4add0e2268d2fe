"""Codes on a uniform grid that is given: what rounding, clipping and the way back mean.

The quotient x / S is what is rounded, as in ONNX; torch and bitsandbytes multiply by a reciprocal, which can
fall on the other side of a tie.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, wide_dtype, widen
from refimpl.quant.blocks import Block, expand
from refimpl.validation import flag, floating, whole

__all__ = [
    "Quantized",
    "Rounding",
    "Scheme",
    "UniformOptions",
    "code_range",
    "dequantize",
    "finite_array",
    "quantize",
    "quantize_vjp",
    "round_half",
]

Scheme = Literal["symmetric", "symmetric_full", "affine"]
Rounding = Literal["half_even", "half_away"]


class Quantized(NamedTuple):
    """Codes, and for every block the scale S and the zero point Z; a value is ``S * (code - Z)``."""

    codes: IntArray
    scale: FloatArray
    zero_point: IntArray


class UniformOptions(TypedDict, total=False):
    """Options of `uniform`."""

    bits: int
    scheme: Scheme
    block: Block
    signed: bool
    rounding: Rounding


def round_half(x: FloatArray, rounding: Rounding) -> FloatArray:
    """Return `x` rounded to the nearest integer, halves to the even one or away from zero.

    Parameters
    ----------
    x : ndarray of float
        Any shape.
    rounding : {"half_even", "half_away"}
        ``rint`` of C, NumPy and CUDA, or ``round`` of C.

    Returns
    -------
    ndarray of float
        Same shape.

    Raises
    ------
    OptionError
        If `rounding` is neither.

    Examples
    --------
    >>> x = np.array([0.5, 1.5, -2.5])
    >>> round_half(x, "half_even"), round_half(x, "half_away")
    (array([ 0.,  2., -2.]), array([ 1.,  2., -3.]))
    """
    if rounding == "half_even":
        return np.rint(x)
    if rounding != "half_away":
        raise OptionError(f"rounding: expected 'half_even' or 'half_away', got {rounding!r}")
    whole = np.trunc(x)
    # Not floor(x + 0.5): the sum rounds, and 0.49999999999999994 would become 1.
    away: FloatArray = whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), 0).astype(x.dtype)
    return away


def code_range(bits: int, scheme: Scheme, signed: bool) -> tuple[int, int]:
    """Return the least and the greatest code.

    Raises
    ------
    OptionError
        If `bits` is not 2 to 8, or `scheme` is unknown.

    Examples
    --------
    >>> code_range(8, "symmetric", True), code_range(8, "affine", True), code_range(4, "affine", False)
    ((-127, 127), (-128, 127), (0, 15))
    """
    if whole("bits", bits) not in range(2, 9):
        raise OptionError(f"bits: expected 2 to 8, got {bits}")
    flag("signed", signed)
    if scheme not in ("symmetric", "symmetric_full", "affine"):
        raise OptionError(f"scheme: expected 'symmetric', 'symmetric_full' or 'affine', got {scheme!r}")
    half = 2 ** (bits - 1)
    shift = 0 if signed else half
    return shift - half + (scheme == "symmetric"), shift + half - 1


def finite_array(name: str, x: FloatArray) -> None:
    """Refuse NaN and infinity: no code stands for them, and one of them would spoil the scale of its block.

    Raises
    ------
    OptionError
        With the first place where `x` is not finite.

    Examples
    --------
    >>> finite_array("x", np.zeros(3))
    """
    odd = ~np.isfinite(x)
    if odd.any():
        where = tuple(int(i) for i in np.argwhere(odd)[0])
        raise OptionError(f"{name}: expected finite numbers, got {x[where]} at {list(where)}")


def quantize(
    x: FloatArray,
    scale: FloatArray,
    zero_point: IntArray,
    /,
    *,
    bits: int = 8,
    scheme: Scheme = "symmetric",
    block: Block = None,
    signed: bool = True,
    rounding: Rounding = "half_even",
) -> IntArray:
    """Return ``clip(round(x / S) + Z)``: the codes of `x` for scales and zero points that are given.

    Parameters
    ----------
    x : ndarray of float, any shape
        What is quantised; beyond the grid it saturates.
    scale, zero_point : ndarray, one number a block
        As from `uniform`.
    bits, scheme, block, signed, rounding
        As for `uniform`; `scheme` says which codes exist.

    Returns
    -------
    ndarray of int8 or uint8
        Shape of `x`.

    Raises
    ------
    OptionError
        If an option is out of range, `x` holds NaN or infinity, or a scale is not above 0.
    DTypeError
        If `x` is not real.

    References
    ----------
    .. [1] ONNX QuantizeLinear.

    Examples
    --------
    >>> quantize(np.array([0.4, 9.0]), np.array([0.5]), np.array([0]), bits=3)
    array([1, 3], dtype=int8)
    """
    unclipped = _unclipped(x, scale, zero_point, block, rounding)
    low, high = code_range(bits, scheme, signed)
    codes: IntArray = np.clip(unclipped, low, high).astype(np.int8 if signed else np.uint8)
    return codes


def quantize_vjp(
    x: FloatArray,
    scale: FloatArray,
    zero_point: IntArray,
    dy: FloatArray,
    /,
    **options: Unpack[UniformOptions],
) -> FloatArray:
    """Return the straight-through gradient of ``dequantize(quantize(x, S, Z))``.

    Rounding has derivative 0 almost everywhere; the estimator takes it for 1, and leaves the derivative of
    the clipping: 0 where the rounded number lies outside the codes.

    Parameters
    ----------
    x, scale, zero_point
        As for `quantize`.
    dy : ndarray of float
        Gradient of the quantised values; shape of `x`.
    **options
        As for `quantize`.

    Returns
    -------
    ndarray of float
        `dy`, or 0 where `x` was clipped.

    Raises
    ------
    ShapeError
        If `x` and `dy` differ in shape.
    OptionError, DTypeError
        As `quantize`.

    References
    ----------
    .. [1] Bengio et al., 2013, arXiv:1308.3432, section 4 (straight-through).
    .. [2] ``torch.fake_quantize_per_tensor_affine``, whose backward has this mask.

    Examples
    --------
    >>> quantize_vjp(np.array([0.4, 9.0]), np.array([0.5]), np.array([0]), np.ones(2), bits=3)
    array([1., 0.])
    """
    x, dy = floating(x=x, dy=dy)
    if x.shape != dy.shape:
        raise ShapeError(f"dy: expected the shape of x, {x.shape}, got {dy.shape}")
    unclipped = _unclipped(x, scale, zero_point, options.get("block"), options.get("rounding", "half_even"))
    low, high = code_range(
        options.get("bits", 8), options.get("scheme", "symmetric"), options.get("signed", True)
    )
    inside: BoolArray = (unclipped >= low) & (unclipped <= high)
    return np.where(inside, dy, np.zeros_like(dy))


def dequantize(q: Quantized, /, *, block: Block = None) -> FloatArray:
    """Return ``S * (code - Z)`` in the dtype of the scale.

    Parameters
    ----------
    q : Quantized
        As from `uniform`.
    block : tuple of (int or None), optional
        The `block` that `uniform` was given.

    Returns
    -------
    ndarray of float
        Shape of the codes.

    Raises
    ------
    OptionError
        If `block` does not fit the scales.

    References
    ----------
    .. [1] Jacob et al., 2018, arXiv:1712.05877, eq. 1.

    Examples
    --------
    >>> dequantize(Quantized(np.array([255, 127], np.uint8), np.array([0.5]), np.array([128], np.uint8)))
    array([63.5, -0.5])
    """
    codes, scale, zero_point = q
    # int8 minus int8 wraps in NumPy.
    steps = codes.astype(np.int32) - expand(zero_point, codes.shape, block).astype(np.int32)
    values: FloatArray = steps.astype(scale.dtype) * expand(scale, codes.shape, block)
    return values


def _unclipped(
    x: FloatArray, scale: FloatArray, zero_point: IntArray, block: Block, rounding: Rounding
) -> FloatArray:
    """Return ``round(x / S) + Z`` as floating integers."""
    (x,) = floating(x=x)
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    finite_array("x", wide)
    steps = np.asarray(scale).astype(wide.dtype, copy=False)
    if not np.all(steps > 0):
        raise OptionError(f"scale: expected numbers above 0, got {np.min(steps)}")
    with np.errstate(over="ignore"):  # infinite quotients saturate
        quotient = wide / expand(steps, x.shape, block)
    zero: Array = expand(np.asarray(zero_point), x.shape, block)
    rounded: FloatArray = round_half(quotient, rounding) + zero.astype(wide.dtype)
    return rounded
