"""How few directions the weights of a transformer need: the lecture's Figure 1, and what chance would give.

A curve that rises steeply says that a matrix is nearly one of low rank.  Every matrix of numbers has such a
curve, a random one too, so it is held against Marchenko and Pastur's law for random matrices of its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["Method", "Pairing", "explained_variance", "layer_blocks", "random_matrix_curve", "rank_for"]

Method: TypeAlias = Literal["pca", "svd"]
Pairing: TypeAlias = Literal["columns", "rows"]


def sample_weights(
    rng: np.random.Generator,
    *,
    m: int,
    n: int,
    pairing: Pairing | None = None,
    method: Method = "pca",
    extra: str = "none",
) -> Case:
    """Return a call of `explained_variance` on a matrix, or a pair of them, drawn from `rng`.

    Examples
    --------
    >>> [x.shape for x in sample_weights(np.random.default_rng(0), m=4, n=3, pairing="rows").args]
    [(4, 3), (4, 3)]
    """
    blocks = [rng.standard_normal((m, n)) for _ in range(2 if pairing else 1)]
    if extra == "low":
        blocks = [x[:, :1] * x[:1] for x in blocks]
    if extra == "ties":
        blocks = [np.repeat(x[:1], m, axis=0) for x in blocks]
    if extra == "large":
        blocks = [1e4 * x for x in blocks]  # their squares overflow float16
    options = {"method": method} | ({"pairing": pairing} if pairing else {})
    return Case(tuple(blocks), options)


def curve_terms(case: Case) -> tuple[int, FloatArray]:
    """Return the length of the reductions and the size of the terms: shares of one whole.

    Examples
    --------
    >>> curve_terms(Case((np.eye(3),)))
    (12, array([1., 1., 1., 1.]))
    """
    return 2 * sum(case.args[0].shape), np.ones(case.call(explained_variance).shape)


@technique(
    "transformer.redundancy",
    entries=(16,),
    kind="function",
    source=Source("Ren et al. 2022", "arXiv:2205.10036", "Figure 1"),
    axes={"m": (1, 8), "n": (1, 8)},
    options={"method": ("pca", "svd"), "pairing": (None, "columns", "rows"), "extra": ("none", "low")},
    edges=(
        {"m": 1, "n": 1},
        {"m": 0, "n": 3},
        {"m": 3, "n": 0},
        {"m": 5, "n": 5, "extra": "ties", "method": "pca"},
        {"m": 5, "n": 5, "extra": "ties", "method": "svd"},
        {"m": 5, "n": 3, "extra": "large"},
        {"m": 3, "n": 7, "extra": "none", "pairing": "columns"},
    ),
    sample=sample_weights,
    terms=lambda case: curve_terms(case),
)
def explained_variance(
    x: FloatArray,
    partner: FloatArray | None = None,
    /,
    *,
    method: Method = "pca",
    pairing: Pairing = "columns",
) -> FloatArray:
    """Return what share of the variance the first r principal components hold, for r from 0 on.

    Parameters
    ----------
    x : ndarray of float, shape (m, n)
        A weight matrix, or a block of one.
    partner : ndarray of float, shape (m, n), optional
        A second one, taken together with the first.
    method : {"pca", "svd"}
        "pca" takes the mean of its rows off every column first, as the name says; "svd" does not.
    pairing : {"columns", "rows"}
        "columns" puts the columns of the partner beside those of `x`, shape (m, 2 n), "rows" its rows below,
        shape (2 m, n).

    Returns
    -------
    ndarray of float, shape (min(rows, columns) + 1,)
        ``Σ_{i <= r} σ_i² / Σ σ_i²`` in the dtype of the matrices: from 0 to 1, concave.

    Raises
    ------
    ShapeError
        If `x` is no matrix, or the partner has another shape.
    DTypeError
        If an array is not real.
    OptionError
        If `method` or `pairing` is none of those, or an entry is not finite.

    Notes
    -----
    Which of a block's sides are its rows follows ``x @ w``: a row for each input feature.  **Special cases**

    - Nothing to explain (zeros, equal rows with "pca", no entries at all) is explained by 0 components: 1
      everywhere.

    References
    ----------
    .. [1] Ren et al., 2022, arXiv:2205.10036, Figure 1 and appendix C.
    .. [2] Jolliffe, 2002, Principal Component Analysis, 2nd edition, section 6.1.1.

    Examples
    --------
    >>> explained_variance(np.diag([3.0, 1.0]), method="svd")
    array([0. , 0.9, 1. ])
    """
    if method not in ("pca", "svd"):
        raise OptionError(f"method: expected 'pca' or 'svd', got {method!r}")
    if pairing not in ("columns", "rows"):
        raise OptionError(f"pairing: expected 'columns' or 'rows', got {pairing!r}")
    blocks = floating(x=x) if partner is None else floating(x=x, partner=partner)
    bind_axes({name: (block, "m n") for name, block in zip(("x", "partner"), blocks, strict=False)})
    dtype = blocks[0].dtype
    wide = [widen(block).astype(wide_dtype(dtype), copy=False) for block in blocks]
    whole_matrix = np.concatenate(wide, axis=1 if pairing == "columns" else 0)
    if not np.isfinite(whole_matrix).all():
        raise OptionError("x: expected finite numbers, got infinity or NaN")
    size = np.max(np.abs(whole_matrix), initial=0)
    if size > 0:  # before squaring: squares may overflow
        whole_matrix = whole_matrix / size
    rounding = max(whole_matrix.shape) * np.finfo(whole_matrix.dtype).eps * np.linalg.norm(whole_matrix)
    if method == "pca" and whole_matrix.size:
        whole_matrix = whole_matrix - whole_matrix.mean(axis=0)
    values = np.linalg.svd(whole_matrix, compute_uv=False)
    if not values.size or values[0] <= rounding:
        return round_to(np.ones(len(values) + 1, whole_matrix.dtype), dtype)
    total = np.concatenate([np.zeros(1, values.dtype), np.cumsum(np.square(values))])
    return round_to(total / total[-1], dtype)


def rank_for(curve: FloatArray, share: float, /) -> int:
    """Return how many components hold at least `share` of the variance.

    Parameters
    ----------
    curve : ndarray of float, shape (K + 1,)
        As `explained_variance` returns it.
    share : float
        From 0 to 1.

    Returns
    -------
    int
        From 0 to K.

    Raises
    ------
    OptionError
        If `share` is outside [0, 1].

    Examples
    --------
    >>> rank_for(np.array([0.0, 0.5, 0.9, 1.0]), 0.9)
    2
    """
    if not 0 <= share <= 1:
        raise OptionError(f"share: expected a number from 0 to 1, got {share}")
    return int(np.argmax(np.asarray(curve) >= share))


def random_matrix_curve(rows: int, columns: int, /) -> FloatArray:
    """Return the curve of a large matrix of independent numbers of mean 0 and equal variance.

    Parameters
    ----------
    rows, columns : int
        Its shape, from 1; only their ratio matters, and the number of points.

    Returns
    -------
    ndarray of float64, shape (min(rows, columns) + 1,)
        From 0 to 1.

    Raises
    ------
    OptionError
        If a side is below 1.

    Notes
    -----
    With y the ratio of the sides, at most 1, and an eigenvalue written ``λ = 1 + y + 2 √y cos θ``, the law's
    density makes elementary integrals: the eigenvalues above λ hold the share ``(θ - sin θ cos θ) / π`` of
    the variance, and there are ``K P(θ)`` of them,

    ``P(θ) = ((1 + y) θ / 2 - √y sin θ - (1 - y) arctan(tan(θ/2) (1 - √y) / (1 + √y))) / (π y)``.

    References
    ----------
    .. [1] Marchenko & Pastur, 1967, Mathematics of the USSR-Sbornik 1, 457-483,
       doi:10.1070/SM1967v001n04ABEH001994.

    Examples
    --------
    Half of the components of a square random matrix hold nine tenths of its variance, though none is more
    needed than another:

    >>> random_matrix_curve(768, 768)[[192, 384, 576]].round(2)
    array([0.62, 0.89, 0.99])
    """
    few, many = sorted((whole("rows", rows), whole("columns", columns)))
    y, wanted = few / many, np.arange(few + 1) / few
    low, high = np.zeros(few + 1), np.full(few + 1, np.pi)
    for _ in range(60):  # bisection: P rises with θ
        middle = (low + high) / 2
        above = _share_of_eigenvalues(middle, y) > wanted
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    theta = (low + high) / 2
    curve: FloatArray = (theta - np.sin(theta) * np.cos(theta)) / np.pi
    curve[0], curve[-1] = 0.0, 1.0
    return curve


def _share_of_eigenvalues(theta: FloatArray, y: float) -> FloatArray:
    root = y**0.5
    angle = np.arctan(np.tan(theta / 2) * (1 - root) / (1 + root))
    share: FloatArray = ((1 + y) * theta / 2 - root * np.sin(theta) - (1 - y) * angle) / (np.pi * y)
    return share


def layer_blocks(weights: Mapping[str, FloatArray], /) -> dict[str, FloatArray]:
    """Return a layer's square blocks: Q, K, V, O, and the feed-forward matrices cut along their long side.

    Parameters
    ----------
    weights : mapping of str to ndarray
        ``w_q``, ``w_k``, ``w_v``, ``w_o`` of shape (D, D), ``w_1`` (D, F) and ``w_2`` (F, D), as ``x @ w``
        wants them; F is a multiple of D.

    Returns
    -------
    dict of str to ndarray
        ``q``, ``k``, ``v``, ``o``, ``in_1`` and on, ``out_1`` and on, all of shape (D, D): twelve of them for
        F = 4 D, as in the paper.

    Raises
    ------
    ShapeError
        If a weight is missing in shape, or F is no multiple of D.

    Examples
    --------
    >>> square = {f"w_{name}": np.zeros((2, 2)) for name in "qkvo"}
    >>> list(layer_blocks({**square, "w_1": np.zeros((2, 4)), "w_2": np.zeros((4, 2))}))
    ['q', 'k', 'v', 'o', 'in_1', 'in_2', 'out_1', 'out_2']
    """
    axes = {**{f"w_{name}": "D D" for name in "qkvo"}, "w_1": "D F", "w_2": "F D"}
    sizes = bind_axes({name: (np.asarray(weights[name]), letters) for name, letters in axes.items()})
    D, F = sizes["D"], sizes["F"]
    if D == 0 or F % D:
        raise ShapeError(f"w_1: axis F must be a multiple of D; got F={F}, D={D}")
    parts = [slice(start, start + D) for start in range(0, F, D)]
    blocks = {name: weights[f"w_{name}"] for name in "qkvo"}
    blocks |= {f"in_{index}": weights["w_1"][:, part] for index, part in enumerate(parts, 1)}
    return blocks | {f"out_{index}": weights["w_2"][part] for index, part in enumerate(parts, 1)}
