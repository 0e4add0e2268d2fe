"""Layers with buffers: tokens go to their places, experts run on full buffers, results come back weighted.

Places that nobody took hold zeros: they cost operations and change nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np

from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.moe.expert_ffn import ExpertOptions, expert_ffn, expert_ffn_vjp, product_of
from refimpl.moe.routing import Convention, Routing, gate_weights_vjp, router_logits_vjp
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.validation import bind_axes, floating

__all__ = [
    "BufferGradients",
    "LayerGradients",
    "from_buffers",
    "routed",
    "routed_vjp",
    "through_router",
    "to_buffers",
    "to_buffers_vjp",
    "weighted",
    "weighted_vjp",
]


class BufferGradients(NamedTuple):
    """Gradients of tokens, of the weights of a `Routing`, and of the experts."""

    dx: FloatArray
    dweight: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_gate: FloatArray | None = None


class LayerGradients(NamedTuple):
    """Gradients of tokens, router and experts; `dw_gate` only for gated experts."""

    dx: FloatArray
    dw_router: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_gate: FloatArray | None = None


def to_buffers(x: FloatArray, routing: Routing) -> FloatArray:
    """Return the buffers of all experts, shape (E, C, D), each kept token copied to its place.

    Examples
    --------
    >>> from refimpl.moe.routing import assign_slots
    >>> routing = assign_slots(np.array([[1], [1]]), np.ones((2, 1)), experts=2, capacity=1)
    >>> to_buffers(np.array([[5.0], [6.0]]), routing)[..., 0]
    array([[0.],
           [5.]])
    """
    buffers = np.zeros((routing.experts, routing.capacity, x.shape[1]), x.dtype)
    token, choice = np.nonzero(routing.kept)
    buffers[routing.expert[token, choice], routing.slot[token, choice]] = x[token]
    return buffers


def from_buffers(buffers: FloatArray, routing: Routing) -> FloatArray:
    """Return what lies at the place of each choice, shape (T, k, D), not weighted; 0 for dropped ones.

    Examples
    --------
    >>> from refimpl.moe.routing import assign_slots
    >>> routing = assign_slots(np.array([[1], [1]]), np.ones((2, 1)), experts=2, capacity=1)
    >>> from_buffers(np.array([[[7.0]], [[8.0]]]), routing)[:, 0, 0]
    array([8., 0.])
    """
    if not routing.capacity:
        return np.zeros((*routing.expert.shape, buffers.shape[2]), buffers.dtype)
    return np.where(routing.kept[..., None], buffers[routing.expert, routing.slot], 0)


def to_buffers_vjp(dbuffers: FloatArray, routing: Routing) -> FloatArray:
    """Return the gradient of the tokens, shape (T, D): the sum over a token's places.

    Examples
    --------
    >>> from refimpl.moe.routing import assign_slots
    >>> routing = assign_slots(np.array([[1], [1]]), np.ones((2, 1)), experts=2, capacity=1)
    >>> to_buffers_vjp(np.array([[[7.0]], [[8.0]]]), routing)[:, 0]
    array([8., 0.])
    """
    parts = widen(from_buffers(dbuffers, routing))
    return round_to(parts.sum(axis=1, dtype=wide_dtype(dbuffers.dtype)), dbuffers.dtype)


def weighted(buffers: FloatArray, routing: Routing, *, memory: Memory | None = None) -> FloatArray:
    """Return the sum over choices of weight times what lies at the place of each, shape (T, D).

    Examples
    --------
    >>> from refimpl.moe.routing import assign_slots
    >>> routing = assign_slots(np.array([[1], [1]]), np.full((2, 1), 0.5), experts=2, capacity=1)
    >>> weighted(np.array([[[7.0]], [[8.0]]]), routing)[:, 0]
    array([4., 0.])
    """
    parts = widen(from_buffers(buffers, routing))
    weight = routing.weight.astype(wide_dtype(buffers.dtype), copy=False)
    return round_to(product_of(memory)("tk,tkd->td", weight, parts), buffers.dtype)


def weighted_vjp(buffers: FloatArray, routing: Routing, dy: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of ``sum(dy * weighted(buffers, routing))``: of the buffers and of the weights.

    Examples
    --------
    >>> from refimpl.moe.routing import assign_slots
    >>> routing = assign_slots(np.array([[1], [1]]), np.full((2, 1), 0.5), experts=2, capacity=1)
    >>> dbuffers, dweight = weighted_vjp(np.array([[[7.0]], [[8.0]]]), routing, np.ones((2, 1)))
    >>> dbuffers[..., 0], dweight[:, 0]
    (array([[0. ],
           [0.5]]), array([8., 0.]))
    """
    wide = wide_dtype(buffers.dtype)
    upstream = widen(dy).astype(wide, copy=False)
    dweight = np.einsum(
        "td,tkd->tk", upstream, widen(from_buffers(buffers, routing)).astype(wide, copy=False)
    )
    dbuffers = np.zeros(buffers.shape, wide)
    token, choice = np.nonzero(routing.kept)
    place = routing.expert[token, choice], routing.slot[token, choice]
    dbuffers[place] = routing.weight[token, choice, None] * upstream[token]
    return round_to(dbuffers, buffers.dtype), dweight


