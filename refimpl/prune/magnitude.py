"""Pruning by magnitude: the largest weights stay, over all layers together or n of every m."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import BoolArray, FloatArray, widen
from refimpl.prune.constrained import largest
from refimpl.registry import Case, Source, technique
from refimpl.validation import floating, whole

__all__ = ["magnitude", "magnitude_global", "n_m"]


def sample_weights(rng: np.random.Generator, *, rows: int, columns: int, keep: int, values: str) -> Case:
    """Return a call of `magnitude`; `values` "ties" gives few distinct magnitudes.

    Examples
    --------
    >>> shape = dict(rows=2, columns=3, keep=1, values="ties")
    >>> sample_weights(np.random.default_rng(0), **shape).kwargs
    {'keep': 1}
    """
    w = rng.standard_normal((rows, columns))
    return Case((np.rint(w) if values == "ties" else w,), {"keep": min(keep, w.size)})


@technique(
    "prune.magnitude",
    entries=(78,),
    kind="function",
    source=Source("Han et al. 2015", "arXiv:1506.02626", "section 3: weights below a threshold are removed"),
    axes={"rows": (1, 4), "columns": (1, 6), "keep": (0, 24)},
    options={"values": ("random", "ties")},
    edges=(
        {"rows": 0, "columns": 3, "keep": 0},
        {"rows": 1, "columns": 1, "keep": 0},
        {"rows": 1, "columns": 1, "keep": 1},
        {"rows": 3, "columns": 5, "keep": 15, "values": "random"},
        {"rows": 3, "columns": 5, "keep": 7, "values": "ties"},
    ),
    sample=sample_weights,
    exact=True,
)
def magnitude(weights: FloatArray, /, *, keep: int) -> BoolArray:
    """Return the mask of the `keep` weights of largest magnitude.

    Parameters
    ----------
    weights : ndarray of float, any shape
        Weights of a layer.
    keep : int
        How many stay: counted, so that ties at a threshold do not matter.

    Returns
    -------
    ndarray of bool, shape of `weights`

    Raises
    ------
    DTypeError
        If `weights` is not real.
    OptionError
        If `keep` is not 0 to their number, or a weight is NaN.

    Notes
    -----
    The masked weights are the nearest array with at most `keep` numbers that are not 0.  Of equal magnitudes
    the first stay.  In fine-tuning the gradient is masked too.  Zeros save nothing by themselves: memory
    needs a sparse format, time a kernel for it.

    References
    ----------
    .. [1] Han et al., 2015, arXiv:1506.02626, section 3.

    Examples
    --------
    >>> magnitude(np.array([[0.5, -3.0], [1.0, 0.0]]), keep=2)
    array([[False,  True],
           [ True, False]])
    """
    size = _magnitudes("weights", weights)
    whole("keep", keep, least=0)
    if keep > size.size:
        raise OptionError(f"keep: expected at most the {size.size} weights there are, got {keep}")
    return largest(size, keep)


def magnitude_global(layers: Sequence[FloatArray], /, *, keep: int) -> tuple[BoolArray, ...]:
    """Return the masks of the `keep` weights of largest magnitude over all layers together.

    Parameters
    ----------
    layers : sequence of ndarray of float
        Of any shapes.
    keep : int
        How many stay in all.

    Returns
    -------
    tuple of ndarray of bool

    Raises
    ------
    DTypeError, OptionError
        As `magnitude`.

    Notes
    -----
    A layer whose weights are all scaled by c > 1 keeps more of them: scale does not matter within a layer,
    and does across layers.

    Examples
    --------
    >>> magnitude_global([np.array([1.0, 2.0]), np.array([[10.0]])], keep=2)
    (array([False,  True]), array([[ True]]))
    """
    sizes = [_magnitudes(f"layers[{index}]", layer) for index, layer in enumerate(layers)]
    mask = magnitude(np.concatenate([size.reshape(-1) for size in sizes] or [np.empty(0)]), keep=keep)
    ends = np.cumsum([size.size for size in sizes])
    return tuple(
        mask[end - size.size : end].reshape(size.shape) for size, end in zip(sizes, ends, strict=True)
    )


def sample_groups(
    rng: np.random.Generator, *, rows: int, groups: int, n: int, more: int, values: str
) -> Case:
    """Return a call of `n_m` on rows of whole groups.

    Examples
    --------
    >>> shape = dict(rows=2, groups=3, n=2, more=2, values="random")
    >>> sample_groups(np.random.default_rng(0), **shape).args[0].shape
    (2, 12)
    """
    w = rng.standard_normal((rows, groups * (n + more)))
    return Case((np.rint(w) if values == "ties" else w,), {"n": n, "m": n + more})


@technique(
    "prune.magnitude.n_m",
    entries=(78,),
    kind="function",
    source=Source("Mishra et al. 2021", "arXiv:2104.08378", "section 3: 2:4 structured sparsity"),
    axes={"rows": (1, 4), "groups": (1, 3), "n": (1, 3), "more": (0, 3)},
    options={"values": ("random", "ties")},
    edges=(
        {"rows": 0, "groups": 1, "n": 2, "more": 2},
        {"rows": 2, "groups": 0, "n": 2, "more": 2},
        {"rows": 1, "groups": 1, "n": 1, "more": 0},
        {"rows": 3, "groups": 2, "n": 2, "more": 2, "values": "ties"},
    ),
    sample=sample_groups,
    exact=True,
)
def n_m(weights: FloatArray, /, *, n: int = 2, m: int = 4) -> BoolArray:
    """Return the mask of the n largest magnitudes of every m neighbours along the last axis.

    Parameters
    ----------
    weights : ndarray of float, shape (..., K)
        The last axis is the one that products sum over (of ``x @ W``, pass ``W.T``); m divides K.
    n, m : int
        How many stay of how many: the tensor cores take 2 of 4.

    Returns
    -------
    ndarray of bool, shape of `weights`
        Exactly n of every m are True.

    Raises
    ------
    ShapeError, DTypeError
        If m does not divide the last axis, or `weights` is not real.
    OptionError
        If not ``1 <= n <= m``, or a weight is NaN.

    Notes
    -----
    Stored are n numbers of every m and where they stood: for 2:4 in float16, 2 bits for each kept number,
    9/16 of the dense size.  Of equal magnitudes the first stay.

    References
    ----------
    .. [1] Mishra et al., 2021, arXiv:2104.08378, section 3.

    Examples
    --------
    >>> n_m(np.array([[1.0, -4.0, 3.0, 2.0]]))
    array([[False,  True,  True, False]])
    """
    size = _magnitudes("weights", weights)
    whole("n", n)
    whole("m", m)
    if n > m:
        raise OptionError(f"n: expected at most m = {m}, got {n}")
    if not size.ndim or size.shape[-1] % m:
        raise ShapeError(f"weights: m = {m} must divide the last axis; got shape {size.shape}")
    groups = size.reshape(*size.shape[:-1], size.shape[-1] // m, m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[..., :n], True, axis=-1)
    return mask.reshape(size.shape)


def _magnitudes(name: str, weights: FloatArray) -> FloatArray:
    (weights,) = floating(**{name: weights})
    size: FloatArray = np.abs(widen(weights))
    if np.isnan(size).any():
        raise OptionError(f"{name}: expected numbers, got NaN")
    return size
