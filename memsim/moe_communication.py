"""What each rank sends when experts are spread over ranks, from shapes and options alone.

An all-to-all moves whole buffers, empty places with them: C places for each expert from every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.collectives import sent_by_rank
from refimpl.moe.capacity import places_of
from refimpl.moe.rank_layer import placement
from refimpl.parallel.comm import Sent
from refimpl.registry import Case, prices

__all__ = ["expert_parallel", "expert_parallel_backward", "sent_by_all_to_all"]

CAPACITY = ("capacity", "capacity_factor", "rounding", "min_capacity", "groups")


def sent_by_all_to_all(
    *, experts: int, ranks: int, capacity: int, width: int, itemsize: int
) -> tuple[list[Sent], list[Sent]]:
    """Return what each rank sends to dispatch its tokens, and to give those of others back.

    Parameters
    ----------
    experts, ranks : int
        E experts on R ranks, placed as evenly as they can be.
    capacity : int
        Places of each expert for the tokens of one rank.
    width, itemsize : int
        Elements of a token, and bytes of an element.

    Returns
    -------
    tuple of list of Sent
        Dispatch: ``(E - E_r) C D`` elements from rank r.  Combine: ``(R - 1) E_r C D``.

    Examples
    --------
    Five experts on two ranks, of which the first holds three:

    >>> sent_by_all_to_all(experts=5, ranks=2, capacity=4, width=8, itemsize=2)[0]
    [Sent(messages=1, bytes=128), Sent(messages=1, bytes=192)]
    """
    held = [part.stop - part.start for part in placement(experts, ranks)]
    expert = capacity * width * itemsize
    dispatch = [Sent(ranks - 1, (experts - own) * expert) for own in held]
    combine = [Sent(ranks - 1, (ranks - 1) * own * expert) for own in held]
    return dispatch, combine


def _exchanges(case: Case) -> tuple[list[Sent], list[Sent]]:
    x, w_router = (np.asarray(array) for array in case.args[:2])
    ranks, tokens, width = x.shape
    options: dict[str, Any] = {name: case.kwargs[name] for name in CAPACITY if name in case.kwargs}
    experts = w_router.shape[1]
    capacity = options.get("groups", 1) * places_of(tokens, experts, **options)
    return sent_by_all_to_all(
        experts=experts, ranks=ranks, capacity=capacity, width=width, itemsize=x.dtype.itemsize
    )


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
