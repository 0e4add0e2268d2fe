"""Routers in which tokens choose: logits, the k best experts, weights, places while there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Unpack

from refimpl.memory import Memory
from refimpl.moe.capacity import CapacityOptions, places_of
from refimpl.moe.routing import Convention, Routing, assign_slots, gate_weights, router_logits, top_k_indices
from refimpl.numerics import BoolArray, FloatArray, IntArray

__all__ = ["Chosen", "token_choice"]


class Chosen(NamedTuple):
    """A routing, and the logits that it was made from."""

    routing: Routing
    logits: FloatArray


def token_choice(
    x: FloatArray,
    w_router: FloatArray,
    /,
    *,
    k: int,
    convention: Convention,
    order: Callable[[FloatArray], IntArray] | None = None,
    wanted: Callable[[FloatArray], BoolArray] | None = None,
    memory: Memory | None = None,
    **options: Unpack[CapacityOptions],
) -> Chosen:
    """Send each token to its k best experts, first choices first, as long as these have places.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        What the router sees.
    w_router : ndarray of float, shape (D, E)
        The router.
    k : int
        Experts a token.
    convention : {"switch", "gshard", "mixtral"}
        As for `refimpl.moe.routing.gate_weights`.
    order : callable, optional
        From the weights, shape (T, k), which token is served first, second, ...  Default: as they come.
    wanted : callable, optional
        From the weights, which choices ask for a place.  Default: all.
    memory : Memory, optional
        Counts the operations of the logits.
    **options
        As for `refimpl.moe.capacity.places_of`, the factor being of the tokens, not of their choices.

    Returns
    -------
    Chosen
        The routing and the logits.

    Examples
    --------
    >>> import numpy as np
    >>> token_choice(np.ones((3, 1)), np.zeros((1, 4)), k=2, convention="mixtral", capacity=2).routing.slot
    array([[ 0,  0],
           [ 1,  1],
           [-1, -1]])
    """
    logits = router_logits(x, w_router, memory=memory)
    expert = top_k_indices(logits, k)
    weight = gate_weights(logits, expert, convention=convention)
    T, E = logits.shape
    routing = assign_slots(
        expert,
        weight,
        experts=E,
        capacity=places_of(T, E, **options),
        groups=options.get("groups", 1),
        order=None if order is None else order(weight),
        wanted=None if wanted is None else wanted(weight),
    )
    return Chosen(routing, logits)
