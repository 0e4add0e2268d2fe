"""Experts over ranks: tokens travel to the rank of their expert and back, by two all-to-alls.

What a rank does, and which experts it holds, stands in `refimpl.moe.rank_layer`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import numpy as np

from refimpl.moe.buffers import LayerGradients
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.rank_layer import RankOptions, placement, rank_backward, rank_forward
from refimpl.moe.samples import EXPERTS, layer_terms, sample_layer
from refimpl.numerics import FloatArray
from refimpl.parallel import mpi
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.registry import Case, Source, add_implementation, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "expert_parallel",
    "expert_parallel_on_mpi",
    "expert_parallel_vjp",
    "expert_parallel_vjp_on_mpi",
]


def sample_ranks(
    rng: np.random.Generator, *, ranks: int, T: int, k: int, capacity: int, convention: str, **shape: Any
) -> Case:
    """Return one call of `expert_parallel`: tokens of each rank, a router, all experts.

    Examples
    --------
    >>> shape = dict(ranks=2, T=3, D=2, E=3, F=2, k=1, capacity=1, convention="switch")
    >>> sample_ranks(np.random.default_rng(0), **shape).args[0].shape
    (2, 3, 2)
    """
    case = sample_layer(rng, T=ranks * T, **shape)
    x, w_router, *experts = case.args
    routing = {"k": min(k, w_router.shape[1]), "capacity": capacity, "convention": convention}
    return case.replace(x.reshape(ranks, T, x.shape[1]), w_router, *experts, **routing)


def _sample_backward(rng: np.random.Generator, **shape: Any) -> Case:
    case = sample_ranks(rng, **shape)
    return case.replace(*case.args, rng.standard_normal(case.args[0].shape))


def _terms(case: Case) -> tuple[int, Any]:
    x = case.args[0]
    n, magnitudes = layer_terms(case.replace(x.reshape(-1, x.shape[-1]), *case.args[1:4]))
    return n, magnitudes.reshape(x.shape)


def _backward_terms(case: Case) -> tuple[int, Any]:
    """Return the absolute terms of gradients if every expert had weight 1; no slope is above 1.2."""
    x, w_router, w_in, w_out, dy = (np.abs(array) for array in case.args)
    x, dy = x.reshape(-1, x.shape[2]), dy.reshape(-1, dy.shape[2])
    w_gate = case.kwargs.get("w_gate")
    hidden, dhidden = np.einsum("td,edf->tef", x, w_in), np.einsum("td,efd->tef", dy, w_out)
    dup, dgate = 1.2 * dhidden, np.zeros_like(hidden)
    if w_gate is not None:
        gate = np.einsum("td,edf->tef", x, np.abs(w_gate))
        dup, dgate, hidden = dhidden * gate, 1.2 * dhidden * hidden, gate * hidden
    dlogits = 2 * np.einsum("td,tef,efd->t", dy, hidden, w_out)
    dx = np.einsum("tef,edf->td", dup, w_in) + dlogits[:, None] * w_router.sum(axis=1)
    if w_gate is not None:
        dx += np.einsum("tef,edf->td", dgate, np.abs(w_gate))
    magnitudes = LayerGradients(
        dx.reshape(case.args[0].shape),
        np.repeat(np.einsum("td,t->d", x, dlogits)[:, None], w_router.shape[1], axis=1),
        np.einsum("td,tef->edf", x, dup),
        np.einsum("tef,td->efd", hidden, dy),
        None if w_gate is None else np.einsum("td,tef->edf", x, dgate),
    )
    return len(x) + 2 * x.shape[1] + w_in.shape[2] + w_router.shape[1], magnitudes


_SOURCE = Source("Lepikhin et al. 2020", "arXiv:2006.16668", "section 3.2, Algorithm 2; Figure 3")
_RECORD: dict[str, Any] = {
    "entries": (37,),
    "kind": "function",
    "source": _SOURCE,
    "axes": {
        "ranks": (1, 4),
        "T": (0, 4),
        "D": (1, 3),
        "E": (1, 5),
        "F": (1, 3),
        "k": (1, 2),
        "capacity": (0, 3),
    },
    "options": {"experts": EXPERTS, "convention": ("switch", "gshard")},
    "edges": (
        {"ranks": 1, "T": 3, "E": 4},
        {"ranks": 4, "T": 0, "E": 4},
        {"ranks": 7, "T": 3, "E": 5, "k": 2, "capacity": 2},  # two ranks without experts
        {"ranks": 4, "T": 4, "E": 6, "k": 2, "capacity": 4, "experts": "gated silu"},
        {"ranks": 2, "T": 3, "E": 3, "capacity": 0},
    ),
}


@technique(
    "moe.expert_parallel",
    sample=sample_ranks,
    terms=_terms,
    vjp="refimpl.moe.expert_parallel:expert_parallel_vjp",
    **_RECORD,
)
def expert_parallel(
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
    """Return what ranks make of their tokens, when each holds some of the experts.

    Parameters
    ----------
    x : ndarray of float, shape (R, T, D)
        T tokens of each of R ranks.
    w_router : ndarray of float, shape (D, E)
        The router, of which every rank has a copy.
    w_in, w_out, w_gate, activation
        All experts, as for `refimpl.moe.expert_ffn.expert_ffn`; each rank takes its own.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.
    k : int
        Experts a token.  Default 2.
    convention : {"switch", "gshard", "mixtral"}
        As for `refimpl.moe.routing.gate_weights`.  Default "gshard".
    capacity, capacity_factor, rounding, min_capacity, groups
        As for `refimpl.moe.switch.switch`: places of an expert for one rank's tokens.

    Returns
    -------
    ndarray of float, shape (R, T, D)
        What one device gives that routes R groups by themselves.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together or are not real.
    OptionError
        If there is no rank, or an option is out of range.

    Notes
    -----
    With C places, rank r sends ``(E - E_r) C D`` elements to the experts of others, and ``(R - 1) E_r C D``
    back to their tokens: buffers travel whole, empty places with them, because their size is known before.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, section 3.2 and Figure 3.

    Examples
    --------
    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> expert_parallel(np.ones((2, 1, 1)), np.zeros((1, 2)), w, np.ones((2, 1, 1)), capacity=1)[..., 0]
    array([[2.],
           [2.]])
    """
    x, w_router, w_in, w_out = _checked(x, w_router, w_in, w_out)

    def run(comm: Comm) -> FloatArray:
        part, experts = _own(comm, w_in, w_gate, activation)
        return rank_forward(
            comm, x[comm.rank], w_router, w_in[part], w_out[part], experts=experts, **options
        ).y

    return np.stack(launch(len(x), run, traffic=traffic))


@technique("moe.expert_parallel.backward", sample=_sample_backward, terms=_backward_terms, **_RECORD)
def expert_parallel_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
    **options: Unpack[RankOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * expert_parallel(x, w_router, w_in, w_out, ...))``, made on ranks.

    Parameters
    ----------
    x, w_router, w_in, w_out, w_gate, activation, traffic, launch, **options
        As for `expert_parallel`.
    dy : ndarray of float, shape (R, T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        Gradients of tokens as the ranks have them, of experts one behind the other as the ranks hold them,
        and of the router, summed over ranks.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `expert_parallel`.

    Notes
    -----
    The forward pass is run first.  The backward one has two all-to-alls of the same size, and a ring
    all-reduce of the router's gradient; gradients of experts need none.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, section 3.2 and Figure 3.

    Examples
    --------
    >>> w, x = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((2, 1, 1))
    >>> expert_parallel_vjp(x, np.zeros((1, 2)), w, np.ones((2, 1, 1)), x, capacity=1).dw_router
    array([[-1.,  1.]])
    """
    x, w_router, w_in, w_out = _checked(x, w_router, w_in, w_out)
    (dy,) = floating(dy=dy)
    bind_axes({"x": (x, "R T D"), "dy": (dy, "R T D")})
    convention = options.get("convention", "gshard")

    def run(comm: Comm) -> LayerGradients:
        part, experts = _own(comm, w_in, w_gate, activation)
        arrays = x[comm.rank], w_router, w_in[part], w_out[part]
        forward = rank_forward(comm, *arrays, experts=experts, **options)
        return rank_backward(comm, forward, *arrays, dy[comm.rank], convention=convention, experts=experts)

    ranks = launch(len(x), run, traffic=traffic)
    return LayerGradients(
        np.stack([rank.dx for rank in ranks]),
        ranks[0].dw_router,
        np.concatenate([rank.dw_in for rank in ranks]),
        np.concatenate([rank.dw_out for rank in ranks]),
        None if w_gate is None else np.concatenate([np.asarray(rank.dw_gate) for rank in ranks]),
    )


