"""The nearest matrix of a given rank, kept as two thin factors: Eckart and Young's theorem."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["Factors", "MatrixGradient", "break_even_rank", "truncated_svd", "truncated_svd_vjp"]


class Factors(NamedTuple):
    """Two thin matrices, ``left`` (m, k) and ``right`` (n, k); the product is ``left @ right.T``."""

    left: FloatArray
    right: FloatArray


class MatrixGradient(NamedTuple):
    """Gradient of the matrix."""

    dx: FloatArray


def sample_matrix(rng: np.random.Generator, *, m: int, n: int, rank: int, extra: str = "none") -> Case:
    """Return a call of `truncated_svd` on a matrix drawn from `rng`, its rank cut to what fits.

    Examples
    --------
    >>> case = sample_matrix(np.random.default_rng(0), m=3, n=2, rank=5)
    >>> case.args[0].shape, case.kwargs
    ((3, 2), {'rank': 2})
    """
    x = rng.standard_normal((m, n))
    if extra == "large":
        x = 1e4 * x  # its squares overflow float16
    return Case((x,), {"rank": min(m, n, rank)})


def svd_terms(case: Case) -> tuple[int, Factors]:
    """Return a length for the rounding bound and, for each column of a factor, the size of its terms.

    A singular vector mixes all entries of the matrix, and moves by a rounding of the largest singular value
    over the gap to the nearest other one.

    Examples
    --------
    >>> svd_terms(Case((np.diag([4.0, 1.0]),), {"rank": 1}))[1].left
    array([[2.66666667],
           [2.66666667]])
    """
    (x,), rank = case.args, case.kwargs["rank"]
    values = np.append(np.linalg.svd(x, compute_uv=False), [0.0] if x.shape[0] != x.shape[1] else [])
    gaps = np.abs(values[:rank, None] - values)
    np.fill_diagonal(gaps, np.inf)
    largest = values.max(initial=0.0)
    nearest = np.minimum(gaps.min(axis=1, initial=np.inf), largest)  # a single value has no neighbor
    size = np.sqrt(values[:rank]) * largest / nearest
    return max(x.shape), Factors(*(np.broadcast_to(size, (length, rank)) for length in x.shape))


@technique(
    "compress.truncated_svd",
    entries=(24,),
    kind="function",
    source=Source("Eckart & Young 1936", "doi:10.1007/BF02288367", "pages 211 to 218"),
    axes={"m": (1, 8), "n": (1, 8), "rank": (1, 8)},
    options={"extra": ("none",)},
    edges=(
        {"m": 1, "n": 1, "rank": 1},
        {"m": 0, "n": 3, "rank": 1},
        {"m": 3, "n": 0, "rank": 1},
        {"m": 4, "n": 3, "rank": 0},
        {"m": 7, "n": 5, "rank": 5},
        {"m": 5, "n": 7, "rank": 2, "extra": "large"},
    ),
    sample=sample_matrix,
    terms=svd_terms,
    vjp="refimpl.compress.factorization:truncated_svd_vjp",
)
def truncated_svd(x: FloatArray, /, *, rank: int) -> Factors:
    """Return the factors ``U_k Σ_k^½`` and ``V_k Σ_k^½``, whose product no matrix of that rank beats.

    Parameters
    ----------
    x : ndarray of float, shape (m, n)
        A matrix of finite numbers.
    rank : int
        k, from 0 to min(m, n).

    Returns
    -------
    Factors
        ``left`` (m, k) and ``right`` (n, k) in the dtype of `x`, columns by falling singular value.

    Raises
    ------
    ShapeError
        If `x` is no matrix.
    DTypeError
        If `x` is not real, or `rank` no integer.
    OptionError
        If `rank` does not fit, or an entry of `x` is not finite.

    Notes
    -----
    ``k (m + n)`` numbers instead of ``m n`` (`break_even_rank`), and the squared error is the sum of the
    squared singular values left out.  Both factors get the square root of Σ, so that neither is larger.
    **Special cases**

    - The entry of largest magnitude in a column of `left`, the first of equal ones, is positive.
    - Equal singular values leave the factors open; if the cut is between them, the product too.

    References
    ----------
    .. [1] Eckart & Young, 1936, Psychometrika 1, 211-218, doi:10.1007/BF02288367.
    .. [2] Golub & Van Loan, 2013, Matrix Computations, 4th edition, theorem 2.4.8.

    Examples
    --------
    >>> left, right = truncated_svd(np.diag([4.0, 1.0]), rank=1)
    >>> left @ right.T
    array([[4., 0.],
           [0., 0.]])
    """
    (x,) = floating(x=x)
    u, values, v = _signed_svd(x, rank)
    root = np.sqrt(values[:rank])
    return Factors(round_to(u[:, :rank] * root, x.dtype), round_to(v[:, :rank] * root, x.dtype))


def truncated_svd_vjp(
    x: FloatArray, dleft: FloatArray, dright: FloatArray, /, *, rank: int
) -> MatrixGradient:
    """Return the gradient of ``sum(dleft * left) + sum(dright * right)`` for the factors of `truncated_svd`.

    Parameters
    ----------
    x, rank
        As for `truncated_svd`.
    dleft, dright : ndarray of float, shapes (m, k) and (n, k)
        Gradients of the factors.

    Returns
    -------
    MatrixGradient
        In the dtype of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `truncated_svd`, and if a gradient has not the shape of its factor.

    Notes
    -----
    A vector turns towards another by the reciprocal of the gap of their squared singular values, so the
    gradient is infinite or NaN where a kept value is 0 or equals another one; those left out may be equal.
    That of a loss of the product ``left @ right.T`` is finite as long as the cut is not between equal values.

    References
    ----------
    .. [1] Giles, 2008, "An extended collection of matrix derivative results", Oxford NA-08/01, section 3.3.
    .. [2] Townsend, 2016, "Differentiating the singular value decomposition": terms off the thin part.

    Examples
    --------
    A singular value of 4 and its root of 2 grow by 1 and 1/4:

    >>> x, one = np.diag([4.0, 1.0]), np.array([[1.0], [0.0]])
    >>> truncated_svd_vjp(x, one, 0 * one, rank=1).dx
    array([[0.25, 0.  ],
           [0.  , 0.  ]])
    """
    x, dleft, dright = floating(x=x, dleft=dleft, dright=dright)
    u, values, v = _signed_svd(x, rank)
    bind_axes({"x": (x, "m n"), "dleft": (dleft, "m k"), "dright": (dright, "n k")})
    if dleft.shape[1] != rank:
        raise ShapeError(f"dleft: expected {rank} columns, the rank, got shape {dleft.shape}")
    dleft, dright = widen(dleft).astype(u.dtype, copy=False), widen(dright).astype(u.dtype, copy=False)
    root = np.sqrt(values[:rank])
    with np.errstate(divide="ignore", invalid="ignore"):
        dvalues = (np.sum(u[:, :rank] * dleft, axis=0) + np.sum(v[:, :rank] * dright, axis=0)) / (2 * root)
        du, dv = np.zeros_like(u), np.zeros_like(v)  # nothing asks for what is left out
        du[:, :rank], dv[:, :rank] = dleft * root, dright * root
        squares = values**2
        gaps = squares - squares[:, None]
        gaps[rank:, rank:] = 1  # two that are left out do not turn towards each other
        np.fill_diagonal(gaps, 1)
        turned_u, turned_v = u.T @ du, v.T @ dv
        inner = ((turned_u - turned_u.T) / gaps) * values + values[:, None] * ((turned_v - turned_v.T) / gaps)
        inner[np.arange(rank), np.arange(rank)] = dvalues
        dx = u @ inner @ v.T
        dx += ((du - u @ turned_u)[:, :rank] / values[:rank]) @ v[:, :rank].T
        dx += (u[:, :rank] / values[:rank]) @ (dv - v @ turned_v)[:, :rank].T
    return MatrixGradient(round_to(dx, x.dtype))


def _signed_svd(x: FloatArray, rank: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return all singular vectors as columns and the values, in the wide dtype, signed as promised."""
    if x.ndim != 2:
        raise ShapeError(f"x: expected a matrix, got shape {x.shape}")
    if whole("rank", rank, 0) > min(x.shape):
        raise OptionError(f"rank: expected at most {min(x.shape)} for shape {x.shape}, got {rank}")
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    if not np.isfinite(wide).all():
        raise OptionError("x: expected finite numbers, got infinity or NaN")
    u, values, v = np.linalg.svd(wide, full_matrices=False)
    if x.shape[0]:
        largest = u[np.argmax(np.abs(u), axis=0), np.arange(u.shape[1])]
        signs = np.where(largest < 0, -1, 1).astype(wide.dtype)
        return u * signs, values, v.T * signs
    return u, values, v.T


def break_even_rank(m: int, n: int) -> int:
    """Return the largest rank whose factors are smaller than an m x n matrix: ``k (m + n) < m n``.

    Parameters
    ----------
    m, n : int
        Rows and columns, from 1.

    Returns
    -------
    int
        ``ceil(m n / (m + n)) - 1``: below half of the smaller side for a square matrix.

    Examples
    --------
    A square matrix of 768 must lose more than half of its rank before anything is saved:

    >>> break_even_rank(768, 768), break_even_rank(768, 3072)
    (383, 614)
    """
    m, n = whole("m", m), whole("n", n)
    return -(-m * n // (m + n)) - 1
