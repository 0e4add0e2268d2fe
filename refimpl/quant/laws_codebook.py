"""Laws of codebooks, found by k-means or by dynamic programming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]


def _distances(x: FloatArray, centroids: FloatArray) -> FloatArray:
    squares: FloatArray = np.sum((x[:, None] - centroids) ** 2, axis=2)
    return squares


def _distortion(x: FloatArray, centroids: FloatArray) -> float:
    return float(np.sum(np.min(_distances(x, centroids), axis=1, initial=np.inf))) if x.size else 0.0


def _room(case: Case) -> float:
    narrow = case.args[0].dtype
    eps = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10}.get(narrow.name, 2.0**-7)
    wide = in_float64(case.args[0])
    room: float = 64 * eps * (float(np.sum(wide**2)) + 1e4 * (narrow.itemsize < 8) * eps)
    return room


@law("quant.codebook")
def every_code_is_the_nearest(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """No centroid is nearer to a vector than its own, and of equals the first is taken."""
    codes, centroids = case.call(f)
    far = _distances(in_float64(case.args[0]), in_float64(centroids))
    if far.size:
        mine = np.take_along_axis(far, np.asarray(codes)[:, None], axis=1)[:, 0]
        require(mine <= far.min(axis=1) + _room(case), "a nearer centroid was passed over")


@law("quant.codebook")
def rounds_never_hurt(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """More rounds never raise the distortion, and none at all leaves the centroids."""
    x = in_float64(case.args[0])
    none = case.replace(iterations=0).call(f)
    require(in_float64(none[1]) == in_float64(case.args[1]), "centroids moved in no rounds")
    series = [_distortion(x, in_float64(case.replace(iterations=i).call(f)[1])) for i in range(4)]
    require(np.diff(series) <= _room(case), f"the distortion rises: {series}")


@law("quant.codebook")
def centroids_are_means(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """After enough rounds each centroid is the mean of its vectors; an empty one has not moved."""
    x, initial = (in_float64(array) for array in case.args)
    codes, centroids = case.replace(iterations=100).call(f)
    codes = np.asarray(codes)
    for index, centroid in enumerate(in_float64(centroids)):
        mine = x[codes == index]
        if len(mine):
            require(np.sum((centroid - mine.mean(axis=0)) ** 2) <= _room(case), f"centroid {index}")
    empty = np.bincount(codes, minlength=len(initial)) == 0
    first = np.asarray(case.replace(iterations=0).call(f)[0])
    never = empty & (np.bincount(first, minlength=len(initial)) == 0)
    if case.kwargs.get("iterations") and len(x):
        moved = np.any(in_float64(case.replace(iterations=1).call(f)[1]) != initial, axis=1)
        require(~moved[never], "a centroid without vectors moved")


@law("quant.codebook")
def distinct_vectors_are_kept(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Started at all distinct vectors, it loses nothing."""
    x = case.args[0]
    if not len(x):
        return
    distinct = round_to(np.unique(in_float64(x), axis=0), x.dtype)
    codes, centroids = case.replace(x, distinct).call(f)
    require(in_float64(centroids)[np.asarray(codes)] == in_float64(x), "a vector changed")


@law("quant.codebook.optimal")
def no_start_of_k_means_is_better(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Lloyd's algorithm ends no lower, wherever it starts, and neither does a uniform grid."""
    from refimpl.quant.codebook import codebook, linear_centroids

    x = in_float64(case.args[0]).reshape(-1, 1)
    best = _distortion(x, in_float64(case.call(f)))
    k = case.kwargs["k"]
    grid = linear_centroids(x, k=k)
    rng = np.random.default_rng(0)
    starts = [grid] + [rng.choice(x, (k,)) for _ in range(3)]
    found = [_distortion(x, grid)] + [_distortion(x, codebook(x, start).centroids) for start in starts]
    require(best <= min(found) + _room(case), f"distortion {best}, k-means found {min(found)}")


@law("quant.codebook.optimal")
def more_centroids_never_hurt(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With one more centroid the distortion does not rise; with one for each number it is 0."""
    x = in_float64(case.args[0]).reshape(-1, 1)
    series = [_distortion(x, in_float64(case.replace(k=k).call(f))) for k in (1, 2, 3, max(len(x), 4))]
    require(np.diff(series) <= _room(case), f"the distortion rises: {series}")
    require(series[-1] <= _room(case), f"{series[-1]} is left with a centroid for each number")


@law("quant.codebook.optimal")
def order_does_not_matter(f: Function, case: Case, close: Close) -> None:
    """The same numbers in another order have the same centroids."""
    (x,) = case.args
    close(case.replace(x[::-1].copy()).call(f), case.call(f), "numbers reversed")


@law("quant.codebook.optimal")
def centroids_shift_with_the_numbers(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The best distortion is that of the negated numbers."""
    x = in_float64(case.args[0]).reshape(-1, 1)
    turned = case.replace(-case.args[0])
    apart = _distortion(x, in_float64(case.call(f))) - _distortion(-x, in_float64(turned.call(f)))
    require(abs(apart) <= _room(case), f"negated numbers differ by {apart}")
