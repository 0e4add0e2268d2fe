"""Experts: E feed-forward layers stacked along the first axis, each run on tokens of its own.

A layer with experts is written on three things: these experts, a `refimpl.moe.routing.Routing` that says
which token goes where with what weight, and the sum over a token's experts (`refimpl.moe.mixture`, and with
buffers of a fixed capacity `refimpl.moe.buffers`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.transformer.activations import Activation, activate, activation_slope
from refimpl.validation import bind_axes, floating

__all__ = ["ExpertGradients", "ExpertOptions", "expert_ffn", "expert_ffn_vjp", "product_of"]


class ExpertOptions(TypedDict, total=False):
    """Options of every layer that has experts: the gate's weight, shape (E, D, F), and the activation."""

    w_gate: FloatArray | None
    activation: Activation


class ExpertGradients(NamedTuple):
    """Gradients of the experts' inputs and weights; `dw_gate` only for gated experts."""

    dx: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_gate: FloatArray | None = None


def product_of(memory: Memory | None) -> Any:
    """Return the product of two arrays by subscripts, counted by `memory` if there is one.

    Examples
    --------
    >>> import numpy as np
    >>> memory = Memory()
    >>> product_of(memory)("td,de->te", np.ones((2, 3)), np.ones((3, 4))).shape, memory.flops
    ((2, 4), 48)
    """
    return contract if memory is None else memory.contract


def expert_ffn(
    x: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
) -> FloatArray:
    """Return each expert's ``act(x W_in) W_out`` of its rows; gated, ``(act(x W_gate) ∘ x W_in) W_out``.

    Parameters
    ----------
    x : ndarray of float, shape (E, C, D)
        C tokens for each of E experts.
    w_in : ndarray of float, shape (E, D, F)
        Into the hidden units.
    w_out : ndarray of float, shape (E, F, D)
        Out of them.
    w_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts (SwiGLU with activation "silu").
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        As for `refimpl.transformer.ffn`.
    memory : Memory, optional
        Counts the operations: ``4 E C D F``, gated ``6 E C D F``.

    Returns
    -------
    ndarray of float, shape (E, C, D)
        In the common dtype.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit together, are not real, or the activation is unknown.

    Notes
    -----
    A row of 0 gives 0: an empty place of a buffer costs operations and changes nothing.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, eq. 2; Shazeer, 2020, arXiv:2002.05202, eq. 6.

    Examples
    --------
    >>> import numpy as np
    >>> two = np.stack([np.eye(1), 2 * np.eye(1)])
    >>> expert_ffn(np.ones((2, 1, 1)), two, np.ones((2, 1, 1)))[:, 0, 0]
    array([1., 2.])
    """
    a = _named(x=x, w_in=w_in, w_out=w_out, w_gate=w_gate)
    dtype, product = a["x"].dtype, product_of(memory)
    wide = {name: widen(array) for name, array in a.items()}
    _, hidden = _hidden(wide, activation, product)
    out = product("ecf,efd->ecd", hidden, wide["w_out"])
    return round_to(out, dtype)


def expert_ffn_vjp(
    x: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
) -> ExpertGradients:
    """Return the gradients of ``sum(dy * expert_ffn(x, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_in, w_out, w_gate, activation
        As for `expert_ffn`.
    dy : ndarray of float, shape (E, C, D)
        Gradient of the output.

    Returns
    -------
    ExpertGradients
        Each in the shape of its array.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((1, 1, 1))
    >>> expert_ffn_vjp(one, 3 * one, one, one).dx.item()
    3.0
    """
    a = _named(x=x, w_in=w_in, w_out=w_out, w_gate=w_gate, dy=dy)
    dtype = a["x"].dtype
    a = {name: widen(array) for name, array in a.items()}
    parts, hidden = _hidden(a, activation, contract)
    dhidden = contract("ecd,efd->ecf", a["dy"], a["w_out"])
    dw_out = contract("ecf,ecd->efd", hidden, a["dy"])
    slope = activation_slope(activation, parts[0])
    dw_gate = None
    if w_gate is None:
        dup = dhidden * slope
        dx = contract("ecf,edf->ecd", dup, a["w_in"])
    else:
        dup = dhidden * activate(activation, parts[0])
        dgate = dhidden * parts[1] * slope
        dx = contract("ecf,edf->ecd", dup, a["w_in"]) + contract("ecf,edf->ecd", dgate, a["w_gate"])
        dw_gate = round_to(contract("ecd,ecf->edf", a["x"], dgate), dtype)
    dw_in = contract("ecd,ecf->edf", a["x"], dup)
    return ExpertGradients(round_to(dx, dtype), round_to(dw_in, dtype), round_to(dw_out, dtype), dw_gate)


def _hidden(
    a: dict[str, FloatArray], activation: Activation, product: Any
) -> tuple[tuple[FloatArray, ...], FloatArray]:
    """Return what the activation is applied to (with a gate, and what it gates), and the hidden units."""
    names = ("w_gate", "w_in") if "w_gate" in a else ("w_in",)
    parts = tuple(round_to(product("ecd,edf->ecf", a["x"], a[name]), a["x"].dtype) for name in names)
    hidden = activate(activation, parts[0])
    return parts, hidden * parts[1] if len(parts) == 2 else hidden


def _named(**arrays: FloatArray | None) -> dict[str, FloatArray]:
    """Return the arrays that are given, of one dtype, once their shapes fit."""
    given = {name: array for name, array in arrays.items() if array is not None}
    found = dict(zip(given, floating(**given), strict=True))
    axes = {"x": "E C D", "w_in": "E D F", "w_out": "E F D", "w_gate": "E D F", "dy": "E C D"}
    bind_axes({name: (array, axes[name]) for name, array in found.items()})
    return found
