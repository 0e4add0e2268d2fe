"""Codebook quantisation: every number, or vector, is the index of one of k centroids (k-means)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.objectives.cross_entropy import token_ids
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "Codebook",
    "codebook",
    "codebook_dequantize",
    "codebook_dequantize_vjp",
    "linear_centroids",
    "power_of_two",
]


class Codebook(NamedTuple):
    """The index of each vector's centroid, and the centroids."""

    codes: IntArray
    centroids: FloatArray


def linear_centroids(x: FloatArray, /, *, k: int) -> FloatArray:
    """Return k centroids evenly spaced over the range of `x`: Deep Compression's best start.

    Parameters
    ----------
    x : ndarray of float, any shape, not empty
        Weights.
    k : int
        How many centroids.

    Returns
    -------
    ndarray of float, shape (k, 1)
        Ascending; with k = 1 the middle of the range.

    Raises
    ------
    DTypeError, OptionError
        If `x` is not real, empty, or holds NaN or infinity, or `k` is below 1.

    References
    ----------
    .. [1] Han et al., 2016, arXiv:1510.00149, section 3.2, linear initialization.

    Examples
    --------
    >>> linear_centroids(np.array([3.0, -1.0]), k=3).T
    array([[-1.,  1.,  3.]])
    """
    (x,) = floating(x=x)
    whole("k", k)
    if not x.size:
        raise OptionError("x: expected at least one number, got none")
    wide = widen(x)
    if not np.isfinite(wide).all():
        raise OptionError("x: expected finite numbers, got NaN or infinity")
    place = np.linspace(0, 1, k) if k > 1 else np.asarray([0.5])
    steps = wide.min() * (1 - place) + wide.max() * place
    return round_to(steps.astype(wide.dtype)[:, None], x.dtype)


