"""Stable softmax, and the online softmax that FlashAttention is built on.

A softmax over a row needs two statistics, the maximum m and the sum l of ``exp(x - m)``.  Those of two parts
of a row merge into those of the whole, in any order, so a row can be visited in blocks that fit on chip.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import floating, whole

__all__ = [
    "SoftmaxState",
    "block_state",
    "merge",
    "online_softmax",
    "online_softmax_vjp",
    "rescale",
    "softmax",
]


class SoftmaxState(NamedTuple):
    """Maximum `m` and sum `l` of ``exp(x - m)`` over what was seen of each row; (-inf, 0) at first."""

    m: FloatArray
    l: FloatArray  # noqa: E741 (the papers' letter)


def rescale(old: FloatArray, new: FloatArray) -> FloatArray:
    """Return ``exp(old - new)``, the factor that moves a sum from one maximum to a larger one.

    Parameters
    ----------
    old, new : ndarray of float
        Maxima, ``old <= new``; either may be -inf.

    Returns
    -------
    ndarray of float
        In [0, 1]; 0 where both are -inf, because nothing was seen and there is nothing to move.

    Examples
    --------
    >>> rescale(np.array([1.0, -np.inf, -np.inf]), np.array([1.0, 0.0, -np.inf]))
    array([1., 0., 0.])
    """
    empty = np.isneginf(old)
    return np.where(empty, 0, np.exp(np.where(empty, 0, old) - np.where(empty, 0, new))).astype(old.dtype)


def block_state(x: FloatArray) -> SoftmaxState:
    """Return the state of a block of scores, over the last axis; an empty or masked one gives (-inf, 0).

    Examples
    --------
    >>> block_state(np.zeros((1, 3)))
    SoftmaxState(m=array([0.]), l=array([3.]))
    """
    m = np.max(x, axis=-1, initial=-np.inf)
    return SoftmaxState(m, np.sum(rescale(x, m[..., None]), axis=-1))


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """Return the state of two parts together: associative, commutative, with identity (-inf, 0).

    References
    ----------
    .. [1] Milakov & Gimelshein, 2018, arXiv:1805.02867, section 3.1, eq. 4.

    Examples
    --------
    >>> part = SoftmaxState(np.array([2.0]), np.array([1.5]))
    >>> merge(part, SoftmaxState(np.array([-np.inf]), np.array([0.0]))) == part
    True
    """
    m = np.maximum(a.m, b.m)
    return SoftmaxState(m, rescale(a.m, m) * a.l + rescale(b.m, m) * b.l)


@overload
def softmax(x: FloatArray, /, *, return_lse: Literal[False] = False) -> FloatArray: ...
@overload
def softmax(x: FloatArray, /, *, return_lse: Literal[True]) -> tuple[FloatArray, FloatArray]: ...
def softmax(x: FloatArray, /, *, return_lse: bool = False) -> FloatArray | tuple[FloatArray, FloatArray]:
    """Return ``exp(x) / sum(exp(x))`` over the last axis, computed from ``x - max(x)``.

    Parameters
    ----------
    x : ndarray of float, shape (..., n)
        Scores; -inf takes part with weight 0.
    return_lse : bool
        Also return ``log(sum(exp(x)))``, shape (...).

    Returns
    -------
    ndarray of float, shape (..., n)
        A row of nothing but -inf gives 0, and -inf as its log-sum-exp.

    Examples
    --------
    >>> softmax(np.array([[1e4, 1e4], [-np.inf, -np.inf]]))
    array([[0.5, 0.5],
           [0. , 0. ]])
    """
    m, total = block_state(x)
    p = _normalized(x, SoftmaxState(m, total))
    if not return_lse:
        return p
    with np.errstate(divide="ignore"):  # log(0) = -inf is the documented result
        return p, m + np.log(total)


def sample_rows(rng: np.random.Generator, *, rows: int, n: int, block_size: int, extra: str = "none") -> Case:
    """Return a call of `online_softmax` on rows of scores drawn from `rng`.

    Examples
    --------
    >>> sample_rows(np.random.default_rng(0), rows=2, n=5, block_size=2).args[0].shape
    (2, 5)
    """
    x = 3.0 * rng.standard_normal((rows, n))
    if extra == "large":
        x = 3e3 * x
    if extra == "masked":
        x[rng.random((rows, n)) < 0.5] = -np.inf
        x[: rows // 2] = -np.inf
    return Case((x,), {"block_size": block_size})


@technique(
    "attention.online_softmax",
    entries=(27,),
    kind="function",
    source=Source("Milakov & Gimelshein 2018", "arXiv:1805.02867", "algorithm 3"),
    axes={"rows": (1, 4), "n": (1, 40), "block_size": (1, 12)},
    options={"extra": ("none", "large", "masked")},
    edges=(
        {"rows": 0, "n": 3},
        {"rows": 2, "n": 0},
        {"rows": 2, "n": 6, "block_size": 2, "extra": "none"},
        {"rows": 1, "n": 1, "block_size": 1, "extra": "none"},
        {"rows": 3, "n": 7, "block_size": 3, "extra": "masked"},
        {"rows": 3, "n": 7, "block_size": 9, "extra": "large"},
    ),
    sample=sample_rows,
    vjp="refimpl.attention.online_softmax:online_softmax_vjp",
)
def online_softmax(x: FloatArray, /, *, block_size: int = 1) -> FloatArray:
    """Return the softmax over the last axis, its statistics gathered in one pass over blocks.

    Parameters
    ----------
    x : ndarray of float, shape (..., n)
        Scores; -inf takes part with weight 0.
    block_size : int
        Scores visited at a time; 1 is the published algorithm.  The last block may be shorter.

    Returns
    -------
    ndarray of float, shape (..., n)
        In the dtype of `x`.

    Raises
    ------
    DTypeError
        If `x` is not real, or `block_size` no integer.
    OptionError
        If `block_size` is below 1.
    ShapeError
        If `x` is a single number.

    Notes
    -----
    **Special cases**

    - A row of nothing but -inf gives 0.
    - Scores of any finite size do not overflow.

    References
    ----------
    .. [1] Milakov & Gimelshein, 2018, arXiv:1805.02867, algorithm 3.

    Examples
    --------
    >>> online_softmax(np.log([1.0, 2.0, 5.0]), block_size=2).round(6)
    array([0.125, 0.25 , 0.625])
    """
    (x,) = floating(x=x)
    whole("block_size", block_size)
    if x.ndim == 0:
        raise ShapeError("x: expected at least one axis, got a number")
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    state = block_state(wide[..., :0])
    for start in range(0, x.shape[-1], block_size):
        state = merge(state, block_state(wide[..., start : start + block_size]))
    return round_to(_normalized(wide, state), x.dtype)


def online_softmax_vjp(x: FloatArray, dp: FloatArray, /, *, block_size: int = 1) -> tuple[FloatArray]:
    """Return the gradient of ``sum(dp * online_softmax(x))``: ``p ∘ (dp - rowsum(p ∘ dp))``.

    Parameters
    ----------
    x, dp : ndarray of float, shape (..., n)
        Scores, and the gradient of their softmax.
    block_size : int
        As for `online_softmax`.

    Returns
    -------
    tuple of one ndarray of float, shape (..., n)
        Each row sums to 0.

    Examples
    --------
    >>> online_softmax_vjp(np.zeros((1, 2)), np.array([[1.0, 0.0]]))[0]
    array([[ 0.25, -0.25]])
    """
    x, dp = floating(x=x, dp=dp)
    p = widen(online_softmax(x, block_size=block_size)).astype(wide_dtype(x.dtype), copy=False)
    wide = widen(dp).astype(p.dtype, copy=False)
    return (round_to(p * (wide - np.sum(p * wide, axis=-1, keepdims=True)), x.dtype),)


def _normalized(x: FloatArray, state: SoftmaxState) -> FloatArray:
    total = np.where(state.l == 0, 1, state.l).astype(x.dtype)[..., None]
    return np.asarray(rescale(x, state.m[..., None]) / total)
