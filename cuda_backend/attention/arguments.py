"""Types of the arguments that both portable directions take."""

from __future__ import annotations

from typing import Any

from cuda_backend._numba import types
from cuda_backend.attention.user_device import Mods

__all__ = ["array_type", "aux_signature"]


def array_type(dtype: Any, ndim: int) -> Any:
    """Return the type of an array with any strides."""
    return types.Array(dtype, ndim, "A")


def aux_signature(mods: Mods) -> Any:
    """Return the type of the arrays that functions of the user's read; one array if there is none."""
    arrays = mods.aux or (("float32", 1),)
    return types.Tuple([array_type(getattr(types, "boolean" if d == "bool" else d), n) for d, n in arrays])
