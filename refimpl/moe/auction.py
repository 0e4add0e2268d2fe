"""The auction for BASE's assignment, as the authors compute it: tokens bid for places until all have one.

Each token wants the place of the best profit, score less price, and raises its price by what the place is
worth to it above the second best, and by a little more, ε.  Whoever held the place must bid again.  The
result is the best within T ε, so the auction is repeated with smaller ε, from the prices of the last one.
"""

from __future__ import annotations

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, widen
from refimpl.registry import implements
from refimpl.validation import bind_axes, floating

__all__ = ["auction_assignment"]

SMALLER = 5.0  # each auction's ε against the last one's
LEAST = 1e-10  # of the range of the scores: assignments that differ by more are told apart


@implements("moe.base_assignment", backend="numpy")
def auction_assignment(scores: FloatArray, /) -> IntArray:
    """Return `refimpl.moe.base_assignment.base_assignment`, found by an auction.

    Parameters
    ----------
    scores : ndarray of float, shape (T, E)
        Score of each expert for each token; E divides T.

    Returns
    -------
    ndarray of int, shape (T,)
        The best assignment, if the second best is worse by more than 1e-10 T of the range of the scores.

    References
    ----------
    .. [1] Bertsekas, 1992, "Auction algorithms for network flow problems", the assignment problem, ε-scaling;
       fairseq, fairseq/clib/libbase/balanced_assignment.cpp.

    Examples
    --------
    >>> auction_assignment(np.array([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0]]))
    array([0, 1, 1, 0])
    """
    (scores,) = floating(scores=scores)
    T, E = bind_axes({"scores": (scores, "T E")}).values()
    s = widen(scores).astype(np.float64)
    if not E or T % E:
        raise ShapeError(f"scores: axis E must divide T; got E={E}, T={T}")
    if not np.isfinite(s).all():
        raise OptionError("scores: expected finite numbers")
    if T < 2:  # nobody bids against anybody
        return np.zeros(T, np.int64)
    prices, span = np.zeros((E, T // E)), float(np.ptp(s))
    eps = max(span, 1.0) / 2
    while True:
        expert = _auction(s, prices, eps)
        if eps <= LEAST * max(span, LEAST):
            return expert
        eps /= SMALLER


def _auction(s: FloatArray, prices: FloatArray, eps: float) -> IntArray:
    """Hold one auction; `prices`, shape (E, C), are raised in place."""
    expert, owner = np.full(len(s), -1), np.full(prices.shape, -1)
    bidders = list(range(len(s)))
    while bidders:
        token = bidders.pop()
        profits = s[token][:, None] - prices
        place = np.unravel_index(np.argmax(profits), prices.shape)
        best, profits[place] = profits[place], -np.inf
        prices[place] += best - profits.max() + eps
        loser = int(owner[place])
        owner[place], expert[token] = token, place[0]
        if loser >= 0:
            bidders.append(loser)
    return expert
