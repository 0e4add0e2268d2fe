"""Number formats: what the references compute in, and how they round.

References compute in the dtype they are given.  Two formats need help from NumPy: float16 products are
accumulated in float32 and rounded once, as every matrix unit does, and bfloat16, which NumPy does not know,
travels as ``ml_dtypes.bfloat16`` (recognised by name, never imported), is widened exactly to float32 on entry
and rounded to nearest even on return.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Array",
    "BoolArray",
    "FloatArray",
    "IntArray",
    "contract",
    "in_float64",
    "is_bfloat16",
    "is_floating",
    "round_to",
    "significand_bits",
    "ulp",
    "wide_dtype",
    "widen",
]

Array: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_SIGNIFICAND_BITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
_MIN_EXPONENT = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}


def is_bfloat16(dtype: npt.DTypeLike) -> bool:
    """Return whether `dtype` is bfloat16, whoever defines it.

    Examples
    --------
    >>> is_bfloat16(np.float32)
    False
    """
    return np.dtype(dtype).name == "bfloat16"


def is_floating(dtype: npt.DTypeLike) -> bool:
    """Return whether `dtype` is one of float64, float32, float16 and bfloat16.

    Examples
    --------
    >>> is_floating(np.float16), is_floating(np.int8)
    (True, False)
    """
    return np.dtype(dtype).name in _SIGNIFICAND_BITS


def significand_bits(dtype: npt.DTypeLike) -> int:
    """Return the number of stored significand bits of a floating `dtype`.

    Examples
    --------
    >>> significand_bits(np.float16)
    10
    """
    return _SIGNIFICAND_BITS[np.dtype(dtype).name]


def wide_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return the format for sums and statistics over values of `dtype`: float32 at least.

    Examples
    --------
    >>> wide_dtype(np.float16), wide_dtype(np.float64)
    (dtype('float32'), dtype('float64'))
    """
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def widen(x: Array) -> FloatArray:
    """Return a bfloat16 array exactly as float32, and any other array as it is.

    Parameters
    ----------
    x : ndarray
        Any shape.

    Returns
    -------
    ndarray
        Same shape.

    Examples
    --------
    >>> widen(np.ones(2, np.float16)).dtype
    dtype('float16')
    """
    if not is_bfloat16(x.dtype):
        return x
    bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).reshape(x.shape)


def in_float64(value: Any) -> FloatArray:
    """Return numbers of any format exactly as float64: what laws and judges compute in.

    Examples
    --------
    >>> in_float64(np.ones(2, np.float16)).dtype
    dtype('float64')
    """
    return widen(np.asarray(value)).astype(np.float64)


def round_to(x: Array, dtype: npt.DTypeLike) -> Array:
    """Return `x` rounded to nearest even in `dtype`, which may be bfloat16.

    Parameters
    ----------
    x : ndarray of float
        Any shape.
    dtype : dtype
        A floating format.

    Returns
    -------
    ndarray
        Same shape, dtype `dtype`.  Values beyond the largest finite number become infinite.

    Examples
    --------
    >>> round_to(np.array([1.0, 1e6]), np.float16)
    array([ 1., inf], dtype=float16)
    """
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):  # overflow to infinity is the documented result
        if not is_bfloat16(dtype):
            return x.astype(dtype)
        if x.dtype == np.float64:
            x = _round_to_odd_float32(x)
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    # Add half of the discarded part, less one if the kept part is even: ties go to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # a NaN must not round to infinity
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, quiet, rounded).astype(np.uint16).view(dtype).reshape(x.shape)


def _round_to_odd_float32(x: FloatArray) -> FloatArray:
    """Return float64 `x` rounded to odd in float32: rounding that once more is then correct.

    Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums", theorem 3.
    """
    near = x.astype(np.float32)
    inexact = np.isfinite(near) & (near.astype(np.float64) != x)
    even = (near.view(np.uint32) & np.uint32(1)) == 0
    towards = np.where(x > near, np.float32(np.inf), np.float32(-np.inf)).astype(np.float32)
    return np.where(inexact & even, np.nextafter(near, towards), near).astype(np.float32)


def contract(subscripts: str, a: FloatArray, b: FloatArray) -> FloatArray:
    """Return ``einsum(subscripts, a, b)`` as a matrix unit accumulates it: in float32 at least.

    Parameters
    ----------
    subscripts : str
        As for `numpy.einsum`, for two operands.
    a, b : ndarray of float
        Operands.

    Returns
    -------
    ndarray
        In `wide_dtype` of the operands: the caller says where a result is rounded to a narrow format.

    Examples
    --------
    >>> a = np.full((1, 3000), 1, np.float16)
    >>> contract("ij,kj->ik", a, a)
    array([[3000.]], dtype=float32)
    """
    wide = wide_dtype(np.result_type(a, b))
    # An infinity or NaN in an operand makes NaN, as IEEE 754 has it: no warning, a mask may yet hide it.
    with np.errstate(invalid="ignore", over="ignore"):
        product: FloatArray = np.einsum(
            subscripts, a.astype(wide, copy=False), b.astype(wide, copy=False), optimize=True
        )
    return product


def ulp(x: npt.ArrayLike, dtype: npt.DTypeLike) -> FloatArray:
    """Return the distance between neighbouring numbers of `dtype` at magnitude `x`, in float64.

    Parameters
    ----------
    x : array_like of float
        Magnitudes; the sign is ignored, and 0 has the ulp of the smallest normal number.
    dtype : dtype
        A floating format.

    Returns
    -------
    ndarray of float64
        Shape of `x`.

    Examples
    --------
    >>> float(ulp(1.0, np.float16)) == 2.0**-10
    True
    """
    name = np.dtype(dtype).name
    magnitude = np.abs(np.asarray(x, dtype=np.float64))
    _, exponent = np.frexp(magnitude)
    exponent = np.maximum(exponent - 1, _MIN_EXPONENT[name])
    spacing: FloatArray = np.ldexp(1.0, exponent - _SIGNIFICAND_BITS[name])
    return spacing
