"""Padding of keys, for attentions that know no other mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.errors import DTypeError, ShapeError
from refimpl.numerics import BoolArray
from refimpl.validation import as_array

__all__ = ["checked_key_mask"]


def checked_key_mask(key_mask: Any, B: int, Tk: int) -> BoolArray | None:
    """Return `key_mask`, True for a key and False for padding, if it is one; None stays None.

    Raises
    ------
    DTypeError
        If it is not bool.
    ShapeError
        If it has not one entry a sequence and key.

    Examples
    --------
    >>> checked_key_mask([[True, False]], 1, 2)
    array([[ True, False]])
    """
    if key_mask is None:
        return None
    mask = as_array("key_mask", key_mask)
    if mask.dtype != np.bool_:
        raise DTypeError(f"key_mask: expected bool, True = a key, got {mask.dtype}")
    if mask.shape != (B, Tk):
        raise ShapeError(f"key_mask: expected shape {(B, Tk)}, got {mask.shape}")
    return mask
