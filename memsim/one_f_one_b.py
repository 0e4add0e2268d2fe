"""The order of passes in a pipeline's stage, one forward and one backward, with or without chunks.

>>> [f"{'FB'[not work.forward]}{work.micro}" for work in passes(stages=2, index=0, micro_batches=3)]
['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Pass", "in_flight", "passes"]


class Pass(NamedTuple):
    """The forward or backward pass of a micro-batch through one chunk of a stage."""

    forward: bool
    micro: int
    chunk: int


def in_flight(*, stages: int, index: int, micro_batches: int, chunks: int = 1) -> int:
    """Return how many forward passes of chunks wait for their backward pass at most.

    >>> [in_flight(stages=4, index=index, micro_batches=9) for index in range(4)]
    [4, 3, 2, 1]
    >>> in_flight(stages=4, index=0, micro_batches=8, chunks=2)  # p v + p - 1
    11
    """
    first = stages - index if chunks == 1 else 2 * (stages - index - 1) + (chunks - 1) * stages + 1
    return min(first, micro_batches * chunks)


def passes(*, stages: int, index: int, micro_batches: int, chunks: int = 1) -> Iterator[Pass]:
    """Yield the passes of a stage in the order of 1F1B; with chunks, micro-batches go in groups of stages.

    References
    ----------
    .. [1] Narayanan et al. 2021, arXiv:2104.04473, section 2.2 and Figure 4.
    """
    total = micro_batches * chunks
    ahead = in_flight(stages=stages, index=index, micro_batches=micro_batches, chunks=chunks)
    for step in range(total + ahead - 1):
        if step < total:
            yield Pass(True, *_place(step, stages, chunks))
        if step >= ahead - 1:
            micro, chunk = _place(step - ahead + 1, stages, chunks)
            yield Pass(False, micro, chunks - 1 - chunk)


def _place(step: int, stages: int, chunks: int) -> tuple[int, int]:
    """Return micro-batch and chunk of the `step`-th pass of its direction."""
    if chunks == 1:
        return step, 0
    group, within = divmod(step, stages * chunks)
    return group * stages + within % stages, within // stages
