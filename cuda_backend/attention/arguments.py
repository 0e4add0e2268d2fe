"""Types of the arguments that both portable directions take."""

from __future__ import annotations

from typing import Any

from cuda_backend._numba import types
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_portable import Features
from cuda_backend.formats import storage_type

__all__ = ["array_type", "array_words", "aux_signature", "option_types"]


def array_type(dtype: Any, ndim: int) -> Any:
    """Return the type of an array with any strides."""
    return types.Array(dtype, ndim, "A")


def aux_signature(mods: Mods) -> Any:
    """Return the type of the arrays that functions of the user's read; one array if there is none."""
    arrays = mods.arrays
    return types.Tuple([array_type(getattr(types, "boolean" if d == "bool" else d), n) for d, n in arrays])


def option_types(features: Features) -> tuple[Any, ...]:
    """Return the types of a portable kernel's options, arrays that are absent among them, in their order."""
    return (
        array_type(types.boolean, 4),                                                # mask
        array_type(storage_type(features.bias or "float32"), 4),                     # bias
        array_type(types.float32, 1),                                                # slopes
        array_type(getattr(types, features.q_lengths or "int64"), 1),                # q_lengths
        array_type(getattr(types, features.k_lengths or "int64"), 1),                # k_lengths
        array_type(types.boolean, 4),                                                # kept
        array_type(types.uint8, 4), aux_signature(features.mods),                    # tiles, aux
        types.float32, types.float32,                                            # scale, softcap
        types.uint64, types.uint64, types.float32,       # seed, threshold, 1 / (1 - p)
    )  # fmt: skip


def array_words(axes: int) -> int:
    """Return how many arguments of 8 bytes an array is: five, and its shape and strides.

    >>> array_words(2)
    9
    """
    return 5 + 2 * axes
