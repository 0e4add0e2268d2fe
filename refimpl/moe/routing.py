"""The vocabulary of routing: logits, the k best experts of a token, their weights, and places in buffers.

Token-choice routers differ in four steps only, each a function here: how logits are made (`router_logits`),
which experts are taken (`top_k_indices`), what weights they get (`gate_weights`, three conventions) and who
finds room (`assign_slots`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.moe.expert_ffn import product_of
from refimpl.numerics import BoolArray, FloatArray, IntArray, wide_dtype, widen
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "Convention",
    "Routing",
    "assign_slots",
    "gate_weights",
    "gate_weights_vjp",
    "router_logits",
    "router_logits_vjp",
    "top_k_indices",
]

Convention: TypeAlias = Literal["switch", "gshard", "mixtral"]


class Routing(NamedTuple):
    """Where every token goes: choice j of token t is place ``slot[t, j]`` of expert ``expert[t, j]``.

    Attributes
    ----------
    expert : ndarray of int, shape (T, k)
        The chosen experts, the best first.
    weight : ndarray of float, shape (T, k)
        What each expert's output is multiplied by; 0 where the choice was dropped.
    slot : ndarray of int, shape (T, k)
        Place in the expert's buffer, below `capacity`; -1 where the choice was dropped.
    kept : ndarray of bool, shape (T, k)
        Whether the choice found room.
    capacity : int
        Places in the buffer of each expert.
    experts : int
        How many there are.
    """

    expert: IntArray
    weight: FloatArray
    slot: IntArray
    kept: BoolArray
    capacity: int
    experts: int


def router_logits(x: FloatArray, w_router: FloatArray, *, memory: Memory | None = None) -> FloatArray:
    """Return ``x W_router`` in float32 at least: a router in bfloat16 is unstable [1]_.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, E)
        One column for each expert.
    memory : Memory, optional
        Counts ``2 T D E`` operations.

    Returns
    -------
    ndarray of float, shape (T, E)
        In the wide dtype.

    References
    ----------
    .. [1] Fedus et al., 2021, arXiv:2101.03961, section 2.4, "selective precision".

    Examples
    --------
    >>> router_logits(np.ones((1, 2), np.float16), np.ones((2, 3), np.float16))
    array([[2., 2., 2.]], dtype=float32)
    """
    (x,), (w_router,) = floating(x=x), floating(w_router=w_router)  # each of a dtype of its own
    bind_axes({"x": (x, "T D"), "w_router": (w_router, "D E")})
    logits: FloatArray = product_of(memory)("td,de->te", widen(x), widen(w_router))
    return logits


def router_logits_vjp(
    x: FloatArray, w_router: FloatArray, dlogits: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of ``sum(dlogits * router_logits(x, w_router))``, in the wide dtype.

    Examples
    --------
    >>> [g.shape for g in router_logits_vjp(np.ones((1, 2)), np.ones((2, 3)), np.ones((1, 3)))]
    [(1, 2), (2, 3)]
    """
    wide = wide_dtype(x.dtype)
    x, w_router = widen(x).astype(wide, copy=False), widen(w_router).astype(wide, copy=False)
    return dlogits @ w_router.T, x.T @ dlogits


def top_k_indices(scores: FloatArray, k: int) -> IntArray:
    """Return the indices of the k largest scores of each row, the largest first, ties to the lowest index.

    Raises
    ------
    OptionError
        If a row has fewer than k scores, or k is below 1.

    Examples
    --------
    >>> top_k_indices(np.array([[1.0, 3.0, 3.0, 2.0]]), 3)
    array([[1, 2, 3]])
    """
    if whole("k", k) > scores.shape[-1]:
        raise OptionError(f"k: expected at most {scores.shape[-1]}, the number of experts, got {k}")
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def gate_weights(logits: FloatArray, expert: IntArray, *, convention: Convention) -> FloatArray:
    """Return the weights of the chosen experts of each token.

    Parameters
    ----------
    logits : ndarray of float, shape (T, E)
        In the wide dtype.
    expert : ndarray of int, shape (T, k)
        The chosen experts, different ones.
    convention : {"switch", "gshard", "mixtral"}
        ``"switch"``: softmax over all experts, those of the chosen ones are taken, which sum to less than 1.
        ``"gshard"``: those divided by their sum.  ``"mixtral"``: softmax over the chosen logits alone, equal
        to "gshard" but for rounding.  With k = 1 the last two give 1 whatever the router says.

    Returns
    -------
    ndarray of float, shape (T, k)
        In the dtype of `logits`.

    Examples
    --------
    >>> logits = np.log([[0.5, 0.3, 0.2]])
    >>> gate_weights(logits, np.array([[0, 1]]), convention="switch")
    array([[0.5, 0.3]])
    >>> gate_weights(logits, np.array([[0, 1]]), convention="gshard")
    array([[0.625, 0.375]])
    """
    if convention == "mixtral":
        return softmax(np.take_along_axis(logits, expert, axis=1))
    taken = np.take_along_axis(softmax(logits), expert, axis=1)
    if convention == "switch":
        return taken
    if convention == "gshard":
        return np.asarray(taken / taken.sum(axis=1, keepdims=True))
    raise OptionError(f"convention: expected one of {get_args(Convention)}, got {convention!r}")


