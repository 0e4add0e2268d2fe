"""Types of the arguments that both portable directions take."""

from __future__ import annotations

from typing import Any

from cuda_backend._numba import types
from cuda_backend.attention.user_device import Mods

__all__ = ["array_type", "array_words", "aux_signature"]


def array_type(dtype: Any, ndim: int) -> Any:
    """Return the type of an array with any strides."""
    return types.Array(dtype, ndim, "A")


def aux_signature(mods: Mods) -> Any:
    """Return the type of the arrays that functions of the user's read; one array if there is none."""
    arrays = mods.arrays
    return types.Tuple([array_type(getattr(types, "boolean" if d == "bool" else d), n) for d, n in arrays])


def array_words(axes: int) -> int:
    """Return how many arguments of 8 bytes an array is: five, and its shape and strides.

    >>> array_words(2)
    9
    """
    return 5 + 2 * axes
