"""Bradley-Terry: a reward model is right about a pair with probability σ(reward of winner - of loser).

>>> bradley_terry_loss(np.array([1.0]), np.array([1.0])) == np.log(2)
np.True_
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.objectives.cross_entropy import token_ids
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = [
    "PreferenceGradients",
    "RankedPairs",
    "bradley_terry_loss",
    "bradley_terry_loss_vjp",
    "bradley_terry_probability",
    "ranked_pairs",
]


class PreferenceGradients(NamedTuple):
    """Gradients of both rewards, shape (pairs,)."""

    dchosen: FloatArray
    drejected: FloatArray


class RankedPairs(NamedTuple):
    """Indices of the better and of the worse item of each pair."""

    chosen: IntArray
    rejected: IntArray


def _sample(rng: np.random.Generator, *, pairs: int, values: str, ranked: bool) -> Case:
    scale = {"normal": 1.0, "large": 1e4, "equal": 0.0}[values]
    chosen, rejected = scale * rng.standard_normal((2, pairs)) + 0.5
    return Case((chosen, rejected), {"rankings": np.sort(rng.integers(0, 3, pairs))} if ranked else {})


def _terms(case: Case) -> tuple[int, float]:
    """Return the number of summands, and the size of the rewards that a margin is the difference of."""
    chosen, rejected = case.args
    return chosen.size + 2, float(np.max(np.abs(chosen) + np.abs(rejected), initial=0.0)) + 1.0


@technique(
    "objectives.bradley_terry",
    entries=(4,),
    kind="function",
    source=Source("Ouyang et al. 2022", "arXiv:2203.02155", "eq. 1; Bradley & Terry 1952"),
    axes={"pairs": (0, 9)},
    options={"values": ("normal", "large", "equal"), "ranked": (False, True)},
    edges=(
        {"pairs": 0, "ranked": True},
        {"pairs": 1, "values": "equal"},
        {"pairs": 6, "values": "large"},
        {"pairs": 7, "ranked": True},
    ),
    sample=_sample,
    terms=_terms,
    vjp="refimpl.objectives.preference:bradley_terry_loss_vjp",
)
def bradley_terry_loss(
    chosen: FloatArray, rejected: FloatArray, /, *, rankings: IntArray | None = None
) -> float:
    """Return the mean of ``-log σ(chosen - rejected)`` over pairs of rewards.

    Parameters
    ----------
    chosen, rejected : ndarray of float, shape (pairs,)
        Reward of the answer that won and of the one that lost, each given its prompt (the slide leaves the
        prompt out).  A tie is no pair (`ranked_pairs`).
    rankings : ndarray of int, shape (pairs,), optional
        Which ranking a pair comes from.  Every ranking then counts once, whatever its number of pairs: the
        factor 1/C(K, 2) of InstructGPT.  Default: every pair counts once, as on the slide.

    Returns
    -------
    float
        In nats; 0 without a pair.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DTypeError
        If rewards are not real, or rankings no integers.

    Notes
    -----
    ``-log σ(m) = log(1 + exp(-m))``, evaluated without overflow: at a margin of -1e4 it is 1e4, where
    ``log(sigmoid(m))`` is -inf.

    References
    ----------
    .. [1] Bradley & Terry, 1952, "Rank analysis of incomplete block designs", Biometrika 39.
    .. [2] Ouyang et al., 2022, arXiv:2203.02155, eq. 1.

    Examples
    --------
    >>> round(bradley_terry_loss(np.array([2.0, 1.0]), np.array([1.0, 1.0])), 6)
    0.503204
    """
    margin, shares = _margins(chosen, rejected, rankings)
    return float(np.sum(shares * np.logaddexp(0, -margin), dtype=np.float64))


def bradley_terry_loss_vjp(
    chosen: FloatArray, rejected: FloatArray, dloss: float, /, *, rankings: IntArray | None = None
) -> PreferenceGradients:
    """Return the gradients of `bradley_terry_loss`: -σ(-margin) times a pair's share, and its negative.

    Parameters
    ----------
    chosen, rejected, rankings
        As for `bradley_terry_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    PreferenceGradients
        In the dtype of the rewards.

    Raises
    ------
    ShapeError, DTypeError
        As `bradley_terry_loss`.

    Examples
    --------
    >>> bradley_terry_loss_vjp(np.zeros(2), np.zeros(2), 1.0)
    PreferenceGradients(dchosen=array([-0.25, -0.25]), drejected=array([0.25, 0.25]))
    """
    margin, shares = _margins(chosen, rejected, rankings)
    dtype = floating(chosen=chosen, rejected=rejected)[0].dtype
    surprise = np.exp(-np.logaddexp(0, margin))  # σ(-margin): the probability of the other outcome
    dchosen = (-float(dloss) * shares * surprise).astype(wide_dtype(dtype))
    return PreferenceGradients(round_to(dchosen, dtype), round_to(-dchosen, dtype))


def bradley_terry_probability(a: FloatArray, b: FloatArray, /) -> FloatArray:
    """Return the probability that an item of reward `a` is preferred to one of reward `b`: σ(a - b).

    Examples
    --------
    >>> bradley_terry_probability(np.array([0.0, 1000.0, -1000.0]), np.zeros(3))
    array([0.5, 1. , 0. ])
    """
    a, b = floating(a=a, b=b)
    return np.asarray(round_to(np.exp(-np.logaddexp(0, widen(b) - widen(a))), a.dtype))


def ranked_pairs(ranks: IntArray, /) -> RankedPairs:
    """Return every pair of a ranking in which one item is better than the other; ties make no pair.

    Parameters
    ----------
    ranks : ndarray of int, shape (K,)
        Rank of each item, the best lowest.

    Returns
    -------
    RankedPairs
        C(K, 2) pairs if there are no ties.

    Raises
    ------
    ShapeError, DTypeError
        If `ranks` is no row of integers.

    Examples
    --------
    The lecture's three answers:

    >>> ranked_pairs(np.array([1, 3, 2]))
    RankedPairs(chosen=array([0, 0, 2]), rejected=array([1, 2, 1]))
    """
    ranks = token_ids("ranks", ranks)
    if ranks.ndim != 1:
        raise ShapeError(f"ranks: expected 1 axis (K), got shape {ranks.shape}")
    chosen, rejected = np.nonzero(ranks[:, None] < ranks[None, :])
    return RankedPairs(chosen, rejected)


def _margins(chosen: Any, rejected: Any, rankings: Any) -> tuple[FloatArray, FloatArray]:
    """Return the margin of each pair, and its share of the loss."""
    chosen, rejected = floating(chosen=chosen, rejected=rejected)
    pairs = bind_axes({"chosen": (chosen, "pairs"), "rejected": (rejected, "pairs")})["pairs"]
    wide = wide_dtype(chosen.dtype)
    margin = widen(chosen).astype(wide) - widen(rejected).astype(wide)
    if rankings is None:
        return margin, np.full(pairs, 1 / max(pairs, 1))
    ids = token_ids("rankings", rankings)
    bind_axes({"chosen": (chosen, "pairs"), "rankings": (ids, "pairs")})
    _, of_pair, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return margin, 1 / (len(counts) * counts[of_pair.reshape(-1)]) if pairs else np.zeros(0)
