"""BASE layers: tokens assigned to experts so that all are equally full and the total score is the largest.

In training the assignment is balanced, by solving the assignment problem exactly; at test time each token
goes to its best expert, because tokens of one sequence must not depend on those of another.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, Unpack, get_args

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.routing import router_logits
from refimpl.moe.samples import EXPERTS, layer_terms, sample_layer
from refimpl.moe.sparse_mixture import through_logits
from refimpl.numerics import BoolArray, FloatArray, IntArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["Assignment", "base_assignment", "base_layer", "base_layer_vjp", "best_exchange"]

Assignment: TypeAlias = Literal["balanced", "greedy"]

_PAPER = "Lewis et al. 2021", "arXiv:2103.16716"
_APART = 1e-3  # how much worse every other assignment of a sample is: a small step must not change it


def _sample_scores(rng: np.random.Generator, *, C: int, E: int, values: str) -> Case:
    crowd = {"normal": 0.0, "crowded": 5.0}[values]  # everybody wants the first experts
    return Case((rng.standard_normal((C * E, E)) - crowd * np.arange(E),))


@technique(
    "moe.base_assignment",
    entries=(41,),
    kind="function",
    source=Source(*_PAPER, "section 3.2.1, eq. 1"),
    axes={"C": (0, 4), "E": (1, 4)},
    options={"values": ("normal", "crowded")},
    edges=({"C": 0}, {"C": 1, "E": 1}, {"C": 3, "E": 1}, {"C": 1, "E": 4}, {"C": 4, "E": 4}),
    sample=_sample_scores,
    exact=True,
)
def base_assignment(scores: FloatArray, /) -> IntArray:
    """Return the expert of each token, equally many for each expert, of the largest total score.

    Parameters
    ----------
    scores : ndarray of float, shape (T, E)
        Score of each expert for each token; E divides T.

    Returns
    -------
    ndarray of int, shape (T,)
        Maximizes ``sum_t scores[t, expert[t]]`` with exactly T / E tokens for each expert.

    Raises
    ------
    ShapeError
        If E does not divide T.
    OptionError
        If a score is not finite.
    DTypeError
        If `scores` is not real.

    Notes
    -----
    Successive shortest paths with prices, as in the Hungarian method [2]_, on E experts instead of T places:
    tokens come one by one; if the wanted expert is full, the cheapest chain of moves makes room, and the
    experts that were too full raise their prices.  Exact up to rounding, ``O(T² E)``; the authors' code uses
    an auction, which is exact up to the size of its bids [1]_.

    Where several assignments are best, one of them is returned.

    References
    ----------
    .. [1] Lewis et al., 2021, arXiv:2103.16716, section 3.2.1; Bertsekas, 1992, "Auction algorithms for
       network flow problems".
    .. [2] Kuhn, 1955, "The Hungarian method for the assignment problem"; Tomizawa, 1971, "On some techniques
       useful for solution of transportation network problems".

    Examples
    --------
    All four tokens prefer expert 0; those that lose least by it are moved:

    >>> base_assignment(np.array([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0]]))
    array([0, 1, 1, 0])
    """
    (scores,) = floating(scores=scores)
    sizes = bind_axes({"scores": (scores, "T E")})
    s = widen(scores).astype(np.float64)
    if not sizes["E"] or sizes["T"] % sizes["E"]:
        raise ShapeError(f"scores: axis E must divide T; got E={sizes['E']}, T={sizes['T']}")
    if not np.isfinite(s).all():
        raise OptionError("scores: expected finite numbers")
    expert = np.full(sizes["T"], -1)
    prices = np.zeros(sizes["E"])
    for token in range(sizes["T"]):
        _make_room(token, s, expert, prices, sizes["T"] // sizes["E"])
    return expert


def _make_room(token: int, s: FloatArray, expert: IntArray, prices: FloatArray, capacity: int) -> None:
    """Assign one more token, moving others along the chain of moves that loses least.

    Dijkstra's algorithm over experts.  The distance of an expert is what all the moves lose together if the
    chain ends there, each token measured against the best that it could have at the present prices.
    """
    profit = s - prices
    distance = profit[token].max() - profit[token]
    mover = np.full(len(prices), token)  # who would move to each expert
    full: list[int] = []
    while True:
        open_distance = distance.copy()
        open_distance[full] = np.inf
        end = int(np.argmin(open_distance))
        members = np.flatnonzero(expert == end)
        if len(members) < capacity:
            break
        full.append(end)
        losses = distance[end] + profit[members, end][:, None] - profit[members]
        cheapest = np.argmin(losses, axis=0)
        loss = losses[cheapest, np.arange(len(prices))]
        nearer = loss < distance
        nearer[full] = False
        distance[nearer], mover[nearer] = loss[nearer], members[cheapest[nearer]]
    prices[full] += distance[end] - distance[full]
    while True:
        moved = mover[end]
        expert[moved], end = end, int(expert[moved])
        if moved == token:
            return


def best_exchange(scores: FloatArray, expert: IntArray) -> float:
    """Return what the best round of moves between experts gains; -inf if no round is possible.

    In a round one token moves from expert a to b, one from b to c, ..., and one back to a.  An assignment is
    the best of its loads if and only if no round gains; if one does, the number counts it several times.

    Examples
    --------
    >>> scores = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> best_exchange(scores, np.array([1, 0])), best_exchange(scores, np.array([0, 1])) > 0
    (-2.0, True)
    """
    E = scores.shape[1]
    gains = np.full((E, E), -np.inf)
    for a in np.unique(expert):
        members = scores[expert == a]
        gains[a] = np.max(members - members[:, a : a + 1], axis=0)
    np.fill_diagonal(gains, -np.inf)
    for via in range(E):  # Floyd and Warshall: the longest chains from each expert to each
        gains = np.maximum(gains, gains[:, via : via + 1] + gains[via])
    return float(np.max(gains.diagonal(), initial=-np.inf))


def _sample_layer(
    rng: np.random.Generator, *, C: int, E: int, D: int, F: int, experts: str, assignment: str
) -> Case:
    while True:  # until every other assignment is clearly worse: assignments are discontinuous
        case = sample_layer(rng, T=C * E, D=D, E=E, F=F, experts=experts)
        scores = case.args[0] @ case.args[1]
        if best_exchange(scores, base_assignment(scores)) < -_APART:
            return case.replace(assignment=assignment)


def _terms(case: Case) -> tuple[int, Any]:
    n, magnitudes = layer_terms(case)
    return n + 1, magnitudes + np.abs(case.args[0])


@technique(
    "moe.base_layer",
    entries=(41,),
    kind="function",
    source=Source(*_PAPER, "section 3.1 and Figure 2"),
    axes={"C": (0, 3), "E": (1, 3), "D": (1, 4), "F": (1, 4)},
    options={"experts": EXPERTS, "assignment": get_args(Assignment)},
    edges=({"C": 0}, {"C": 1, "E": 1, "D": 1, "F": 1}, {"C": 3, "E": 3, "assignment": "balanced"}),
    sample=_sample_layer,
    terms=_terms,
    vjp="refimpl.moe.base_assignment:base_layer_vjp",
)
def base_layer(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    assignment: Assignment = "balanced",
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return ``x[t] + σ(x[t] · w_a) expert_a(x[t])`` with a the expert that token t is assigned to.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens; for a balanced assignment E divides T.
    w_router : ndarray of float, shape (D, E)
        One embedding for each expert.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts.
    assignment : {"balanced", "greedy"}
        ``"balanced"``: `base_assignment`, for training.  ``"greedy"``: the best expert of each token, for
        testing; ties to the lowest.
    memory : Memory, optional
        Counts the operations: ``2 T D E + T (4 D F + 2 D)``, gated ``6 D F``.
    w_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of the experts.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together, are not real, or E does not divide T.
    OptionError
        If the assignment is unknown, or a balanced one meets a score that is not finite.

    Notes
    -----
    The residual is part of the layer, because the gate mixes it in: a sigmoid of the token's own score, so
    that the router learns without a loss of balance.  The authors' experts normalize their input and are
    several sublayers deep; here an expert is one feed-forward layer.

    References
    ----------
    .. [1] Lewis et al., 2021, arXiv:2103.16716, section 3.1; facebookresearch/fairseq,
       fairseq/modules/base_layer.py.

    Examples
    --------
    >>> x, w = np.array([[1.0], [2.0]]), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> base_layer(x, np.zeros((1, 2)), w, np.ones((2, 1, 1)), assignment="greedy")
    array([[1.5],
           [3. ]])
    """
    gates, chosen = _gates(x, w_router, assignment, memory)
    y = mixture(x, gates, w_in, w_out, selected=chosen, memory=memory, **options)
    (x,) = floating(x=x)
    return round_to(widen(x) + widen(y), y.dtype)