def routed(
    x: FloatArray,
    routing: Routing,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return ``sum_j weight[t, j] * expert_j(x[t])`` over the kept choices j of each token.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    routing : Routing
        Where they go.
    w_in, w_out, **options
        The experts, as for `expert_ffn`.
    memory : Memory, optional
        Counts the operations: ``4 E C D F`` (gated 6) of full buffers, and ``2 T k D`` for the sum.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the dtype of `x`; 0 for a token all of whose choices were dropped: the residual carries it.

    Examples
    --------
    >>> from refimpl.moe.routing import assign_slots
    >>> routing = assign_slots(np.array([[1], [1]]), np.full((2, 1), 0.5), experts=2, capacity=1)
    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> routed(np.ones((2, 1)), routing, w, np.ones((2, 1, 1)))[:, 0]
    array([1.5, 0. ])
    """
    x, w_in, w_out = floating(x=x, w_in=w_in, w_out=w_out)
    bind_axes({"x": (x, "T D"), "routing.expert": (routing.expert, "T k")})
    _as_many_experts(routing, w_in)
    out = expert_ffn(to_buffers(x, routing), w_in, w_out, memory=memory, **options)
    return weighted(out, routing, memory=memory)


def _as_many_experts(routing: Routing, w_in: FloatArray) -> None:
    """Refuse a router of more experts, or fewer, than have weights."""
    if bind_axes({"w_in": (w_in, "E D F")})["E"] != routing.experts:
        raise ShapeError(
            f"w_in: axis E must equal the router's; got {len(w_in)}, expected {routing.experts} "
            f"(w_in has shape {w_in.shape})"
        )


def routed_vjp(
    x: FloatArray,
    routing: Routing,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    **options: Unpack[ExpertOptions],
) -> BufferGradients:
    """Return the gradients of ``sum(dy * routed(x, routing, w_in, w_out, ...))``; dropped choices get 0.

    Examples
    --------
    >>> from refimpl.moe.routing import assign_slots
    >>> routing = assign_slots(np.array([[1], [1]]), np.full((2, 1), 0.5), experts=2, capacity=1)
    >>> w, x = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((2, 1))
    >>> routed_vjp(x, routing, w, np.ones((2, 1, 1)), x).dweight[:, 0]
    array([3., 0.])
    """
    x, w_in, w_out, dy = floating(x=x, w_in=w_in, w_out=w_out, dy=dy)
    bind_axes({"x": (x, "T D"), "dy": (dy, "T D")})
    _as_many_experts(routing, w_in)
    buffers = to_buffers(x, routing)
    dout, dweight = weighted_vjp(expert_ffn(buffers, w_in, w_out, **options), routing, dy)
    back = expert_ffn_vjp(buffers, w_in, w_out, dout, **options)
    dx = to_buffers_vjp(back.dx, routing)
    return BufferGradients(dx, dweight, back.dw_in, back.dw_out, back.dw_gate)


def through_router(
    back: BufferGradients,
    x: FloatArray,
    w_router: FloatArray,
    logits: FloatArray,
    routing: Routing,
    *,
    convention: Convention,
    factor: FloatArray | None = None,
) -> LayerGradients:
    """Carry the gradient of the weights back through a router ``(x * factor) @ w_router``.

    Parameters
    ----------
    back : BufferGradients
        What `routed_vjp` returned.
    x, w_router, logits
        What the router was given and made.
    routing : Routing
        What it chose.
    convention : {"switch", "gshard", "mixtral"}
        As for `gate_weights`.
    factor : ndarray of float, shape (T, D), optional
        Jitter of the router's input.

    Returns
    -------
    LayerGradients
        `dx` is the sum over the experts' and the router's part.
    """
    seen = widen(x) if factor is None else widen(x) * factor
    dlogits = gate_weights_vjp(logits, routing.expert, back.dweight, convention=convention)
    dseen, dw_router = router_logits_vjp(seen, w_router, dlogits)
    dx = round_to(widen(back.dx) + (dseen if factor is None else dseen * factor), back.dx.dtype)
    return LayerGradients(
        round_to(dx, back.dx.dtype),
        round_to(dw_router, w_router.dtype),
        back.dw_in,
        back.dw_out,
        back.dw_gate,
    )
