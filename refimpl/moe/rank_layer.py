"""One rank of a layer whose experts are spread over ranks: its forward and its backward pass.

Every rank has tokens of its own, which it routes by itself with a copy of the router, and some of the
experts.  Experts are placed in order and as evenly as they can be: with E experts on R ranks the first
E mod R ranks hold one more than the others.  No buffer is padded for that; a rank may hold no expert at all,
and then only sends tokens away and gets them back.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Unpack

import numpy as np

from refimpl.moe.buffers import (
    BufferGradients,
    LayerGradients,
    through_router,
    to_buffers,
    to_buffers_vjp,
    weighted,
    weighted_vjp,
)
from refimpl.moe.capacity import CapacityOptions
from refimpl.moe.expert_ffn import ExpertOptions, expert_ffn, expert_ffn_vjp
from refimpl.moe.routing import Convention
from refimpl.moe.token_choice import Chosen, token_choice
from refimpl.numerics import FloatArray
from refimpl.parallel.collectives import pairwise_all_to_all, ring_all_reduce
from refimpl.parallel.comm import Comm
from refimpl.validation import whole

__all__ = [
    "Forward",
    "RankOptions",
    "from_experts",
    "placement",
    "rank_backward",
    "rank_forward",
    "to_experts",
]


class RankOptions(CapacityOptions, total=False):
    """How a rank routes its tokens."""

    k: int
    convention: Convention


def placement(experts: int, ranks: int) -> list[slice]:
    """Return which experts each rank holds.

    Examples
    --------
    >>> [(part.start, part.stop) for part in placement(5, 3)], placement(1, 2)[1]
    ([(0, 2), (2, 4), (4, 5)], slice(1, 1, None))
    """
    whole("ranks", ranks)
    ends = [rank * (experts // ranks) + min(rank, experts % ranks) for rank in range(ranks + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def to_experts(comm: Comm, buffers: FloatArray) -> FloatArray:
    """Send this rank's buffers of all experts to those who hold them; return what its own experts get.

    Parameters
    ----------
    comm : Comm
        This rank.
    buffers : ndarray, shape (E, C, D)
        Tokens of this rank; E and C are the same on all ranks.

    Returns
    -------
    ndarray, shape (E_rank, R * C, D)
        For each expert of this rank the C places of rank 0, those of rank 1, ...
    """
    received = pairwise_all_to_all(comm, [buffers[part] for part in placement(len(buffers), comm.size)])
    return np.concatenate(received, axis=1)


def from_experts(comm: Comm, rows: FloatArray) -> FloatArray:
    """Send rows of this rank's experts back to the ranks of their tokens: the inverse of `to_experts`.

    Parameters
    ----------
    comm : Comm
        This rank.
    rows : ndarray, shape (E_rank, R * C, D)
        As from `to_experts`.

    Returns
    -------
    ndarray, shape (E, C, D)
        This rank's buffers, from all experts.
    """
    return np.concatenate(pairwise_all_to_all(comm, np.split(rows, comm.size, axis=1)))


class Forward(NamedTuple):
    """What a rank keeps of the forward pass: output, choices, its experts' rows, and its buffers."""

    y: FloatArray
    chosen: Chosen
    rows: FloatArray
    buffers: FloatArray


def rank_forward(
    comm: Comm,
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    k: int = 2,
    convention: Convention = "gshard",
    experts: ExpertOptions | None = None,
    **options: Unpack[CapacityOptions],
) -> Forward:
    """Run the layer on this rank's tokens, together with the other ranks.

    Parameters
    ----------
    comm : Comm
        This rank.
    x : ndarray of float, shape (T, D)
        This rank's tokens; as many on every rank.
    w_router : ndarray of float, shape (D, E)
        The router, equal on all ranks.
    w_in, w_out : ndarray of float, shapes (E_rank, D, F), (E_rank, F, D)
        The experts that `placement` gives this rank.
    k, convention, **options
        As for `refimpl.moe.token_choice.token_choice`.
    experts : dict, optional
        Activation, and the gates of this rank's experts.

    Returns
    -------
    Forward
        The output, and what `rank_backward` needs.
    """
    chosen = token_choice(x, w_router, k=k, convention=convention, **options)
    with comm.phase("dispatch"):
        rows = to_experts(comm, to_buffers(x, chosen.routing))
    out = expert_ffn(rows, w_in, w_out, **(experts or {}))
    with comm.phase("combine"):
        buffers = from_experts(comm, out)
    return Forward(weighted(buffers, chosen.routing), chosen, rows, buffers)


def rank_backward(
    comm: Comm,
    forward: Forward,
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    convention: Convention = "gshard",
    experts: ExpertOptions | None = None,
) -> LayerGradients:
    """Return this rank's gradients: its tokens', its experts', and the router's, summed over ranks.

    Parameters
    ----------
    comm : Comm
        This rank.
    forward : Forward
        What `rank_forward` returned.
    x, w_router, w_in, w_out, convention, experts
        As there.
    dy : ndarray of float, shape (T, D)
        Gradient of this rank's output.

    Returns
    -------
    LayerGradients
        Gradients of experts are those of the tokens of all ranks: nothing is left to be reduced.
    """
    routing, logits = forward.chosen
    dbuffers, dweight = weighted_vjp(forward.buffers, routing, dy)
    with comm.phase("dispatch gradients"):
        dout = to_experts(comm, dbuffers)
    back = expert_ffn_vjp(forward.rows, w_in, w_out, dout, **(experts or {}))
    with comm.phase("combine gradients"):
        dx = to_buffers_vjp(from_experts(comm, back.dx), routing)
    own = BufferGradients(dx, dweight, back.dw_in, back.dw_out, back.dw_gate)
    gradients = through_router(own, x, w_router, logits, routing, convention=convention)
    with comm.phase("router gradient"):
        total = ring_all_reduce(comm, gradients.dw_router)
    return gradients._replace(dw_router=total.reshape(w_router.shape))
