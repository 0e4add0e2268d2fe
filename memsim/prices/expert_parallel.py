"""What the references' ranks send when experts are spread over them, from shapes and options alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.collectives import sent_by_rank
from memsim.moe_communication import moe_all_to_all
from refimpl.moe.capacity import places_of
from refimpl.moe.rank_layer import placement
from refimpl.parallel.comm import Sent
from refimpl.registry import Case, prices

__all__ = ["expert_parallel", "expert_parallel_backward"]

CAPACITY = ("capacity", "capacity_factor", "rounding", "min_capacity", "groups")


def _exchanges(case: Case) -> tuple[list[Sent], list[Sent]]:
    """Return what each rank sends to dispatch its tokens, and to give those of others back."""
    x, w_router = (np.asarray(array) for array in case.args[:2])
    ranks, tokens, width = x.shape
    options: dict[str, Any] = {name: case.kwargs[name] for name in CAPACITY if name in case.kwargs}
    experts = w_router.shape[1]
    size = {
        "experts": experts,
        "capacity": options.get("groups", 1) * places_of(tokens, experts, **options),
        "width": width,
        "ranks": ranks,
        "itemsize": x.dtype.itemsize,
    }
    # The estimate is of layers that have something to send; a call may have none.
    if not all(size.values()):
        idle = [Sent(ranks - 1, 0)] * ranks
        return idle, idle
    layers = [moe_all_to_all(**size, held=part.stop - part.start) for part in placement(experts, ranks)]
    dispatch, combine = (
        [Sent(ranks - 1, int(layer[f"forward, {way}"])) for layer in layers]
        for way in ("dispatch", "combine")
    )
    return dispatch, combine


def _totals(*parts: list[Sent]) -> dict[str, int]:
    """Return the sum of what each rank sends, named as `refimpl.parallel.comm.Traffic` names it."""
    found: dict[str, int] = {}
    for rank, sent in enumerate(zip(*parts, strict=True)):
        found[f"rank {rank} messages"] = sum(item.messages for item in sent)
        found[f"rank {rank} bytes"] = sum(item.bytes for item in sent)
    return found


@prices("moe.expert_parallel", counts="comm")
def expert_parallel(case: Case) -> dict[str, int]:
    """Return what each rank sends in ``expert_parallel(...)``: two all-to-alls."""
    return _totals(*_exchanges(case))


@prices("moe.expert_parallel.backward", counts="comm")
def expert_parallel_backward(case: Case) -> dict[str, int]:
    """Return what each rank sends in ``expert_parallel_vjp(...)``: four all-to-alls and one all-reduce."""
    w_router = np.asarray(case.args[1])
    ranks = len(case.args[0])
    itemsize = np.asarray(case.args[0]).dtype.itemsize
    reduced = sent_by_rank("all_reduce", "ring", elements=w_router.size, itemsize=itemsize, ranks=ranks)
    exchanges = _exchanges(case)
    return _totals(*exchanges, *exchanges, reduced)
