"""What each rank sends in a call of a distributed reference, from shapes, dtypes and options alone.

Each model equals, rank by rank, what the reference counts in `refimpl.parallel.comm.Traffic`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from memsim.collectives import sent_by_rank
from memsim.communication import PHASES
from refimpl.parallel.comm import Sent
from refimpl.registry import Case, prices

__all__ = ["MODELS", "data_parallel", "zero"]

Counts = dict[str, int]


def _named(sent: list[Sent]) -> Counts:
    return {
        f"rank {rank} {name}": value
        for rank, item in enumerate(sent)
        for name, value in item._asdict().items()
    }


def _collective(operation: str, algorithm: str | None, *, gathers: bool = False) -> Callable[[Case], Counts]:
    """Return the model of a collective on an array with one row a rank."""

    def model(case: Case) -> Counts:
        (x,) = (np.asarray(array) for array in case.args)
        ranks = x.shape[0]
        elements = int(np.prod(x.shape[1:])) * (ranks if gathers else 1)
        chosen = algorithm or str(case.kwargs.get("algorithm", "ring"))
        root = int(case.kwargs.get("root", 0))
        return _named(
            sent_by_rank(
                operation, chosen, elements=elements, itemsize=x.dtype.itemsize, ranks=ranks, root=root
            )
        )

    return model


def _training(case: Case, reduce_scatters: int, all_gathers: int, statistics: int, steps: int) -> Counts:
    """Return the counts of `steps` steps: so many ring phases over every unit, so many sums of one number."""
    parameters, tokens = (np.asarray(array) for array in case.args[:2])
    ranks = tokens.shape[2]
    low = np.dtype(case.kwargs.get("model_dtype") or parameters.dtype).itemsize
    parts: list[tuple[int, Sent]] = [
        (statistics, sent_by_rank("all_reduce", "ring", elements=1, itemsize=8, ranks=ranks)[0])
    ]
    for unit in case.kwargs["network"]:
        one: dict[str, Any] = {"elements": unit.size, "itemsize": low, "ranks": ranks}
        parts.append((reduce_scatters, sent_by_rank("reduce_scatter", "ring", **one)[0]))
        parts.append((all_gathers, sent_by_rank("all_gather", "ring", **one)[0]))
    messages = steps * sum(times * sent.messages for times, sent in parts)
    size = steps * sum(times * sent.bytes for times, sent in parts)
    return _named([Sent(messages, size)] * ranks)


def data_parallel(case: Case) -> Counts:
    """Return what each rank sends in ``data_parallel(...)``: 2Ψ(N-1)/N a step, padded, and two numbers."""
    return _training(case, 1, 1, 2, steps=len(case.args[1]))


def zero(case: Case) -> Counts:
    """Return what each rank sends in ``zero(...)``, with m micro-batches, and three numbers.

    Reduce-scatters and all-gathers of Ψ a step: 1 and 1 in stage 1, m and 1 in stage 2, m and 2m in stage 3.
    """
    steps, micro = case.args[1].shape[:2]
    phases, _ = PHASES[case.kwargs["stage"]]
    scatters, gathers = (
        sum(micro if repeated else 1 for name, repeated in phases if name.startswith(kind))
        for kind in ("reduce-scatter", "all-gather")
    )
    return _training(case, scatters, gathers, 3, steps=steps)


MODELS: dict[str, Callable[[Case], Counts]] = {
    "parallel.collectives": _collective("all_reduce", None),
    "parallel.collectives.all_gather": _collective("all_gather", "ring", gathers=True),
    "parallel.collectives.all_to_all": _collective("all_to_all", "pairwise"),
    "parallel.collectives.broadcast": _collective("broadcast", "tree"),
    "parallel.collectives.reduce": _collective("reduce", "tree"),
    "parallel.collectives.reduce_scatter": _collective("reduce_scatter", "ring"),
    "parallel.data": data_parallel,
    "parallel.zero": zero,
}

for _name, _model in MODELS.items():
    prices(_name, counts="comm")(_model)
