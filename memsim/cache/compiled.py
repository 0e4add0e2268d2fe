"""Compiling a loop of a replay where numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled by numba, or as it is without it; slow, but the same numbers."""
    try:
        import numba
    except ImportError:
        return function
    found: Callable[..., Any] = numba.njit(function)
    return found
