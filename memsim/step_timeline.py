"""A step of training played on streams: a pipeline's schedule, with what its ranks send beside it.

One rank stands for all that do the same: a rank of each pipeline stage.  Tensor and expert parallelism stop
the computation, so they follow it; sends to the next stage, gathered weights and reduced gradients have
streams of their own and are waited for where they are needed.

>>> from memsim.planning.division import Division
>>> from memsim.planning.training_setting import AS_IN_2022, Setting
>>> from memsim.planning.training_step import training_step
>>> setting = Setting("gpt3-175b", "a100-80gb", accelerators=64, batch=64, sequence=2048, **AS_IN_2022)
>>> paper = Division(tensor=8, pipeline=8, interleave=3, recompute="selective", sequence_parallel=True)
>>> step = training_step(setting, paper)
>>> played = step_timeline(step, paper)
>>> played.time < step.time.total  # sends to the next stage hide behind computation here
True
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from memsim.planning.division import Division
from memsim.planning.training_step import TrainingStep
from memsim.streams import COMPUTE, Event, Task, makespan, play, usage
from memsim.units import Number
from refimpl.errors import OptionError
from refimpl.numerics import IntArray
from refimpl.parallel.schedules import Schedule, Step, pipeline_schedule, steps_of

__all__ = ["Durations", "StepTimeline", "durations_of", "step_tasks", "step_timeline"]


class Durations(NamedTuple):
    """How long things take, of one micro-batch in one stage of the model: a chunk of a rank.

    Attributes
    ----------
    forward, backward : number
        Computation, recomputation within the backward one.
    linked_forward, linked_backward : number
        What the computation waits for: tensor, expert and context parallelism.
    head_forward, head_backward : number
        Head and loss, after the last stage.
    send : number
        To the next stage.
    gather, reduce : number
        Weights of a stage gathered, its gradients reduced among data-parallel ranks.
    optimizer : number
        Of a rank, once a step.
    """

    forward: Number
    backward: Number
    linked_forward: Number = 0
    linked_backward: Number = 0
    head_forward: Number = 0
    head_backward: Number = 0
    send: Number = 0
    gather: Number = 0
    reduce: Number = 0
    optimizer: Number = 0


class StepTimeline(NamedTuple):
    """A step that was played.

    Attributes
    ----------
    events : tuple of Event
        What every rank does when.
    time : number
        Until the last rank is done.
    bubble, exposed : Fraction
        Shares of all ranks' time: doing nothing, and communicating without computing.
    mfu, hfu : Fraction
        Utilization, without and with recomputed operations.
    """

    events: tuple[Event, ...]
    time: Number
    bubble: Fraction
    exposed: Fraction
    mfu: Fraction
    hfu: Fraction


def durations_of(step: TrainingStep, division: Division) -> Durations:
    """Return the durations of a stage of the model, from the quantities of a step."""
    v = division.interleave

    def of(name: str) -> Number:
        return step.quantities[name].value

    linked = of("tensor_f") + of("expert_f")
    after = of("tensor") + of("expert") + of("context") - linked
    return Durations(
        forward=Fraction(of("forward")) / v,
        backward=Fraction(of("gradient") + of("again")) / v,
        linked_forward=Fraction(linked) / v,
        linked_backward=Fraction(after) / v,
        head_forward=of("f_head"),
        head_backward=of("g_head"),
        send=Fraction(of("hops")) / (2 * v),
        gather=Fraction(of("gather_d")) / v,
        reduce=Fraction(of("reduce_d")) / v,
        optimizer=of("optimizer"),
    )


def step_tasks(
    durations: Durations,
    schedule: IntArray,
    *,
    zero: int = 0,
    pieces: int = 1,
    prefetch: int = 1,
    overlap: bool = True,
) -> list[Task]:
    """Return the tasks of a step.

    Parameters
    ----------
    durations : Durations
        How long things take.
    schedule : ndarray of int, shape (p, steps, 3)
        As from `refimpl.parallel.schedules.pipeline_schedule`.
    zero : {0, 1, 2, 3}
        Stage of ZeRO: what is gathered and reduced, and for every micro-batch or once.  At stage 0 the
        gradients are reduced and gathered, in time of two reductions.
    pieces : int
        Into how many layers, gathered and reduced one by one, a stage of the model is cut.
    prefetch : int
        At stage 3, how many pieces are gathered ahead of the one at work.
    overlap : bool
        Whether gathers and reductions run beside the computation, or as part of it.

    Returns
    -------
    list of Task

    Raises
    ------
    OptionError
        If a number is out of range.
    """
    if zero not in (0, 1, 2, 3) or pieces < 1 or prefetch < 0:
        raise OptionError(
            f"expected zero 0 to 3, pieces from 1, prefetch from 0; got {zero, pieces, prefetch}"
        )
    rows = [steps_of(row) for row in schedule]
    builder = _Builder(durations, rows, zero, pieces, prefetch, overlap)
    at = [0] * len(rows)
    while any(place < len(steps) for place, steps in zip(at, rows, strict=True)):
        before = list(at)
        for rank, steps in enumerate(rows):
            while at[rank] < len(steps) and builder.knows(steps[at[rank]]):
                builder.step(rank, steps[at[rank]])
                at[rank] += 1
        if at == before:
            raise OptionError("schedule: ranks wait for each other for ever")
    for rank in range(len(rows)):
        builder.finish(rank)
    return builder.tasks


class _Builder:
    """The tasks so far, and where those stand that later ones wait for."""

    def __init__(
        self,
        durations: Durations,
        rows: Sequence[Sequence[Step]],
        zero: int,
        pieces: int,
        prefetch: int,
        overlap: bool,
    ) -> None:
        self.tasks: list[Task] = []
        self._durations, self._zero, self._pieces, self._overlap = durations, zero, pieces, overlap
        self._stages = 1 + max(step.stage for steps in rows for step in steps)
        self._given: dict[Step, int] = {}  # where what a step gives to the next one is there
        self._last = {step for steps in rows for step in {s.stage: s for s in steps if s.backward}.values()}
        self._tail: list[tuple[int, ...]] = [() for _ in rows]  # what the next computation comes behind
        self._worked: list[list[int]] = [[] for _ in rows]
        self._gathers = [self._uses(steps) for steps in rows]
        self._gathered: list[list[int]] = [[] for _ in rows]
        self._ahead = prefetch if zero > 2 else len(self._gathers[0])

    def _uses(self, steps: Sequence[Step]) -> list[bool]:
        """Return, piece by piece, whether weights must be gathered for it: always, at first, or never."""
        known: set[tuple[int, int]] = set()
        uses = []
        for step in steps:
            for piece in range(self._pieces):
                place = (step.stage, -1 - piece if step.backward else piece - self._pieces)
                new = self._zero > 2 or (self._zero > 0 and place not in known)
                uses.append(new and bool(self._durations.gather))
                known.add(place)
        return uses

    def knows(self, step: Step) -> bool:
        return all(need in self._given for need in step.needs(self._stages))

    def _add(self, name: str, rank: int, stream: str, duration: Number, *after: int) -> int:
        self.tasks.append(Task(name, rank, stream, duration, tuple(dict.fromkeys(after))))
        return len(self.tasks) - 1

    def _block(self, name: str, rank: int, stream: str, duration: Number, *after: int) -> int:
        """Add a task that comes behind all that the rank computed, and before all that it will."""
        place = self._add(name, rank, stream, duration, *self._tail[rank], *after)
        self._tail[rank] = (place,)
        return place

    def _data(self, name: str, rank: int, duration: Number, *after: int) -> int:
        one = Fraction(duration) / self._pieces
        return (self._add if self._overlap else self._block)(name, rank, "data", one, *after)

    def step(self, rank: int, step: Step) -> None:
        """Add a micro-batch through a stage: what it needs, its pieces, what they give."""
        times, text = self._durations, str(step)
        needs = [self._given[need] for need in step.needs(self._stages)]
        ends = step.stage == self._stages - 1
        if step.backward and ends and times.head_backward:
            needs = [self._block(f"head, {text}", rank, COMPUTE, times.head_backward, *needs)]
        work, links = times.forward, times.linked_forward
        if step.backward:
            work, links = times.backward, times.linked_backward
        for _ in range(self._pieces):
            needs += self._gather(rank)
            place = self._block(text, rank, COMPUTE, Fraction(work) / self._pieces, *needs)
            self._worked[rank].append(place)
            if links:
                place = self._block(f"links, {text}", rank, "links", Fraction(links) / self._pieces)
            needs = []
            if step.backward and times.reduce and (self._zero > 1 or step in self._last):
                each = times.reduce * (2 if self._zero == 0 else 1)
                self._data(f"gradients, {text}", rank, each, place)
        if not step.backward and ends and times.head_forward:
            place = self._block(f"head, {text}", rank, COMPUTE, times.head_forward)
        ahead = step.stage - 1 if step.backward else step.stage + 1
        if 0 <= ahead < self._stages and times.send and len(self._tail) > 1:
            stream = "send back" if step.backward else "send"
            place = self._add(f"send, {text}", rank, stream, times.send, place)
        self._given[step] = place

    def _gather(self, rank: int) -> list[int]:
        """Issue gathers up to some pieces ahead, and return the one that the next piece needs."""
        worked, gathered = self._worked[rank], self._gathered[rank]
        while len(gathered) < min(len(worked) + 1 + self._ahead, len(self._gathers[rank])):
            behind = len(gathered) - 1 - self._ahead
            after = [worked[behind]] if behind >= 0 else []
            due = self._gathers[rank][len(gathered)]
            gathered.append(self._data("weights", rank, self._durations.gather, *after) if due else -1)
        return [place for place in [gathered[len(worked)]] if place >= 0]

    def finish(self, rank: int) -> None:
        """Add the optimizer, behind everything that the rank computes and reduces."""
        reduced = [at for at, task in enumerate(self.tasks) if task.rank == rank and task.stream == "data"]
        if self._durations.optimizer:
            self._block("optimizer", rank, COMPUTE, self._durations.optimizer, *reduced[-1:])


def step_timeline(
    step: TrainingStep,
    division: Division,
    *,
    schedule: Schedule | None = None,
    pieces: int | None = None,
    prefetch: int = 1,
) -> StepTimeline:
    """Return a step of training, played.

    Parameters
    ----------
    step : TrainingStep
        Its quantities.
    division : Division
        The division it was computed for.
    schedule : {"gpipe", "1f1b", "interleaved"}, optional
        Of the pipeline: default 1F1B, interleaved where a stage has several chunks.
    pieces : int, optional
        Pieces of a stage of the model that are gathered and reduced one by one: by default its layers if
        there are data-parallel ranks, and otherwise one.
    prefetch : int
        Pieces gathered ahead at stage 3 of ZeRO.

    Returns
    -------
    StepTimeline

    Notes
    -----
    With nothing sent to the next stage and one chunk, or no head, `time` is the closed form of
    `planning.training_step` exactly.  Gathers and reductions hide behind what really runs beside them, so the
    first gather and the last reduction show, which the closed form, a bound, hides.
    """
    v = division.interleave
    chosen: Schedule = schedule or ("interleaved" if v > 1 else "1f1b")
    micro_batches = int(step.value("m"))
    rows = pipeline_schedule(schedule=chosen, ranks=division.pipeline, micro_batches=micro_batches, chunks=v)
    durations = durations_of(step, division)
    if pieces is None:
        pieces = int(step.value("l_chunk")) if durations.reduce else 1
    tasks = step_tasks(durations, rows, zero=division.zero, pieces=pieces, prefetch=prefetch)
    events = play(tasks)
    time = makespan(events)
    spent = usage(events)
    ranks = len(spent)
    mfu = Fraction(step.value("mfu")) * step.time.total / time
    hfu = Fraction(step.value("hfu")) * step.time.total / time
    idle, exposed = (Fraction(sum(getattr(one, name) for one in spent)) for name in ("idle", "exposed"))
    return StepTimeline(tuple(events), time, idle / (ranks * time), exposed / (ranks * time), mfu, hfu)
