"""A pipeline schedule in time: each step starts when its rank is free and what it takes has arrived.

>>> from refimpl.parallel.schedules import pipeline_schedule
>>> line = replay(pipeline_schedule(schedule="1f1b", ranks=4, micro_batches=8))
>>> line.makespan, line.idle_share
(33, Fraction(3, 11))
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from memsim.units import Number
from refimpl.errors import OptionError
from refimpl.numerics import IntArray
from refimpl.parallel.schedules import Step, steps_of

__all__ = ["Slot", "Timeline", "replay"]


class Slot(NamedTuple):
    """One step on one rank, from start to end."""

    rank: int
    step: Step
    start: Number
    end: Number


class Timeline(NamedTuple):
    """What every rank does when.

    Attributes
    ----------
    slots : tuple of Slot
        In order of rank, then of time.
    ranks : int
        p.
    """

    slots: tuple[Slot, ...]
    ranks: int

    @property
    def makespan(self) -> Number:
        """When the last step ends."""
        return max((slot.end for slot in self.slots), default=0)

    @property
    def idle_share(self) -> Fraction:
        """Share of all ranks' time up to the end in which they wait: the bubble."""
        whole = self.ranks * self.makespan
        busy = sum(slot.end - slot.start for slot in self.slots)
        return Fraction(whole - busy) / whole if whole else Fraction(0)

    @property
    def in_flight(self) -> list[int]:
        """The most micro-batches of one stage that each rank holds at once, forward done and not yet back."""
        held, peaks = [0] * self.ranks, [0] * self.ranks
        for slot in self.slots:
            held[slot.rank] += -1 if slot.step.backward else 1
            peaks[slot.rank] = max(peaks[slot.rank], held[slot.rank])
        return peaks


def replay(
    schedule: IntArray,
    *,
    forward_time: Number | Sequence[Number] = 1,
    backward_time: Number | Sequence[Number] = 2,
    send_time: Number = 0,
) -> Timeline:
    """Return when each step of a schedule runs.

    Parameters
    ----------
    schedule : ndarray of int, shape (p, steps, 3)
        As from `refimpl.parallel.schedules.pipeline_schedule`.
    forward_time, backward_time : number, or sequence of one a stage
        How long a micro-batch takes in a stage.
    send_time : number
        How long an activation or its gradient is on the way to another rank; sending keeps no rank busy.

    Returns
    -------
    Timeline
        Exact if the times are whole numbers or fractions.

    Raises
    ------
    OptionError
        If ranks would wait for each other for ever, or there are not as many times as stages.

    Examples
    --------
    >>> from refimpl.parallel.schedules import pipeline_schedule
    >>> replay(pipeline_schedule(schedule="gpipe", ranks=2, micro_batches=1), send_time=1).makespan
    8
    """
    ranks = len(schedule)
    rows = [steps_of(row) for row in schedule]
    stages = 1 + max((step.stage for steps in rows for step in steps), default=0)
    times = [_times(value, stages) for value in (forward_time, backward_time)]
    slots: list[list[Slot]] = [[] for _ in rows]
    ends: dict[Step, Number] = {}
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(rows):
            while len(slots[rank]) < len(steps):
                step = steps[len(slots[rank])]
                needs = list(step.needs(stages))
                if not all(need in ends for need in needs):
                    break
                free = slots[rank][-1].end if slots[rank] else 0
                away = ((need.stage - step.stage) % ranks != 0 for need in needs)
                arrivals = (ends[need] + send_time * far for need, far in zip(needs, away, strict=True))
                start = max([free, *arrivals])
                ends[step] = start + times[step.backward][step.stage]
                slots[rank].append(Slot(rank, step, start, ends[step]))
                moved = True
    for rank, steps in enumerate(rows):
        if len(slots[rank]) < len(steps):
            raise OptionError(f"schedule: rank {rank} waits for ever; {steps[len(slots[rank])]}")
    return Timeline(tuple(slot for row in slots for slot in row), ranks)


def _times(value: Number | Sequence[Number], stages: int) -> Sequence[Number]:
    if not isinstance(value, Sequence | np.ndarray):
        return [value] * stages
    if len(value) != stages:
        raise OptionError(f"times: expected one for each of {stages} stages, got {len(value)}")
    return list(value)
