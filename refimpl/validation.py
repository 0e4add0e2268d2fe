"""Checks on what a caller passes, with one clear line when it does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import Array, FloatArray, is_bfloat16, is_floating

__all__ = [
    "as_array",
    "bind_axes",
    "broadcastable",
    "finite",
    "flag",
    "floating",
    "fraction",
    "number",
    "positive",
    "whole",
]


def as_array(name: str, value: Any) -> Array:
    """Return `value` as an ndarray; refuse what NumPy would copy from a device or turn into objects.

    Raises
    ------
    DTypeError
        For masked arrays, device arrays, and anything that becomes an array of objects.

    Examples
    --------
    >>> as_array("q", [1.0, 2.0])
    array([1., 2.])
    """
    if isinstance(value, np.ma.MaskedArray):
        raise DTypeError(f"{name}: expected an array, got a masked array; pass attn_mask for masking")
    if not isinstance(value, np.ndarray) and hasattr(value, "__cuda_array_interface__"):
        raise DTypeError(f"{name}: expected a NumPy array, got an array on a GPU; see cuda_backend")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DTypeError(f"{name}: cannot be made an array: {error}") from None
    if array.dtype == np.object_:
        raise DTypeError(f"{name}: expected an array of numbers, got objects ({type(value).__name__})")
    return array


def floating(**arrays: Any) -> tuple[FloatArray, ...]:
    """Return the named values as arrays of one floating dtype.

    Integers become float64; mixed floating dtypes follow `numpy.result_type`; bfloat16 mixes with nothing.

    Raises
    ------
    DTypeError
        If a value is not real, or bfloat16 meets another dtype.

    Examples
    --------
    >>> a, b = floating(a=[1, 2], b=np.ones(2, np.float32))
    >>> a.dtype, b.dtype
    (dtype('float64'), dtype('float64'))
    """
    found = {name: as_array(name, value) for name, value in arrays.items()}
    for name, array in found.items():
        if np.issubdtype(array.dtype, np.integer):
            found[name] = array.astype(np.float64)
        elif is_floating(array.dtype):
            found[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
        else:
            raise DTypeError(
                f"{name}: expected float64, float32, float16, bfloat16 or integers, got {array.dtype}"
            )
    dtypes = {array.dtype for array in found.values()}
    if len(dtypes) > 1 and any(is_bfloat16(dtype) for dtype in dtypes):
        given = ", ".join(f"{name} {array.dtype}" for name, array in found.items())
        raise DTypeError(f"bfloat16 does not mix with other dtypes; got {given}")
    common = np.result_type(*dtypes) if len(dtypes) > 1 else next(iter(dtypes))
    return tuple(array.astype(common, copy=False) for array in found.values())


def bind_axes(arrays: Mapping[str, tuple[Array, str]]) -> dict[str, int]:
    """Return the size of every named axis, each array given with its axes as a string of names.

    Raises
    ------
    ShapeError
        If an array has another number of axes, or two arrays disagree on a shared one.

    Examples
    --------
    >>> bind_axes({"q": (np.ones((2, 5)), "B T"), "k": (np.ones((2, 7)), "B S")})
    {'B': 2, 'T': 5, 'S': 7}
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        names = axes.split()
        if array.ndim != len(names):
            raise ShapeError(
                f"{name}: expected {len(names)} axes ({', '.join(names)}), got shape {array.shape}"
            )
        for axis, size in zip(names, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ShapeError(
                    f"{name}: axis {axis} must equal that of {owner[axis]}; got {size}, "
                    f"expected {sizes[axis]} ({name} has shape {array.shape})"
                )
            owner.setdefault(axis, name)
    return sizes


def broadcastable(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Return `array` broadcast to `shape`, as a view.

    Raises
    ------
    ShapeError
        If it does not broadcast.

    Examples
    --------
    >>> broadcastable("bias", np.zeros((3, 1)), (2, 3, 4)).shape
    (2, 3, 4)
    """
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ShapeError(f"{name}: expected a shape that broadcasts to {shape}, got {array.shape}") from None


def fraction(name: str, value: float) -> float:
    """Return `value` if it lies in [0, 1).

    Raises
    ------
    OptionError
        Otherwise, NaN included.

    Examples
    --------
    >>> fraction("dropout_p", 0.1)
    0.1
    """
    real = number(name, value)
    if not 0.0 <= real < 1.0:
        raise OptionError(f"{name}: expected a number in [0, 1), got {value}")
    return real


def positive(name: str, value: float) -> float:
    """Return `value` if it is finite and above 0.

    Raises
    ------
    OptionError
        Otherwise, NaN included.

    Examples
    --------
    >>> positive("softcap", 30)
    30.0
    """
    real = number(name, value)
    if not (real > 0 and math.isfinite(real)):
        raise OptionError(f"{name}: expected a finite number above 0, got {value}")
    return real


def finite(name: str, value: float) -> float:
    """Return `value` if it is a finite number.

    Raises
    ------
    OptionError
        Otherwise.

    Examples
    --------
    >>> finite("scale", 0.125)
    0.125
    """
    real = number(name, value)
    if not math.isfinite(real):
        raise OptionError(f"{name}: expected a finite number, got {value}")
    return real


def flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False.

    Raises
    ------
    OptionError
        Otherwise: 1 and "no" are neither.

    Examples
    --------
    >>> flag("signed", np.True_)
    True
    """
    if not isinstance(value, bool | np.bool_):
        raise OptionError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`.

    Raises
    ------
    OptionError
        If it is smaller.
    DTypeError
        If it is no integer; 2.0 is none.

    Examples
    --------
    >>> whole("block_size", 64)
    64
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise DTypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise OptionError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def number(name: str, value: Any) -> float:
    """Return `value` as a float; what `float` would read or convert, ``"3"`` and True, is none.

    Raises
    ------
    DTypeError
        If it is no real number.

    Examples
    --------
    >>> number("threshold", np.float16(6))
    6.0
    """
    if isinstance(value, str | bytes | bytearray | bool | np.bool_):
        raise DTypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DTypeError(f"{name}: expected a number, got {type(value).__name__}") from None
