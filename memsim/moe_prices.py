"""The operations of a call of a layer with experts, from the shapes of its arrays and from its options.

Each price equals what the reference counts through `refimpl.memory.Memory`: a buffer is multiplied whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.capacity import places_of
from refimpl.registry import Case, prices

__all__ = ["buffered", "dense_mixture", "dispatch", "expert_flops"]

CAPACITY = ("capacity", "capacity_factor", "rounding", "min_capacity", "groups")


def expert_flops(rows: int, width: int, hidden: int, *, gated: bool) -> int:
    """Return the operations of experts on so many rows: two matrices a row, three if gated.

    Examples
    --------
    >>> expert_flops(1, 2, 3, gated=False), expert_flops(1, 2, 3, gated=True)
    (24, 36)
    """
    return (6 if gated else 4) * rows * width * hidden


def _shape(case: Case) -> tuple[int, int, int, int, bool]:
    """Return T, D, E, F of ``layer(x, w_router, w_in, w_out)``, and whether the experts are gated."""
    x, w_router, w_in = (np.asarray(array) for array in case.args[:3])
    return *x.shape, w_router.shape[1], w_in.shape[2], case.kwargs.get("w_gate") is not None


@prices("moe.dense_mixture", counts="flops")
def dense_mixture(case: Case) -> dict[str, int]:
    """Return ``T E (4 D + 4 D F)``: the gates, every expert on every token, the sum."""
    T, D, E, F, gated = _shape(case)
    return {"flops": 4 * T * E * D + expert_flops(T * E, D, F, gated=gated)}


def buffered(choices: int, **defaults: Any) -> Callable[[Case], dict[str, int]]:
    """Return the price of a layer with buffers in which a token goes to so many experts.

    Parameters
    ----------
    choices : int
        Experts a token, unless the call says k.
    **defaults
        Options of `refimpl.moe.capacity.places_of` that are the layer's own.

    Returns
    -------
    callable
        ``2 T D E + 4 E C D F + 2 T k D`` for C places in all groups.
    """

    def model(case: Case) -> dict[str, int]:
        T, D, E, F, gated = _shape(case)
        k = int(case.kwargs.get("k", choices))
        options = {**defaults, **{name: case.kwargs[name] for name in CAPACITY if name in case.kwargs}}
        if "k" in case.kwargs:  # the factor is of all choices
            options["capacity_factor"] = k * options.get("capacity_factor", 1.25)
        places = options.get("groups", 1) * places_of(T, E, **options)
        return {"flops": 2 * T * D * E + expert_flops(E * places, D, F, gated=gated) + 2 * T * k * D}

    return model


for _name, _model in {
    "moe.switch": buffered(1),
    "moe.gshard": buffered(2, capacity_factor=2.0),
    "moe.gshard.as_coded": buffered(2, capacity_factor=2.0),
    "moe.batch_priority": buffered(1, rounding="vmoe"),
}.items():
    prices(_name, counts="flops")(_model)


@prices("moe.dispatch", counts="flops")
def dispatch(case: Case) -> dict[str, int]:
    """Return ``4 G S E C D`` for two products with one-hot tensors, and the experts on ``G E C`` places."""
    x, combine, w_in = (np.asarray(array) for array in case.args[:3])
    G, _, E, C = combine.shape
    experts = expert_flops(G * E * C, x.shape[2], w_in.shape[2], gated=case.kwargs.get("w_gate") is not None)
    return {"flops": 4 * combine.size * x.shape[2] + experts}
