"""The best codebook of plain numbers, by dynamic programming: what no start of k-means beats."""

from __future__ import annotations

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, IntArray, round_to, widen
from refimpl.quant.codebook import power_of_two
from refimpl.registry import Case, Source, technique
from refimpl.validation import floating, whole

__all__ = ["optimal_codebook"]


def sample_numbers(rng: np.random.Generator, *, n: int, k: int, values: str) -> Case:
    """Return a call of `optimal_codebook` on numbers drawn from `rng`.

    Examples
    --------
    >>> sample_numbers(np.random.default_rng(0), n=2, k=2, values="few").args[0].shape
    (2,)
    """
    x = rng.standard_normal(n)
    return Case((np.rint(2 * x) if values == "few" else x,), {"k": k})


@technique(
    "quant.codebook.optimal",
    entries=(70,),
    kind="function",
    source=Source(
        "Lloyd 1982", "doi:10.1109/TIT.1982.1056489", "section III; Fisher 1958: dynamic programming"
    ),
    axes={"n": (1, 16), "k": (1, 5)},
    options={"values": ("normal", "few")},
    edges=(
        {"n": 1, "k": 1},
        {"n": 1, "k": 3},
        {"n": 8, "k": 8, "values": "normal"},
        {"n": 9, "k": 2, "values": "few"},
    ),
    sample=sample_numbers,
)
def optimal_codebook(x: FloatArray, /, *, k: int) -> FloatArray:
    """Return the k centroids with the least total squared error of any k, for plain numbers.

    Parameters
    ----------
    x : ndarray of float, any shape, not empty
        Numbers; their order does not matter.
    k : int
        How many centroids at most.

    Returns
    -------
    ndarray of float, shape (k, 1)
        Ascending means of intervals of the sorted numbers; the last is repeated if there are fewer than k
        distinct numbers.

    Raises
    ------
    DTypeError, OptionError
        If `x` is not real, empty, or holds NaN or infinity, or `k` is below 1.

    Notes
    -----
    Optimal clusters are intervals of the sorted numbers, so the best partition of the first j numbers into
    c intervals extends the best one of fewer numbers into c - 1: O(k n²) steps over distinct numbers.

    References
    ----------
    .. [1] Fisher, 1958, doi:10.1080/01621459.1958.10501479: grouping for maximum homogeneity.
    .. [2] Wang and Song, 2011, The R Journal 3(2), Ckmeans.1d.dp, eq. 1.

    Examples
    --------
    >>> optimal_codebook(np.array([0.0, 10.0, 1.0, 11.0, 20.0]), k=3).T
    array([[ 0.5, 10.5, 20. ]])
    """
    (x,) = floating(x=x)
    whole("k", k)
    wide = widen(x).astype(np.float64).reshape(-1)
    if not wide.size or not np.isfinite(wide).all():
        raise OptionError("x: expected finite numbers, and at least one")
    power = power_of_two(wide)
    values, weights = np.unique(np.ldexp(wide, -power), return_counts=True)
    center = float(np.average(values, weights=weights))  # sums of squares about it lose least
    n, clusters = values.size, min(k, values.size)
    moments = [np.concatenate([[0.0], np.cumsum(weights * (values - center) ** p)]) for p in range(3)]

    def scatter(starts: IntArray, end: int) -> FloatArray:
        """Return the squared error of the numbers from each of `starts` to `end`, about their mean."""
        mass, first, second = (moment[end] - moment[starts] for moment in moments)
        spread: FloatArray = np.maximum(second - first**2 / mass, 0.0)
        return spread

    best = np.full((clusters + 1, n + 1), np.inf)
    best[0, 0] = 0.0
    begin = np.zeros((clusters + 1, n + 1), np.int64)
    for c in range(1, clusters + 1):
        for end in range(c, n + 1):
            starts = np.arange(c - 1, end)
            totals = best[c - 1, starts] + scatter(starts, end)
            begin[c, end] = starts[np.argmin(totals)]
            best[c, end] = totals.min()
    centroids = []
    end = n
    for c in range(clusters, 0, -1):
        start = begin[c, end]
        centroids.append(
            center + (moments[1][end] - moments[1][start]) / (moments[0][end] - moments[0][start])
        )
        end = start
    ascending = centroids[::-1] + [centroids[0]] * (k - clusters)
    return round_to(np.ldexp(np.asarray(ascending), power)[:, None], x.dtype)
