"""Top-k layers without buffers: gates from logits, the kept experts run, and the way back to the router."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np

from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.gating import top_k_gates, top_k_gates_vjp
from refimpl.moe.mixture import MixtureGradients, mixture, mixture_vjp
from refimpl.moe.routing import Convention, router_logits_vjp, top_k_indices
from refimpl.numerics import BoolArray, FloatArray, round_to, widen
from refimpl.validation import floating

__all__ = ["SparseGradients", "sparse_mixture", "sparse_mixture_vjp", "through_logits"]


class SparseGradients(NamedTuple):
    """Gradients of tokens (through the experts alone), logits and experts."""

    dx: FloatArray
    dlogits: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_gate: FloatArray | None = None


def sparse_mixture(
    x: FloatArray,
    logits: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    k: int,
    convention: Convention,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return ``sum_e g[t, e] expert_e(x[t])`` over the k experts of the largest logits of each token.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    logits : ndarray of float, shape (T, E)
        Scores of the experts, from any router.
    w_in, w_out, **options
        The experts, as for `expert_ffn`.
    k, convention
        As for `top_k_gates`.
    memory : Memory, optional
        Counts the operations: ``T k (4 D F + 2 D)``, gated ``6 D F``.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the dtype of `x`.

    Examples
    --------
    >>> w, ones = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((2, 1, 1))
    >>> sparse_mixture(np.ones((1, 1)), np.array([[0.0, 1.0]]), w, ones, k=1, convention="mixtral")
    array([[3.]])
    """
    gates = top_k_gates(logits, k=k, convention=convention)
    return mixture(x, gates, w_in, w_out, selected=_selected(logits, k), memory=memory, **options)


def sparse_mixture_vjp(
    x: FloatArray,
    logits: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    k: int,
    convention: Convention,
    **options: Unpack[ExpertOptions],
) -> SparseGradients:
    """Return the gradients of ``sum(dy * sparse_mixture(x, logits, w_in, w_out, ...))``.

    Examples
    --------
    >>> w, ones = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((2, 1, 1))
    >>> one, logits = np.ones((1, 1)), np.zeros((1, 2))
    >>> sparse_mixture_vjp(one, logits, w, ones, one, k=2, convention="switch").dlogits
    array([[-0.5,  0.5]])
    """
    gates = top_k_gates(logits, k=k, convention=convention)
    back = mixture_vjp(x, gates, w_in, w_out, dy, selected=_selected(logits, k), **options)
    dlogits = top_k_gates_vjp(logits, back.dgates, k=k, convention=convention).dlogits
    return SparseGradients(back.dx, dlogits, back.dw_in, back.dw_out, back.dw_gate)


def _selected(logits: FloatArray, k: int) -> BoolArray:
    """Return which experts run on each token: also those whose gate underflows to 0."""
    selected = np.zeros(np.shape(logits), bool)
    np.put_along_axis(selected, top_k_indices(widen(np.asarray(logits)), k), values=True, axis=1)
    return selected


def through_logits(
    back: MixtureGradients | SparseGradients, x: FloatArray, w_router: FloatArray, dlogits: FloatArray
) -> LayerGradients:
    """Carry the gradient of ``x @ w_router`` back, and add the tokens' two parts: of experts and of router.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> back = SparseGradients(one, one, one[None], one[None])
    >>> through_logits(back, one, 5 * one, 2 * one).dx
    array([[11.]])
    """
    x, w_router = floating(x=x, w_router=w_router)
    dseen, dw_router = router_logits_vjp(x, w_router, dlogits)
    dx = round_to(widen(back.dx) + dseen, back.dx.dtype)
    return LayerGradients(dx, round_to(dw_router, w_router.dtype), back.dw_in, back.dw_out, back.dw_gate)