def _own(
    comm: Comm, w_in: FloatArray, w_gate: FloatArray | None, activation: Activation
) -> tuple[slice, ExpertOptions]:
    """Return which experts this rank holds, and their options."""
    part = placement(len(w_in), comm.size)[comm.rank]
    gate = None if w_gate is None else np.asarray(w_gate)[part]
    return part, {"w_gate": gate, "activation": activation}


def _checked(*arrays: FloatArray) -> tuple[FloatArray, ...]:
    names = ("x", "w_router", "w_in", "w_out")
    found = floating(**dict(zip(names, arrays, strict=True)))
    axes = ("R T D", "D E", "E D F", "E F D")
    bind_axes({name: (array, axis) for name, array, axis in zip(names, found, axes, strict=True)})
    whole("ranks", len(found[0]))
    return found


expert_parallel_on_mpi = partial(expert_parallel, launch=mpi.run_ranks)
expert_parallel_vjp_on_mpi = partial(expert_parallel_vjp, launch=mpi.run_ranks)
for _name, _function in (
    ("moe.expert_parallel", "expert_parallel_on_mpi"),
    ("moe.expert_parallel.backward", "expert_parallel_vjp_on_mpi"),
):
    add_implementation(_name, f"refimpl.moe.expert_parallel:{_function}", backend="mpi")