def base_layer_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    assignment: Assignment = "balanced",
    **options: Unpack[ExpertOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * base_layer(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, assignment, **options
        As for `base_layer`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        Of a token's scores only that of its own expert has a gradient.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.ones((1, 1, 1))
    >>> base_layer_vjp(one, np.zeros((1, 1)), w, w, one).dw_router
    array([[0.25]])
    """
    gates, chosen = _gates(x, w_router, assignment)
    back = mixture_vjp(x, gates, w_in, w_out, dy, selected=chosen, **options)
    found = through_logits(back, x, w_router, back.dgates * gates * (1 - gates))
    return found._replace(dx=round_to(widen(found.dx) + widen(np.asarray(dy)), found.dx.dtype))


def _gates(
    x: FloatArray, w_router: FloatArray, assignment: Assignment, memory: Memory | None = None
) -> tuple[FloatArray, BoolArray]:
    """Return the sigmoid of all scores, and which expert each token is assigned to, both (T, E)."""
    from scipy.special import expit

    scores = router_logits(x, w_router, memory=memory)
    if assignment == "balanced":
        expert = base_assignment(scores)
    elif assignment == "greedy":
        expert = np.argmax(scores, axis=1)
    else:
        raise OptionError(f"assignment: expected one of {get_args(Assignment)}, got {assignment!r}")
    return np.asarray(expit(scores)), np.asarray(expert[:, None] == np.arange(scores.shape[1]))
