"""Row-wise and column-wise absmax quantisation to int8, with outlier columns set aside.

A code is ``rint(x * (127 / absmax))``: one division a row, one product a number, both rounded in
`refimpl.numerics.wide_dtype` of the input, float32 for every narrow format.  Kernels that keep to this order
of operations give the same codes bit for bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, wide_dtype, widen
from refimpl.validation import bind_axes, floating, number

__all__ = [
    "LIMIT",
    "Convention",
    "Int8Columns",
    "Int8Rows",
    "dequantize_columns",
    "outlier_columns",
    "quantize_columns",
    "quantize_rows",
]

Convention = Literal["paper", "released"]

# The greatest code; -128 stays unused, so that the grid is its own mirror image.
LIMIT = 127


class Int8Rows(NamedTuple):
    """Codes [T, K], the absmax of each row [T], and the columns that were set aside, in order [n]."""

    codes: IntArray
    absmax: FloatArray
    outliers: IntArray


class Int8Columns(NamedTuple):
    """Codes [K, N] and the absmax of each column [N]: a weight as it is stored."""

    codes: IntArray
    absmax: FloatArray


def outlier_columns(
    x: FloatArray, /, *, threshold: float | None = 6.0, convention: Convention = "released"
) -> IntArray:
    """Return the columns of `x` that hold an outlier, in order.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Activations.
    threshold : float or None
        Magnitude from which a number is an outlier, rounded to the wide dtype of `x`; None: there are none.
    convention : {"paper", "released"}
        Strictly above the threshold, or from it on.  NaN and infinity are outliers under both.

    Returns
    -------
    ndarray of int64, shape (n,)
        Indices.

    Raises
    ------
    OptionError
        If `threshold` is not above 0, or `convention` is unknown.
    ShapeError, DTypeError
        If `x` is not a real matrix.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.2.

    Examples
    --------
    >>> x = np.array([[1.0, 6.0, 7.0], [0.0, 1.0, 0.0]])
    >>> outlier_columns(x), outlier_columns(x, convention="paper")
    (array([1, 2]), array([2]))
    """
    (x,) = floating(x=x)
    bind_axes({"x": (x, "T K")})
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    columns: IntArray = np.flatnonzero(_outlier_cells(wide, threshold, convention).any(axis=0))
    return columns


def quantize_rows(
    x: FloatArray,
    /,
    *,
    threshold: float | None = None,
    convention: Convention = "released",
    memory: Memory | None = None,
) -> Int8Rows:
    """Return the int8 codes of every row of `x`, with 0 in the columns that hold outliers.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Activations.
    threshold : float, optional
        As for `outlier_columns`.  Default: every column is quantised.
    convention : {"paper", "released"}
        What the absmax of a row is taken over: the columns without outliers, or the cells that are no
        outliers, those in outlier columns among them, which makes it at least as large.
    memory : Memory, optional
        Counts what moves: `x` once to find the outliers, if there is a threshold, and once to quantise.

    Returns
    -------
    Int8Rows
        ``absmax`` in `wide_dtype` of `x`.

    Raises
    ------
    OptionError
        If `threshold` is not above 0, or `convention` is unknown.
    ShapeError, DTypeError
        If `x` is not a real matrix.

    Notes
    -----
    **Special cases**

    - A row of zeros has absmax 0 and codes 0.  So has, but for its absmax, a row so small that 127 / absmax
      is not finite.
    - Without a threshold, a row that holds NaN or infinity has that absmax and codes that mean nothing, 0
      where the product is NaN: its dequantised values are all NaN.  With a threshold such a number is an
      outlier, and the rest of the row is not touched.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 2 (absmax) and 3.1 (vector-wise).
    .. [2] bitsandbytes @12297f3, csrc/cuda/int8.cu, ``kInt8VectorQuant``; there 127 / absmax is an
       approximate division, and a NaN becomes code 0 unseen.

    Examples
    --------
    >>> x = np.array([[1.0, -2.0, 20.0], [0.0, 0.0, 0.0]])
    >>> quantize_rows(x, threshold=6.0)
    Int8Rows(codes=array([[  64, -127,    0],
           [   0,    0,    0]], dtype=int8), absmax=array([2., 0.]), outliers=array([2]))
    """
    (x,) = floating(x=x)
    size = bind_axes({"x": (x, "T K")})
    hbm = memory or Memory()
    codes = np.empty(x.shape, np.int8)
    absmax = np.empty(size["T"], wide_dtype(x.dtype))
    outliers = np.empty(0, np.int64)
    _check_convention(convention)
    if threshold is not None:
        with hbm.on_chip():
            found = outlier_columns(hbm.load("X", x), threshold=threshold, convention=convention)
            outliers = np.empty(found.shape, np.int64)
            hbm.store("outliers", outliers, None, found)
    with hbm.on_chip():
        tile = widen(hbm.load("X", x)).astype(absmax.dtype, copy=False)
        aside = np.zeros(x.shape, bool)
        aside[:, hbm.load("outliers", outliers)] = True
        skipped = _outlier_cells(tile, threshold, convention) if convention == "released" else aside
        row = np.max(np.where(skipped, 0, np.abs(tile)), axis=1, initial=0)
        hbm.store("X codes", codes, None, np.where(aside, 0, _codes(tile, row[:, None])))
        hbm.store("X absmax", absmax, None, row)
    return Int8Rows(codes, absmax, outliers)


def quantize_columns(weight: FloatArray, /) -> Int8Columns:
    """Return the int8 codes of every column of a weight, an output feature each.

    Parameters
    ----------
    weight : ndarray of float, shape (K, N)
        Used as ``x @ weight``.

    Returns
    -------
    Int8Columns
        ``absmax`` in `wide_dtype` of `weight`.  A column of zeros has absmax 0 and codes 0.

    Raises
    ------
    OptionError
        If `weight` holds NaN or infinity.
    ShapeError, DTypeError
        If `weight` is not a real matrix.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.1.

    Examples
    --------
    >>> quantize_columns(np.array([[1.0, 0.0], [-0.5, 0.0]]))
    Int8Columns(codes=array([[127,   0],
           [-64,   0]], dtype=int8), absmax=array([1., 0.]))
    """
    (weight,) = floating(weight=weight)
    bind_axes({"weight": (weight, "K N")})
    wide = widen(weight).astype(wide_dtype(weight.dtype), copy=False)
    if not np.isfinite(wide).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(wide))[0])
        raise OptionError(f"weight: expected finite numbers, got {wide[where]} at {list(where)}")
    absmax = np.max(np.abs(wide), axis=0, initial=0)
    return Int8Columns(_codes(wide, absmax).astype(np.int8), absmax)


def dequantize_columns(weight: Int8Columns, /, *, rows: IntArray | None = None) -> FloatArray:
    """Return ``codes * (absmax / 127)``, of all rows or of some.

    Parameters
    ----------
    weight : Int8Columns
        As from `quantize_columns`.
    rows : ndarray of int, shape (n,), optional
        Which rows.  Default: all.

    Returns
    -------
    ndarray of float, shape (K or n, N)
        In the dtype of ``absmax``.

    Raises
    ------
    ShapeError
        If codes and absmax do not fit.

    Examples
    --------
    >>> dequantize_columns(Int8Columns(np.array([[127], [-64]], np.int8), np.array([12.7])))
    array([[12.7],
           [-6.4]])
    """
    codes, absmax = weight
    if codes.ndim != 2 or absmax.shape != codes.shape[1:]:
        raise ShapeError(
            f"weight: expected codes (K, N) and absmax (N,), got {codes.shape} and {absmax.shape}"
        )
    chosen = codes if rows is None else codes[rows]
    values: FloatArray = chosen.astype(absmax.dtype) * (absmax / absmax.dtype.type(LIMIT))
    return values


def _codes(wide: FloatArray, absmax: FloatArray) -> Array:
    """Return ``rint(x * (127 / absmax))``, and 0 where that is no code: NaN, infinite, or set aside."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        steps = np.rint(wide * (wide.dtype.type(LIMIT) / absmax))
    return np.where(np.abs(steps) <= LIMIT, steps, 0)


def _outlier_cells(wide: FloatArray, threshold: float | None, convention: Convention) -> BoolArray:
    _check_convention(convention)
    if threshold is None:
        return np.zeros(wide.shape, bool)
    if not number("threshold", threshold) > 0:
        raise OptionError(f"threshold: expected a number above 0, or None for no outliers; got {threshold}")
    limit = wide.dtype.type(threshold)
    # Said in the negative, so that NaN is an outlier and never hidden in a code.
    inliers = np.abs(wide) <= limit if convention == "paper" else np.abs(wide) < limit
    outliers: BoolArray = ~(inliers & np.isfinite(wide))
    return outliers


def _check_convention(convention: Convention) -> None:
    if convention not in ("paper", "released"):
        raise OptionError(f"convention: expected 'paper' or 'released', got {convention!r}")
