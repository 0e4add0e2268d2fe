"""Dispatch and combine: tokens to the buffers of experts and back, by products of matrices or by indices.

The product with a tensor of zeros and ones is what a TPU does best, but its operations grow with the number
of tokens times the number of all places; copying by index costs none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError
from refimpl.memory import Memory
from refimpl.moe.expert_ffn import expert_ffn, expert_ffn_vjp, product_of
from refimpl.moe.samples import EXPERTS
from refimpl.numerics import BoolArray, FloatArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, implements, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import as_array, bind_axes, floating

__all__ = ["DispatchGradients", "combine_tensor", "dispatch", "dispatch_by_indices", "dispatch_vjp"]


class DispatchGradients(NamedTuple):
    """Gradients of tokens, combine weights and experts; `dw_gate` only for gated experts."""

    dx: FloatArray
    dcombine: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_gate: FloatArray | None = None


def sample_dispatch(
    rng: np.random.Generator, *, G: int, S: int, E: int, C: int, D: int, F: int, experts: str, filled: str
) -> Case:
    """Return one call of `dispatch`, places given out at random, some weights 0.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    G, S, E, C, D, F : int
        Groups, tokens of each, experts, places, features, hidden units.
    experts : str
        As for `refimpl.moe.samples.sample_layer`.
    filled : {"some", "none"}
        How many places are taken.

    Returns
    -------
    Case
        In float64.

    Examples
    --------
    >>> shape = dict(G=1, S=2, E=3, C=1, D=2, F=2, experts="relu", filled="some")
    >>> [a.shape for a in sample_dispatch(np.random.default_rng(0), **shape).args]
    [(1, 2, 2), (1, 2, 3, 1), (3, 2, 2), (3, 2, 2)]
    """
    x = rng.standard_normal((G, S, D))
    taken = np.zeros((G, S, E, C), bool)
    for g, e, c in np.ndindex(G, E, C if S else 0):
        taken[g, rng.integers(S), e, c] = filled != "none" and rng.random() < 0.7
    combine = np.where(taken, rng.random(taken.shape), 0.0)
    activation = experts.removeprefix("gated ")
    options: dict[str, Any] = {"activation": activation, "dispatch_mask": taken}
    if experts.startswith("gated "):
        options["w_gate"] = rng.standard_normal((E, D, F))
    return Case((x, combine, rng.standard_normal((E, D, F)), rng.standard_normal((E, F, D))), options)


def _terms(case: Case) -> tuple[int, Any]:
    x, combine, w_in, w_out = (np.abs(array) for array in case.args)
    hidden = np.einsum("gsd,edf->gsef", x, w_in)
    if case.kwargs.get("w_gate") is not None:
        hidden = hidden * np.einsum("gsd,edf->gsef", x, np.abs(case.kwargs["w_gate"]))
    out = np.einsum("gsef,efd->gsed", hidden, w_out)
    return x.shape[1] + w_in.shape[1] + w_in.shape[2], np.einsum("gsec,gsed->gsd", combine, out)


@technique(
    "moe.dispatch",
    entries=(37,),
    kind="function",
    source=Source("Lepikhin et al. 2020", "arXiv:2006.16668", "Algorithm 2"),
    axes={"G": (1, 3), "S": (0, 5), "E": (1, 4), "C": (0, 3), "D": (1, 3), "F": (1, 4)},
    options={"experts": EXPERTS, "filled": ("some", "none")},
    edges=(
        {"G": 1, "S": 0},
        {"G": 2, "S": 3, "C": 0},
        {"G": 1, "S": 1, "E": 1, "C": 1, "D": 1, "F": 1, "filled": "some"},
        {"G": 2, "S": 4, "E": 3, "C": 2, "filled": "none"},
        {"G": 2, "S": 2, "E": 4, "C": 3, "filled": "some", "experts": "gated silu"},
    ),
    sample=sample_dispatch,
    terms=_terms,
    vjp="refimpl.moe.dispatch:dispatch_vjp",
)
def dispatch(
    x: FloatArray,
    combine: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    dispatch_mask: BoolArray | None = None,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
) -> FloatArray:
    """Return what experts make of tokens that are copied to their places, weighted, at the tokens' places.

    Parameters
    ----------
    x : ndarray of float, shape (G, S, D)
        S tokens of each of G groups.
    combine : ndarray of float, shape (G, S, E, C)
        The weight of what lies in place c of expert e for token s of group g.
    w_in, w_out, w_gate, activation
        The experts, as for `refimpl.moe.expert_ffn.expert_ffn`.
    dispatch_mask : ndarray of bool, shape (G, S, E, C), optional
        True: the token takes the place.  Default: where `combine` is not 0, as in Mesh-TensorFlow.
    memory : Memory, optional
        Counts the operations: ``4 G S E C D`` beside those of the experts, ``4 G E C D F``, gated 6.

    Returns
    -------
    ndarray of float, shape (G, S, D)
        In the common dtype of tokens and experts.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together, are not real, or the mask is not bool.
    OptionError
        If two tokens take one place, or the activation is unknown.

    Notes
    -----
    ``X[e, g, c] = sum_s mask[g, s, e, c] x[g, s]``, ``Y = experts(X)``,
    ``y[g, s] = sum_ec combine[g, s, e, c] Y[g, e, c]``.  **Special cases**

    - A weight where the mask is False is not looked at.
    - Without places, or for a token that takes none, the output is 0.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, Algorithm 2.

    Examples
    --------
    Token 1 takes the only place of expert 0:

    >>> x, combine = np.array([[[1.0], [2.0]]]), np.array([0.0, 0.5]).reshape(1, 2, 1, 1)
    >>> dispatch(x, combine, np.ones((1, 1, 1)), np.ones((1, 1, 1)))[0, :, 0]
    array([0., 1.])
    """
    x, combine, w_in, w_out, taken = _checked(x, combine, w_in, w_out, dispatch_mask)
    product, dtype = product_of(memory), x.dtype
    buffers = round_to(product("gsec,gsd->egcd", taken.astype(widen(x).dtype), widen(x)), dtype)
    E, G, C, D = buffers.shape
    flat = expert_ffn(
        buffers.reshape(E, G * C, D), w_in, w_out, w_gate=w_gate, activation=activation, memory=memory
    )
    out = widen(flat).reshape(E, G, C, D)
    return round_to(product("gsec,egcd->gsd", np.where(taken, combine, 0), out), dtype)


def dispatch_vjp(
    x: FloatArray,
    combine: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    dispatch_mask: BoolArray | None = None,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
) -> DispatchGradients:
    """Return the gradients of ``sum(dy * dispatch(x, combine, w_in, w_out, ...))``.

    Parameters
    ----------
    x, combine, w_in, w_out, dispatch_mask, w_gate, activation
        As for `dispatch`.
    dy : ndarray of float, shape (G, S, D)
        Gradient of the output.

    Returns
    -------
    DispatchGradients
        `dcombine` is 0 where the mask is False.

    Examples
    --------
    >>> x, combine, one = np.array([[[2.0]]]), np.full((1, 1, 1, 1), 0.5), np.ones((1, 1, 1))
    >>> back = dispatch_vjp(x, combine, one, one, one)
    >>> back.dx.item(), back.dcombine.item()
    (0.5, 2.0)
    """
    weight_dtype = floating(combine=combine)[0].dtype
    x, combine, w_in, w_out, taken = _checked(x, combine, w_in, w_out, dispatch_mask)
    (dy,) = floating(dy=dy)
    bind_axes({"x": (x, "G S D"), "dy": (dy, "G S D")})
    dtype, mask = x.dtype, taken.astype(wide_dtype(x.dtype))
    buffers = round_to(contract("gsec,gsd->egcd", mask, widen(x)), dtype)
    E, G, C, D = buffers.shape
    rows, upstream = buffers.reshape(E, G * C, D), widen(dy)
    out = widen(expert_ffn(rows, w_in, w_out, w_gate=w_gate, activation=activation)).reshape(E, G, C, D)
    dcombine = mask * contract("gsd,egcd->gsec", upstream, out)
    dout = contract("gsec,gsd->egcd", np.where(taken, combine, 0), upstream)
    dout = round_to(dout, dtype).reshape(E, G * C, D)
    back = expert_ffn_vjp(rows, w_in, w_out, dout, w_gate=w_gate, activation=activation)
    dx = contract("gsec,egcd->gsd", mask, widen(back.dx).reshape(E, G, C, D))
    return DispatchGradients(
        round_to(dx, dtype), round_to(dcombine, weight_dtype), back.dw_in, back.dw_out, back.dw_gate
    )


@implements("moe.dispatch", backend="numpy")
def dispatch_by_indices(
    x: FloatArray,
    combine: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    dispatch_mask: BoolArray | None = None,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
) -> FloatArray:
    """Compute `dispatch` by copying rows to where the mask has a True, and adding them back weighted."""
    x, combine, w_in, w_out, taken = _checked(x, combine, w_in, w_out, dispatch_mask)
    (G, _, D), (E, C) = x.shape, taken.shape[2:]
    g, s, e, c = np.nonzero(taken)
    buffers = np.zeros((E, G, C, D), x.dtype)
    buffers[e, g, c] = x[g, s]
    flat = expert_ffn(
        buffers.reshape(E, G * C, D), w_in, w_out, w_gate=w_gate, activation=activation, memory=memory
    )
    out = widen(flat).reshape(E, G, C, D)
    y = np.zeros(x.shape, wide_dtype(x.dtype))
    np.add.at(y, (g, s), combine[g, s, e, c, None] * out[e, g, c])
    return round_to(y, x.dtype)


def combine_tensor(
    expert: Any, slot: Any, weight: FloatArray, *, groups: int, experts: int, capacity: int
) -> tuple[FloatArray, BoolArray]:
    """Return the combine tensor and the dispatch mask, both (G, S, E, C), of a routing of G groups.

    Parameters
    ----------
    expert, slot : ndarray of int, shape (T, k)
        As in `refimpl.moe.routing.Routing`, made with so many groups.
    weight : ndarray of float, shape (T, k)
        Of each choice.
    groups, experts, capacity : int
        G, E and the places C of an expert for one group.

    Returns
    -------
    tuple of ndarray
        Weights, and where tokens go.

    Examples
    --------
    >>> combine, mask = combine_tensor(
    ...     np.array([[1]]), np.array([[0]]), np.array([[0.5]]), groups=1, experts=2, capacity=1
    ... )
    >>> combine[0, 0, :, 0], mask[0, 0, :, 0]
    (array([0. , 0.5]), array([False,  True]))
    """
    T = len(expert)
    combine = np.zeros((T, experts, capacity), weight.dtype)
    mask = np.zeros(combine.shape, bool)
    token, choice = np.nonzero(slot >= 0)
    place = token, expert[token, choice], slot[token, choice] % max(1, capacity)
    combine[place], mask[place] = weight[token, choice], True
    shape = groups, T // groups, experts, capacity
    return combine.reshape(shape), mask.reshape(shape)


def _checked(
    x: FloatArray, combine: FloatArray, w_in: FloatArray, w_out: FloatArray, mask: BoolArray | None
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, BoolArray]:
    x, w_in, w_out = floating(x=x, w_in=w_in, w_out=w_out)
    (combine,) = floating(combine=combine)
    weights = widen(combine)
    taken = weights != 0 if mask is None else as_array("dispatch_mask", mask)
    if taken.dtype != np.bool_:
        raise DTypeError(f"dispatch_mask: expected bool, True = taken, got {taken.dtype}")
    bind_axes(
        {
            "x": (x, "G S D"),
            "combine": (combine, "G S E C"),
            "w_in": (w_in, "E D F"),
            "dispatch_mask": (taken, "G S E C"),
        }
    )
    if np.any(taken.sum(axis=1) > 1):
        raise OptionError("dispatch_mask: expected at most one token in each place, got more")
    return x, weights, w_in, w_out, taken
