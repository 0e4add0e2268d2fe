"""Experts over ranks without empty places: ranks send their counts first, and then only tokens that are kept.

A buffer's size is known before routing, which is what a compiler needs; what is sent here depends on where
tokens go.  With a capacity factor of 1.25 a fifth of every buffer is empty in balance, and more out of it.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

import numpy as np

from refimpl.moe.expert_ffn import ExpertOptions, expert_ffn
from refimpl.moe.rank_layer import RankOptions, placement
from refimpl.moe.routing import Routing
from refimpl.moe.token_choice import token_choice
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.parallel import mpi
from refimpl.parallel.collectives import pairwise_all_to_all
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.registry import add_implementation
from refimpl.transformer.activations import Activation

__all__ = ["expert_parallel_ragged", "expert_parallel_ragged_on_mpi"]


def expert_parallel_ragged(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
    **options: Unpack[RankOptions],
) -> FloatArray:
    """Compute `refimpl.moe.expert_parallel.expert_parallel` by sending kept tokens only.

    Parameters
    ----------
    x, w_router, w_in, w_out, w_gate, activation, traffic, launch, **options
        As there.

    Returns
    -------
    ndarray of float, shape (R, T, D)
        The same.

    Examples
    --------
    Both ranks' tokens want expert 0, which the first rank holds: the second sends its token, and counts.

    >>> traffic, w = Traffic(), np.ones((2, 1, 1))
    >>> y = expert_parallel_ragged(
    ...     np.ones((2, 1, 1)), np.array([[9.0, 0.0]]), w, w, k=1, convention="switch", traffic=traffic
    ... )
    >>> [traffic.sent(rank, "dispatch").bytes for rank in range(2)]
    [0, 8]
    """

    def run(comm: Comm) -> FloatArray:
        part = placement(len(w_in), comm.size)[comm.rank]
        gate = None if w_gate is None else np.asarray(w_gate)[part]
        experts: ExpertOptions = {"w_gate": gate, "activation": activation}
        return _rank(comm, x[comm.rank], w_router, w_in[part], w_out[part], experts, options)

    return np.stack(launch(len(x), run, traffic=traffic))


def _rank(
    comm: Comm,
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    experts: ExpertOptions,
    options: RankOptions,
) -> FloatArray:
    sized: RankOptions = {"k": 2, "convention": "gshard", **options}
    routing = token_choice(x, w_router, **sized).routing
    E = w_router.shape[1]
    token, choice = _kept_by_expert(routing)
    counts = np.bincount(routing.expert[token, choice], minlength=E)
    parts = placement(E, comm.size)
    with comm.phase("counts"):
        incoming = np.array(pairwise_all_to_all(comm, [counts[part] for part in parts]))  # (R, own experts)
    ends = np.cumsum([counts[part].sum() for part in parts])[:-1]
    with comm.phase("dispatch"):
        rows = np.concatenate(pairwise_all_to_all(comm, np.split(x[token], ends)))
    out = _run_experts(rows, incoming, w_in, w_out, experts)
    sources = np.cumsum(incoming.sum(axis=1))[:-1]
    with comm.phase("combine"):
        back = np.concatenate(pairwise_all_to_all(comm, np.split(out, sources)))
    y = np.zeros(x.shape, wide_dtype(x.dtype))
    np.add.at(y, token, routing.weight[token, choice, None] * widen(back))
    return round_to(y, x.dtype)


def _kept_by_expert(routing: Routing) -> tuple[IntArray, IntArray]:
    """Return token and choice of everything that is kept, by expert, and there by place."""
    token, choice = np.nonzero(routing.kept)
    order = np.lexsort((routing.slot[token, choice], routing.expert[token, choice]))
    return token[order], choice[order]


def _run_experts(
    rows: FloatArray, incoming: IntArray, w_in: FloatArray, w_out: FloatArray, experts: ExpertOptions
) -> FloatArray:
    """Run each expert on its rows; they come by rank, and there by expert, and go back in that order."""
    owner = np.repeat(np.tile(np.arange(len(w_in)), len(incoming)), incoming.ravel())
    out = np.zeros_like(rows)
    gate = experts.get("w_gate")
    for e in range(len(w_in)):
        here = slice(e, e + 1)
        own: ExpertOptions = {**experts, "w_gate": None if gate is None else gate[here]}
        out[owner == e] = expert_ffn(rows[None, owner == e], w_in[here], w_out[here], **own)[0]
    return out


expert_parallel_ragged_on_mpi = partial(expert_parallel_ragged, launch=mpi.run_ranks)
add_implementation(
    "moe.expert_parallel", "refimpl.moe.ragged_parallel:expert_parallel_ragged", backend="numpy"
)
add_implementation(
    "moe.expert_parallel", "refimpl.moe.ragged_parallel:expert_parallel_ragged_on_mpi", backend="mpi"
)