def sample_vectors(rng: np.random.Generator, *, n: int, d: int, k: int, values: str) -> Case:
    """Return a call of `codebook` on vectors drawn from `rng`, its first centroids among them.

    Examples
    --------
    >>> case = sample_vectors(np.random.default_rng(0), n=5, d=1, k=2, values="normal")
    >>> [a.shape for a in case.args]
    [(5, 1), (2, 1)]
    """
    x = rng.standard_normal((n, d))
    if values == "few":  # fewer distinct vectors than centroids, perhaps
        x = np.rint(x)
    initial = rng.standard_normal((k, d))
    if values == "far":
        initial[: k // 2] += 100.0  # clusters that stay empty
    return Case((x, initial), {"iterations": 6})


@technique(
    "quant.codebook",
    entries=(70,),
    kind="function",
    source=Source("Han et al. 2016", "arXiv:1510.00149", "section 3, eq. 2 (weight sharing by k-means)"),
    axes={"n": (1, 30), "d": (1, 3), "k": (1, 6)},
    options={"values": ("normal", "few", "far")},
    edges=(
        {"n": 0, "d": 1, "k": 2},
        {"n": 1, "d": 1, "k": 1, "values": "normal"},
        {"n": 4, "d": 1, "k": 6, "values": "normal"},
        {"n": 20, "d": 3, "k": 4, "values": "far"},
        {"n": 30, "d": 1, "k": 5, "values": "few"},
    ),
    sample=sample_vectors,
)
def codebook(x: FloatArray, initial: FloatArray, /, *, iterations: int = 50) -> Codebook:
    """Return the codes and centroids of Lloyd's algorithm, from given centroids.

    Parameters
    ----------
    x : ndarray of float, shape (n, d)
        Vectors: d = 1 for weights, 3 for colours.
    initial : ndarray of float, shape (k, d)
        Where the centroids start, for example `linear_centroids`.
    iterations : int
        At most so many rounds of moving each centroid to the mean of its vectors; it ends sooner when no
        code changes.

    Returns
    -------
    Codebook
        ``codes`` int64 (n,), each the nearest of the returned ``centroids`` (k, d).

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If there is no centroid, `iterations` is below 0, or a number is NaN or infinite.

    Notes
    -----
    The distortion ``sum |x - centroid|²`` falls with every round and ends at a local minimum, which depends
    on the start.  Stored, it takes ``n ceil(log2 k)`` bits and the centroids.

    **Special cases**

    - Of equally near centroids the first is taken.
    - A centroid without vectors stays where it is.
    - If x has no more than k distinct vectors and starts at them, nothing is lost.

    References
    ----------
    .. [1] Lloyd, 1982, doi:10.1109/TIT.1982.1056489, method I.
    .. [2] Han et al., 2016, arXiv:1510.00149, section 3.1, eq. 2.

    Examples
    --------
    >>> weights = np.array([[2.09], [-0.98], [1.48], [0.09], [0.05], [-0.14], [-1.08], [2.12]])
    >>> codes, centroids = codebook(weights, np.array([[-1.0], [0.0], [1.5], [2.0]]))
    >>> codes, centroids.T
    (array([3, 0, 2, 1, 1, 1, 0, 3]), array([[-1.03 ,  0.   ,  1.48 ,  2.105]]))
    """
    x, initial = floating(x=x, initial=initial)
    size = bind_axes({"x": (x, "n d"), "initial": (initial, "k d")})
    whole("iterations", iterations, least=0)
    if not size["k"]:
        raise OptionError("initial: expected at least one centroid, got none")
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    centroids = widen(initial).astype(wide.dtype, copy=True)
    if not (np.isfinite(wide).all() and np.isfinite(centroids).all()):
        raise OptionError("x, initial: expected finite numbers, got NaN or infinity")
    # Exactly, by a power of two: so that no square overflows or vanishes.
    power = power_of_two(wide, centroids)
    wide, centroids = np.ldexp(wide, -power), np.ldexp(centroids, -power)
    codes = _nearest(wide, centroids)
    for _ in range(iterations):
        counts = np.bincount(codes, minlength=size["k"])
        sums = np.zeros_like(centroids)
        np.add.at(sums, codes, wide)
        filled = counts > 0
        centroids[filled] = sums[filled] / counts[filled, None].astype(wide.dtype)
        moved = _nearest(wide, centroids)
        if np.array_equal(moved, codes):
            break
        codes = moved
    return Codebook(codes, round_to(np.ldexp(centroids, power), x.dtype))


def codebook_dequantize(codes: IntArray, centroids: FloatArray, /) -> FloatArray:
    """Return the centroid of every code.

    Parameters
    ----------
    codes : ndarray of int, any shape
        Indices.
    centroids : ndarray of float, shape (k, d)
        As from `codebook`.

    Returns
    -------
    ndarray of float, shape (*codes.shape, d)

    Raises
    ------
    ShapeError, DTypeError
        If a code is no row of `centroids`, or the arrays are no integers and real numbers.

    Examples
    --------
    >>> codebook_dequantize(np.array([1, 0]), np.array([[0.5], [2.0]])).T
    array([[2. , 0.5]])
    """
    codes, (centroids,) = token_ids("codes", codes), floating(centroids=centroids)
    size = bind_axes({"centroids": (centroids, "k d")})
    if codes.size and not 0 <= codes.min() <= codes.max() < size["k"]:
        raise ShapeError(f"codes: expected 0 to {size['k'] - 1}, got {codes.min()} to {codes.max()}")
    values: FloatArray = centroids[codes]
    return values


def codebook_dequantize_vjp(codes: IntArray, centroids: FloatArray, dy: FloatArray, /) -> FloatArray:
    """Return the gradient of the centroids: the sum of the gradients of all that share one.

    References
    ----------
    .. [1] Han et al., 2016, arXiv:1510.00149, section 3.3, eq. 3.

    Examples
    --------
    >>> codebook_dequantize_vjp(np.array([1, 0, 1]), np.zeros((2, 1)), np.array([[1.0], [2.0], [3.0]])).T
    array([[2., 4.]])
    """
    codebook_dequantize(codes, centroids)  # for what it refuses
    codes, (centroids, dy) = token_ids("codes", codes), floating(centroids=centroids, dy=dy)
    if dy.shape != (*codes.shape, centroids.shape[1]):
        raise ShapeError(f"dy: expected shape {(*codes.shape, centroids.shape[1])}, got {dy.shape}")
    gradient = np.zeros(centroids.shape, wide_dtype(dy.dtype))
    np.add.at(gradient, codes, widen(dy))
    return round_to(gradient, dy.dtype)


def power_of_two(*arrays: FloatArray) -> int:
    """Return the exponent of the power of two just above the largest magnitude.

    Examples
    --------
    >>> power_of_two(np.array([3.0, -5.0])), power_of_two(np.zeros(2))
    (3, 0)
    """
    largest = max((float(np.max(np.abs(array), initial=0.0)) for array in arrays), default=0.0)
    return int(np.frexp(largest)[1])


def _nearest(x: FloatArray, centroids: FloatArray) -> IntArray:
    """Return the first of the nearest centroids of each vector, a chunk of vectors at a time."""
    chunk = max(1, (1 << 22) // max(1, centroids.size))  # 4M differences at once, whatever n
    found = [
        np.argmin(np.sum(np.square(x[i : i + chunk, None] - centroids), axis=2), axis=1)
        for i in range(0, len(x), chunk)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)
