"""The nearest matrix of a given rank, kept as two thin factors: Eckart and Young's theorem."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import floating, whole

__all__ = ["Factors", "break_even_rank", "truncated_svd"]


class Factors(NamedTuple):
    """Two thin matrices, ``left`` (m, k) and ``right`` (n, k); the product is ``left @ right.T``."""

    left: FloatArray
    right: FloatArray


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
        x = 1e150 * x
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
    source=Source("Eckart & Young 1936", "doi:10.1007/BF02288367", "the theorem of section 4"),
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
    if x.ndim != 2:
        raise ShapeError(f"x: expected a matrix, got shape {x.shape}")
    if whole("rank", rank, 0) > min(x.shape):
        raise OptionError(f"rank: expected at most {min(x.shape)} for shape {x.shape}, got {rank}")
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    if not np.isfinite(wide).all():
        raise OptionError("x: expected finite numbers, got infinity or NaN")
    u, values, v = np.linalg.svd(wide, full_matrices=False)
    left, right = u[:, :rank], v[:rank].T
    if x.shape[0]:
        largest = left[np.argmax(np.abs(left), axis=0), np.arange(rank)]
        signs = np.where(largest < 0, -1, 1).astype(wide.dtype)
        left, right = left * signs, right * signs
    root = np.sqrt(values[:rank])
    return Factors(round_to(left * root, x.dtype), round_to(right * root, x.dtype))


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
