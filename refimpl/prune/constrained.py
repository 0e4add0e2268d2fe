"""Pruning as an optimisation under a budget: the least loss with at most N weights that are not zero."""

from __future__ import annotations

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import BoolArray, FloatArray, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["constrained", "largest"]


def largest(scores: FloatArray, keep: int) -> BoolArray:
    """Return a mask of the `keep` largest scores, of equals the first.

    Examples
    --------
    >>> largest(np.array([1.0, 3.0, 1.0]), 2)
    array([ True,  True, False])
    """
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.reshape(-1), kind="stable")[:keep]] = True
    return mask.reshape(scores.shape)


def sample_quadratic(rng: np.random.Generator, *, n: int, keep: int, values: str) -> Case:
    """Return a call of `constrained`; `values` "ties" gives equal losses.

    Examples
    --------
    >>> [a.shape for a in sample_quadratic(np.random.default_rng(0), n=3, keep=1, values="random").args]
    [(3,), (3,)]
    """
    w, h = rng.standard_normal(n), np.exp(rng.standard_normal(n))
    if values == "ties":
        w, h = np.where(rng.random(n) < 0.5, -1.0, 1.0), np.ones(n)
    return Case((w, h), {"keep": min(keep, n)})


@technique(
    "prune.constrained",
    entries=(77,),
    kind="function",
    source=Source("LeCun et al. 1990", "Optimal Brain Damage, NIPS 2", "section 2, eq. 3 to 5"),
    axes={"n": (1, 9), "keep": (0, 9)},
    options={"values": ("random", "ties")},
    edges=(
        {"n": 0, "keep": 0},
        {"n": 1, "keep": 0},
        {"n": 1, "keep": 1},
        {"n": 5, "keep": 5, "values": "random"},
        {"n": 6, "keep": 3, "values": "ties"},
    ),
    sample=sample_quadratic,
    exact=True,
)
def constrained(weights: FloatArray, hessian: FloatArray, /, *, keep: int) -> BoolArray:
    """Return which weights to keep: the solution of ``min L(W_p)`` with at most N weights that are not 0.

    Parameters
    ----------
    weights : ndarray of float, shape (n,)
        At a minimum of the loss.
    hessian : ndarray of float, shape (n,)
        Diagonal of the loss's second derivative there, >= 0.
    keep : int
        N, how many may stay.

    Returns
    -------
    ndarray of bool, shape (n,)
        Exactly N are True.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If `keep` is not 0 to n, a second derivative is negative, or a number NaN or infinite.

    Notes
    -----
    Setting a weight to 0 costs ``h w² / 2`` if the loss is quadratic with a diagonal Hessian, and the costs
    add, so the N largest stay; of equals the first.  With equal derivatives it is pruning by magnitude.  The
    lecture writes ``|W_p|_0 < N``; meant is at most N.

    References
    ----------
    .. [1] LeCun, Denker and Solla, 1990, "Optimal Brain Damage", eq. 5.

    Examples
    --------
    A small weight stays if the loss is steep along it:

    >>> constrained(np.array([3.0, 1.0, -2.0]), np.array([0.1, 9.0, 1.0]), keep=2)
    array([False,  True,  True])
    """
    weights, hessian = floating(weights=weights, hessian=hessian)
    size = bind_axes({"weights": (weights, "n"), "hessian": (hessian, "n")})
    whole("keep", keep, least=0)
    if keep > size["n"]:
        raise OptionError(f"keep: expected at most the {size['n']} weights there are, got {keep}")
    h = widen(hessian).astype(np.float64)
    if not np.all(np.isfinite(h) & (h >= 0)):
        raise OptionError("hessian: expected finite second derivatives of at least 0")
    w = widen(weights).astype(np.float64)
    if not np.isfinite(w).all():
        raise OptionError("weights: expected finite numbers, got NaN or infinity")
    return largest(np.sqrt(h) * np.abs(w), keep)  # the root of h w², which neither overflows nor vanishes