def gate_weights_vjp(
    logits: FloatArray, expert: IntArray, dweight: FloatArray, *, convention: Convention
) -> FloatArray:
    """Return the gradient of ``sum(dweight * gate_weights(logits, expert, ...))`` with respect to the logits.

    The choice itself has no gradient: under "gshard" and "mixtral" logits of other experts get 0, under
    "switch" they get one through the sum of the softmax.  Dropped choices must have ``dweight`` 0.

    Examples
    --------
    >>> logits, expert = np.zeros((1, 3)), np.array([[0, 1]])
    >>> gate_weights_vjp(logits, expert, np.array([[1.0, 0.0]]), convention="mixtral")
    array([[ 0.25, -0.25,  0.  ]])
    """
    gradient = np.zeros_like(logits)
    if convention == "switch":
        p = softmax(logits)
        np.put_along_axis(gradient, expert, dweight, axis=1)
        return np.asarray(p * (gradient - np.sum(p * gradient, axis=1, keepdims=True)))
    weight = gate_weights(logits, expert, convention=convention)
    through = weight * (dweight - np.sum(weight * dweight, axis=1, keepdims=True))
    np.put_along_axis(gradient, expert, through, axis=1)
    return gradient


def assign_slots(
    expert: IntArray,
    weight: FloatArray,
    *,
    experts: int,
    capacity: int,
    groups: int = 1,
    order: IntArray | None = None,
    wanted: BoolArray | None = None,
) -> Routing:
    """Give each choice the next free place of its expert: first choices in turn, then second ones, ...

    Parameters
    ----------
    expert : ndarray of int, shape (T, k)
        The chosen experts.
    weight : ndarray of float, shape (T, k)
        Their weights.
    experts : int
        How many experts there are.
    capacity : int
        Places of each expert for each group.
    groups : int
        The tokens are cut into so many groups of T / groups that compete only among themselves; places of
        group g are ``g * capacity`` and those after it, as in the layout [E, G, C, M] of GShard [1]_.
    order : ndarray of int, shape (T,), optional
        Which token is served first, second, ...  Default: as they come.
    wanted : ndarray of bool, shape (T, k), optional
        False: the choice takes no place.  Default: all are wanted.

    Returns
    -------
    Routing
        With ``groups * capacity`` places.  A choice that finds no room is dropped, and takes none from those
        behind it.

    Raises
    ------
    ShapeError
        If the tokens do not divide into groups.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, Algorithm 2.

    Examples
    --------
    Three tokens choose expert 0, which has room for two:

    >>> chosen = np.zeros((3, 1), int)
    >>> assign_slots(chosen, np.ones((3, 1)), experts=1, capacity=2).slot[:, 0]
    array([ 0,  1, -1])
    """
    T, k = expert.shape
    if T % whole("groups", groups):
        raise ShapeError(f"x: expected tokens that divide into {groups} groups, got {T}")
    group = np.arange(T) // max(1, T // groups)
    served = np.arange(T) if order is None else order
    slot = np.full((T, k), -1)
    taken = np.zeros(groups * experts, int)
    for choice in range(k):
        tokens = served if wanted is None else served[wanted[served, choice]]
        buffer = group[tokens] * experts + expert[tokens, choice]
        place = taken[buffer] + _arrivals_before(buffer, groups * experts)
        slot[tokens, choice] = np.where(place < capacity, group[tokens] * capacity + place, -1)
        taken = np.minimum(taken + np.bincount(buffer, minlength=groups * experts), capacity)
    kept = slot >= 0
    return Routing(expert, np.where(kept, weight, 0), slot, kept, groups * capacity, experts)


def _arrivals_before(buffer: IntArray, buffers: int) -> IntArray:
    """Return for each arrival how many came to its buffer before it: its place in line, by a stable sort."""
    order = np.argsort(buffer, kind="stable")
    line = buffer[order]
    place = np.empty_like(order)
    place[order] = np.arange(len(buffer)) - np.searchsorted(line, np.arange(buffers))[line]
    return place
