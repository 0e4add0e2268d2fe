"""A linear map over the last axis, ``x W + b``: what every part of a transformer is made of."""

from __future__ import annotations

import math

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, round_to, wide_dtype

__all__ = ["linear", "linear_vjp", "product"]


def product(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the product of two matrices in their wide dtype, as `refimpl.numerics.contract` does.

    Examples
    --------
    >>> product(np.full((1, 3000), 1, np.float16), np.ones((3000, 1), np.float16))
    array([[3000.]], dtype=float32)
    """
    wide = wide_dtype(np.result_type(a, b))
    with np.errstate(invalid="ignore", over="ignore"):  # as IEEE 754 has it, without a warning
        return np.asarray(a.astype(wide, copy=False) @ b.astype(wide, copy=False))


def linear(x: FloatArray, w: FloatArray, b: FloatArray | None = None, *, name: str = "w") -> FloatArray:
    """Return ``x @ w + b``, summed in the wide dtype and rounded once to the dtype of `x`.

    Parameters
    ----------
    x : ndarray of float, shape (..., M)
        Tokens, any leading axes.
    w : ndarray of float, shape (M, N)
        Weight.
    b : ndarray of float, shape (N,), optional
        Bias.
    name : str
        What errors call the weight; its bias has the same ending.

    Returns
    -------
    ndarray of float, shape (..., N)
        In the dtype of `x`.

    Raises
    ------
    ShapeError
        If shapes do not fit.

    Examples
    --------
    >>> linear(np.ones((2, 3)), np.ones((3, 1)), np.ones(1))
    array([[4.],
           [4.]])
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ShapeError(f"{name}: expected ({x.shape[-1] if x.ndim else 'M'}, N), got shape {w.shape}")
    y = product(_rows(x), w).reshape(*x.shape[:-1], w.shape[1])
    if b is not None:
        if b.shape != w.shape[1:]:
            raise ShapeError(f"b{name[1:]}: expected shape {w.shape[1:]}, got {b.shape}")
        y = y + b
    return round_to(y, x.dtype)


def linear_vjp(x: FloatArray, w: FloatArray, dy: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the gradients of ``sum(dy * linear(x, w, b))`` with respect to x, w and b.

    Examples
    --------
    >>> [g.shape for g in linear_vjp(np.ones((2, 3)), np.ones((3, 4)), np.ones((2, 4)))]
    [(2, 3), (3, 4), (4,)]
    """
    if dy.shape != (*x.shape[:-1], w.shape[1]):
        raise ShapeError(f"dy: expected shape {(*x.shape[:-1], w.shape[1])}, got {dy.shape}")
    rows, drows = _rows(x), _rows(dy)
    dx = product(drows, w.T).reshape(x.shape)
    dw = product(rows.T, drows)
    db = drows.sum(axis=0, dtype=dw.dtype)
    return round_to(dx, x.dtype), round_to(dw, x.dtype), round_to(np.asarray(db), x.dtype)


def _rows(x: FloatArray) -> FloatArray:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
