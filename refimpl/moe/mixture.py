"""The sum over experts without buffers: every token runs through the experts that are selected for it."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import numpy as np

from refimpl.memory import Memory
from refimpl.moe.expert_ffn import ExpertOptions, expert_ffn, expert_ffn_vjp, product_of
from refimpl.numerics import BoolArray, FloatArray, round_to, wide_dtype, widen
from refimpl.validation import as_array, bind_axes, floating

__all__ = ["MixtureGradients", "mixture", "mixture_vjp"]


class MixtureGradients(NamedTuple):
    """Gradients of tokens, gates and experts; `dw_gate` only for gated experts."""

    dx: FloatArray
    dgates: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_gate: FloatArray | None = None


def mixture(
    x: FloatArray,
    gates: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    selected: BoolArray | None = None,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return ``sum_e gates[t, e] * expert_e(x[t])``, each expert run on its selected tokens alone.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    gates : ndarray of float, shape (T, E)
        Weights; may be of a wider dtype than the rest.
    w_in, w_out, **options
        The experts, as for `expert_ffn`.
    selected : ndarray of bool, shape (T, E), optional
        Which experts run on which token.  Default: all on all.
    memory : Memory, optional
        Counts the operations: ``(4 D F + 2 D) n`` for n selected pairs, gated ``(6 D F + 2 D) n``.

    Returns
    -------
    ndarray of float, shape (T, D)
        Summed in the wide dtype, returned in the dtype of `x`; 0 where nothing is selected.

    Examples
    --------
    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> mixture(np.ones((1, 1)), np.array([[0.5, 0.5]]), w, np.ones((2, 1, 1)))
    array([[2.]])
    """
    x, gates, w_in, w_out, chosen = _checked(x, gates, w_in, w_out, options.get("w_gate"), selected)
    wide, product = wide_dtype(x.dtype), product_of(memory)
    total = np.zeros(x.shape, wide)
    for e, rows in enumerate(chosen):
        out = widen(expert_ffn(x[None, rows], *_expert(e, w_in, w_out), memory=memory, **_one(e, options)))[0]
        total[rows] += product("t,td->td", gates[rows, e].astype(wide), out)
    return round_to(total, x.dtype)


def mixture_vjp(
    x: FloatArray,
    gates: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    selected: BoolArray | None = None,
    **options: Unpack[ExpertOptions],
) -> MixtureGradients:
    """Return the gradients of ``sum(dy * mixture(x, gates, w_in, w_out, ...))``.

    Parameters
    ----------
    x, gates, w_in, w_out, selected, **options
        As for `mixture`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    MixtureGradients
        `dgates` is 0 where an expert was not selected; an expert that nobody selected gets 0.

    Examples
    --------
    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> mixture_vjp(np.ones((1, 1)), np.array([[0.5, 0.5]]), w, np.ones((2, 1, 1)), np.ones((1, 1))).dgates
    array([[1., 3.]])
    """
    x, gates, w_in, w_out, chosen = _checked(x, gates, w_in, w_out, options.get("w_gate"), selected)
    (dy,) = floating(dy=dy)
    bind_axes({"x": (x, "T D"), "dy": (dy, "T D")})
    wide = wide_dtype(x.dtype)
    dx, dgates = np.zeros(x.shape, wide), np.zeros(gates.shape, wide)
    w_gate = options.get("w_gate")
    dw_in, dw_out = np.zeros(w_in.shape, w_in.dtype), np.zeros(w_out.shape, w_out.dtype)
    dw_gate = None if w_gate is None else np.zeros(np.shape(w_gate), x.dtype)
    for e, rows in enumerate(chosen):
        expert, one = _expert(e, w_in, w_out), _one(e, options)
        out, upstream = widen(expert_ffn(x[None, rows], *expert, **one))[0], widen(dy[rows]).astype(wide)
        dgates[rows, e] = np.sum(upstream * out, axis=1)
        dout = round_to(gates[rows, e, None].astype(wide) * upstream, x.dtype)
        back = expert_ffn_vjp(x[None, rows], *expert, dout[None], **one)
        dx[rows] += widen(back.dx)[0]
        dw_in[e], dw_out[e] = back.dw_in[0], back.dw_out[0]
        if dw_gate is not None and back.dw_gate is not None:
            dw_gate[e] = back.dw_gate[0]
    return MixtureGradients(round_to(dx, x.dtype), round_to(dgates, gates.dtype), dw_in, dw_out, dw_gate)


def _checked(
    x: FloatArray,
    gates: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    w_gate: FloatArray | None,
    selected: BoolArray | None,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, list[Any]]:
    x, w_in, w_out = floating(x=x, w_in=w_in, w_out=w_out)
    (gates,) = floating(gates=gates)
    mask = np.ones(gates.shape, bool) if selected is None else as_array("selected", selected)
    axes = {"x": (x, "T D"), "gates": (gates, "T E"), "w_in": (w_in, "E D F"), "w_out": (w_out, "E F D")}
    axes |= {} if w_gate is None else {"w_gate": (as_array("w_gate", w_gate), "E D F")}
    bind_axes({**axes, "selected": (mask, "T E")})
    return x, widen(gates), w_in, w_out, [np.flatnonzero(column) for column in mask.T]


def _expert(e: int, w_in: FloatArray, w_out: FloatArray) -> tuple[FloatArray, FloatArray]:
    return w_in[e : e + 1], w_out[e : e + 1]


def _one(e: int, options: ExpertOptions) -> ExpertOptions:
    """Return the options of expert `e` alone."""
    w_gate = options.get("w_gate")
    return options if w_gate is None else {**options, "w_gate": np.asarray(w_gate)[e : e + 1]}
