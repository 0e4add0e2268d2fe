"""What each rank of a tensor-parallel group sends, exactly: counted by `parallel.tensor` and its kin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from memsim.collectives import sent_by_rank
from refimpl.parallel.comm import Sent
from refimpl.registry import Case, prices

__all__ = [
    "Phases",
    "block_phases",
    "named",
    "phases_total",
    "replicated_sizes",
    "ring",
    "vocabulary_phases",
]

Phases = dict[str, Sent]


def ring(operation: str, *, elements: int, itemsize: int, ranks: int, times: int = 1) -> Sent:
    """Return what each of `ranks` sends in `times` rings over a vector of `elements`.

    >>> ring("all_reduce", elements=10, itemsize=8, ranks=4)
    Sent(messages=6, bytes=144)
    """
    one = sent_by_rank(operation, "ring", elements=elements, itemsize=itemsize, ranks=ranks)[0]
    return Sent(times * one.messages, times * one.bytes)


def phases_total(parts: Iterable[tuple[str, Sent]]) -> Phases:
    """Return what is sent under each label, labels with nothing left out.

    >>> phases_total([("a", Sent(1, 8)), ("b", Sent(0, 0)), ("a", Sent(2, 8))])
    {'a': Sent(messages=3, bytes=16)}
    """
    total: Phases = {}
    for label, sent in parts:
        before = total.get(label, Sent(0, 0))
        total[label] = Sent(before.messages + sent.messages, before.bytes + sent.bytes)
    return {label: sent for label, sent in total.items() if sent.messages}


def named(ranks: Iterable[Phases]) -> dict[str, int]:
    """Return messages and bytes of each rank, as `refimpl.parallel.traffic.Traffic.totals` names them.

    >>> named([{"a": Sent(1, 8), "b": Sent(1, 16)}])
    {'rank 0 messages': 2, 'rank 0 bytes': 24}
    """
    return {
        f"rank {rank} {name}": sum(getattr(sent, name) for sent in phases.values())
        for rank, phases in enumerate(ranks)
        for name in Sent._fields
    }


def block_phases(
    *,
    tokens: int,
    width: int,
    itemsize: int,
    ranks: int,
    passes: int,
    replicated: Iterable[int],
    sequence_parallel: bool,
    backward: bool,
) -> Phases:
    """Return what a rank sends for one block.

    Parameters
    ----------
    tokens, width, itemsize, ranks : int
        b·s, h, bytes an element, p.
    passes : int
        Forward and backward passes: 1, 2, or with recomputation 3.
    replicated : iterable of int
        Sizes of the weight vectors that every rank has, as they are summed under sequence parallelism.
    sequence_parallel, backward : bool
        Whether tokens are split, and whether gradients are made.

    Examples
    --------
    Two all-reduces of 8 elements, over 2 ranks:

    >>> block_phases(tokens=4, width=2, itemsize=8, ranks=2, passes=1, replicated=(),
    ...              sequence_parallel=False, backward=False)
    {'tensor all-reduce': Sent(messages=4, bytes=128)}
    """
    one: dict[str, Any] = {"elements": tokens * width, "itemsize": itemsize, "ranks": ranks}
    if not sequence_parallel:
        return phases_total([("tensor all-reduce", ring("all_reduce", times=2 * passes, **one))])
    parts = [
        ("tensor all-gather", ring("all_gather", times=2 * passes, **one)),
        ("tensor reduce-scatter", ring("reduce_scatter", times=2 * passes, **one)),
    ]
    for size in replicated if backward else ():
        sent = ring("all_reduce", elements=size, itemsize=itemsize, ranks=ranks)
        parts.append(("sequence gradients", sent))
    return phases_total(parts)


def replicated_sizes(weights: Iterable[str], width: int) -> list[int]:
    """Return the sizes of what every rank has of a block: each bias after a sum, and each norm's vectors.

    >>> replicated_sizes(["w_q", "b_o", "gamma_1", "beta_1", "gamma_2"], 4)
    [4, 8, 4]
    """
    present = set(weights)
    biases = [width for name in ("b_o", "b_2") if name in present]
    norms = [width * len(present & {f"gamma_{n}", f"beta_{n}"}) for n in (1, 2)]
    return biases + [size for size in norms if size]


def _block(case: Case) -> dict[str, int]:
    x = np.asarray(case.args[0])
    ranks, backward = int(case.kwargs["ranks"]), len(case.args) > 1
    phases = block_phases(
        tokens=x.shape[0] * x.shape[1],
        width=x.shape[2],
        itemsize=max(x.dtype.itemsize, 4),
        ranks=ranks,
        passes=2 if backward else 1,
        replicated=replicated_sizes(case.kwargs, x.shape[2]),
        sequence_parallel=bool(case.kwargs.get("sequence_parallel", False)),
        backward=backward,
    )
    return named([phases] * ranks)


def vocabulary_phases(*, tokens: int, itemsize: int, ranks: int) -> Phases:
    """Return what a rank sends for the losses of `tokens`: their largest logits, then two sums of each.

    >>> vocabulary_phases(tokens=3, itemsize=8, ranks=2)
    {'vocabulary all-reduce': Sent(messages=4, bytes=80)}
    """
    numbers = (ring("all_reduce", elements=n * tokens, itemsize=itemsize, ranks=ranks) for n in (1, 2))
    return phases_total(("vocabulary all-reduce", sent) for sent in numbers)


def _embedding(case: Case) -> dict[str, int]:
    table, tokens = (np.asarray(array) for array in case.args)
    ranks, size = int(case.kwargs["ranks"]), max(table.dtype.itemsize, 4)
    sent = ring("all_reduce", elements=tokens.size * table.shape[1], itemsize=size, ranks=ranks)
    return named([{"tensor all-reduce": sent}] * ranks)


def _loss(case: Case) -> dict[str, int]:
    hidden, _, targets = (np.asarray(array) for array in case.args)
    ranks, size = int(case.kwargs["ranks"]), max(hidden.dtype.itemsize, 4)
    return named([vocabulary_phases(tokens=targets.size, itemsize=size, ranks=ranks)] * ranks)


MODELS = {
    "parallel.tensor": _block,
    "parallel.tensor.backward": _block,
    "parallel.tensor.embedding": _embedding,
    "parallel.tensor.cross_entropy": _loss,
}
for _name, _model in MODELS.items():
    prices(_name, counts="comm")(_model)
