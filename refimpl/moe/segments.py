"""Experts cut along their hidden units: each segment is an expert of its own, and all of them are the whole.

A feed-forward layer is a sum over its hidden units (`refimpl.transformer.decomposition`), so cutting the
columns of W_in and the rows of W_out into the same groups loses nothing.
"""

from __future__ import annotations

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray
from refimpl.validation import whole

__all__ = ["join_columns", "join_rows", "segment_columns", "segment_rows"]


def segment_columns(w: FloatArray, segments: int, *, name: str = "w_in") -> FloatArray:
    """Return ``(E m, D, F / m)`` from ``(E, D, F)``: the hidden units of an expert in m groups of neighbors.

    Raises
    ------
    ShapeError
        If m does not divide F.

    Examples
    --------
    >>> import numpy as np
    >>> segment_columns(np.arange(4.0).reshape(1, 1, 4), 2)[:, 0]
    array([[0., 1.],
           [2., 3.]])
    """
    E, D, F = _axes(name, w, segments, 2)
    return w.reshape(E, D, segments, F // segments).swapaxes(1, 2).reshape(E * segments, D, F // segments)


def segment_rows(w: FloatArray, segments: int, *, name: str = "w_out") -> FloatArray:
    """Return ``(E m, F / m, D)`` from ``(E, F, D)``.

    Raises
    ------
    ShapeError
        If m does not divide F.

    Examples
    --------
    >>> import numpy as np
    >>> segment_rows(np.arange(4.0).reshape(1, 4, 1), 2)[..., 0]
    array([[0., 1.],
           [2., 3.]])
    """
    E, F, D = _axes(name, w, segments, 1)
    return w.reshape(E * segments, F // segments, D)


def join_columns(w: FloatArray, segments: int) -> FloatArray:
    """Undo `segment_columns`.

    Examples
    --------
    >>> import numpy as np
    >>> w = np.arange(12.0).reshape(2, 1, 6)
    >>> bool((join_columns(segment_columns(w, 3), 3) == w).all())
    True
    """
    pieces, D, width = w.shape
    parts = w.reshape(pieces // segments, segments, D, width).swapaxes(1, 2)
    return parts.reshape(pieces // segments, D, segments * width)


def join_rows(w: FloatArray, segments: int) -> FloatArray:
    """Undo `segment_rows`.

    Examples
    --------
    >>> import numpy as np
    >>> join_rows(np.zeros((6, 2, 5)), 3).shape
    (2, 6, 5)
    """
    pieces, width, D = w.shape
    return w.reshape(pieces // segments, segments * width, D)


def _axes(name: str, w: FloatArray, segments: int, hidden: int) -> tuple[int, int, int]:
    if w.ndim != 3:
        raise ShapeError(f"{name}: expected 3 axes (E, then weights), got shape {w.shape}")
    if w.shape[hidden] % whole("segments", segments):
        raise ShapeError(
            f"{name}: segments must divide axis F; got segments={segments}, F={w.shape[hidden]} "
            f"({name} has shape {w.shape})"
        )
    return w.shape
