"""The operations of a call of a layer with experts, from the shapes of its arrays and from its options.

Each price equals what the reference counts through `refimpl.memory.Memory`: a buffer is multiplied whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.moe.capacity import places_of
from refimpl.registry import Case, prices

__all__ = ["batch_priority", "dense_mixture", "dispatch", "expert_flops", "gshard", "switch"]

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


def _buffered(case: Case, choices: int, **defaults: Any) -> dict[str, int]:
    """Return ``2 T D E + 4 E C D F + 2 T k D`` for C places in all groups: router, full buffers, sum."""
    T, D, E, F, gated = _shape(case)
    options = {**defaults, **{name: case.kwargs[name] for name in CAPACITY if name in case.kwargs}}
    places = options.get("groups", 1) * places_of(T, E, **options)
    return {"flops": 2 * T * D * E + expert_flops(E * places, D, F, gated=gated) + 2 * T * choices * D}


@prices("moe.switch", counts="flops")
def switch(case: Case) -> dict[str, int]:
    """Return the operations of ``switch(...)``, one expert a token."""
    return _buffered(case, 1)


@prices("moe.gshard", counts="flops")
@prices("moe.gshard.as_coded", counts="flops")
def gshard(case: Case) -> dict[str, int]:
    """Return the operations of GShard's layer, two experts a token; what chance takes out is paid too."""
    return _buffered(case, 2, capacity_factor=2.0)


@prices("moe.batch_priority", counts="flops")
def batch_priority(case: Case) -> dict[str, int]:
    """Return the operations of ``batch_priority(...)``, whose factor is of all k choices of a token."""
    k = int(case.kwargs.get("k", 1))
    factor = k * case.kwargs.get("capacity_factor", 1.25)
    return _buffered(case.replace(capacity_factor=factor), k, rounding="vmoe")


@prices("moe.dispatch", counts="flops")
def dispatch(case: Case) -> dict[str, int]:
    """Return ``4 G S E C D`` for two products with one-hot tensors, and the experts on ``G E C`` places."""
    x, combine, w_in = (np.asarray(array) for array in case.args[:3])
    G, _, E, C = combine.shape
    experts = expert_flops(G * E * C, x.shape[2], w_in.shape[2], gated=case.kwargs.get("w_gate") is not None)
    return {"flops": 4 * combine.size * x.shape[2] + experts}
