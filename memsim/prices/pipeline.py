"""What each rank of a pipeline sends, exactly: counted by `parallel.pipeline`."""

from __future__ import annotations

from memsim.prices.tensor import Phases, named, phases_total, ring
from refimpl.parallel.comm import Sent
from refimpl.registry import Case, prices

__all__ = ["boundary_phases", "pipeline"]


def boundary_phases(*, rank: int, ranks: int, chunks: int, micro_batches: int, size: int) -> Phases:
    """Return what one rank sends to the ranks of the stages before and after its own.

    Parameters
    ----------
    rank, ranks, chunks, micro_batches : int
        r, p, v, m.
    size : int
        Bytes of the activations of a micro-batch.

    Examples
    --------
    >>> boundary_phases(rank=0, ranks=2, chunks=1, micro_batches=4, size=100)
    {'activations': Sent(messages=4, bytes=400)}
    """
    stages = ranks * chunks
    own = range(rank, stages, ranks)
    onward = sum(stage < stages - 1 for stage in own) if ranks > 1 else 0
    back = sum(stage > 0 for stage in own) if ranks > 1 else 0
    return phases_total(
        (label, Sent(count * micro_batches, count * micro_batches * size))
        for label, count in (("activations", onward), ("activation gradients", back))
    )


def pipeline(case: Case) -> dict[str, int]:
    """Return what each rank sends in ``pipeline_parallel(...)``: at its boundaries, and for a tied table."""
    parameters, tokens, mask = case.args
    config, ranks = case.kwargs["config"], int(case.kwargs["ranks"])
    itemsize = max(parameters.dtype.itemsize, 4)
    found = []
    for rank in range(ranks):
        phases = boundary_phases(
            rank=rank,
            ranks=ranks,
            chunks=int(case.kwargs.get("chunks", 1)),
            micro_batches=len(tokens),
            size=mask[0].size * config.width * itemsize,
        )
        if config.tied and ranks > 1 and rank in (0, ranks - 1):
            table = config.vocabulary * config.width
            tied = ring("all_reduce", elements=table, itemsize=itemsize, ranks=2)
            phases = {**phases, "tied embedding": tied}
        found.append(phases)
    return named(found)


for _name in ("parallel.pipeline", "parallel.pipeline.pipedream"):
    prices(_name, counts="comm")(pipeline)
