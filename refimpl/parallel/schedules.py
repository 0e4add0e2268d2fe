"""Pipeline schedules as data: for each rank the steps that it runs, in order.

The model is cut into p v stages, and rank r has the stages r, r + p, r + 2p, ...  A step is one micro-batch
through one stage, forward or backward.  `refimpl.parallel.pipeline` executes a schedule, `memsim.timeline`
replays it in time, and `check_schedule` proves that it can be executed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from refimpl.errors import FrugalError, OptionError
from refimpl.numerics import IntArray
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, whole

__all__ = [
    "SCHEDULES",
    "Schedule",
    "ScheduleError",
    "Step",
    "check_schedule",
    "pipeline_schedule",
    "planned_steps",
    "steps_of",
]

Schedule: TypeAlias = Literal["gpipe", "1f1b", "interleaved"]
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved")


class ScheduleError(FrugalError, ValueError):
    """A schedule that cannot be executed, or that holds more than it may."""


class Step(NamedTuple):
    """One micro-batch through one stage."""

    backward: bool
    micro: int
    stage: int

    def __str__(self) -> str:
        return (
            f"{'backward' if self.backward else 'forward'} of micro-batch {self.micro} in stage {self.stage}"
        )

    def needs(self, stages: int) -> Iterator[Step]:
        """Yield the steps whose results it takes.

        >>> [str(step) for step in Step(True, 0, 1).needs(2)]
        ['forward of micro-batch 0 in stage 1']
        """
        if self.backward:
            yield self._replace(backward=False)
        before = self.stage + 1 if self.backward else self.stage - 1
        if 0 <= before < stages:
            yield self._replace(stage=before)


def steps_of(row: IntArray) -> list[Step]:
    """Return one rank's steps of an array as `pipeline_schedule` returns it.

    >>> steps_of(pipeline_schedule(schedule="gpipe", ranks=1, micro_batches=1)[0])
    [Step(backward=False, micro=0, stage=0), Step(backward=True, micro=0, stage=0)]
    """
    return [Step(bool(backward), int(micro), int(stage)) for backward, micro, stage in row]


def _all_forward(rank: int, micro_batches: int) -> list[Step]:
    """GPipe: every micro-batch forward, then every one backward, the last first."""
    forward = [Step(False, micro, rank) for micro in range(micro_batches)]
    return forward + [step._replace(backward=True) for step in reversed(forward)]


def _one_by_one(forward: Sequence[Step], backward: Sequence[Step], warm_up: int) -> list[Step]:
    """Steps forward to fill the pipeline, then one forward and one backward in turn, and what is left."""
    first = min(warm_up, len(forward))
    turns = [step for pair in zip(forward[first:], backward, strict=False) for step in pair]
    return [*forward[:first], *turns, *backward[len(forward) - first :]]


def _interleaved(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[Step]:
    """Groups of p micro-batches pass the rank's stages in turn; backward its last stage comes first."""

    def steps(backward: bool) -> list[Step]:
        order = range(chunks - 1, -1, -1) if backward else range(chunks)
        return [
            Step(backward, micro, chunk * ranks + rank)
            for start in range(0, micro_batches, ranks)
            for chunk in order
            for micro in range(start, start + ranks)
        ]

    return _one_by_one(steps(False), steps(True), 2 * (ranks - rank - 1) + (chunks - 1) * ranks)


def _sample(
    rng: np.random.Generator,  # noqa: ARG001 (the contract)
    *,
    schedule: str,
    ranks: int,
    rounds: int,
    rest: int,
    chunks: int,
) -> Case:
    # Interleaving wants whole rounds of micro-batches, and several stages a rank.
    interleaves = schedule == "interleaved"
    micro_batches = max(rounds * ranks if interleaves else rounds * ranks + rest - 2, 1)
    options: dict[str, Any] = {"ranks": ranks, "micro_batches": micro_batches}
    return Case((), {"schedule": schedule, **options, "chunks": max(chunks, 2) if interleaves else 1})


@technique(
    "parallel.pipeline.schedule",
    entries=(93,),
    kind="data",
    source=Source("Narayanan et al. 2021", "arXiv:2104.04473", "section 2.2, Figures 3 and 4"),
    axes={"ranks": (1, 5), "rounds": (1, 3), "rest": (0, 3), "chunks": (2, 3)},
    options={"schedule": SCHEDULES},
    edges=(
        {"ranks": 1, "rounds": 1, "schedule": "interleaved"},
        {"ranks": 4, "rounds": 1, "rest": 0, "schedule": "1f1b"},
        {"ranks": 4, "rounds": 2, "schedule": "interleaved"},
        {"ranks": 5, "rounds": 1, "rest": 3, "schedule": "gpipe"},
    ),
    sample=_sample,
    exact=True,
)
def pipeline_schedule(*, schedule: Schedule, ranks: int, micro_batches: int, chunks: int = 1) -> IntArray:
    """Return the steps of every rank, in order.

    Parameters
    ----------
    schedule : {"gpipe", "1f1b", "interleaved"}
        GPipe: all micro-batches forward, then all backward.  1F1B: after a warm-up one forward and one
        backward in turn.  Interleaved 1F1B: the same over several stages a rank.
    ranks, micro_batches : int
        p and m.
    chunks : int
        v, stages a rank: at least 2 if they are interleaved, otherwise 1.

    Returns
    -------
    ndarray of int, shape (p, 2 m v, 3)
        A step is a row: 0 forward or 1 backward, the micro-batch, the stage.

    Raises
    ------
    OptionError
        If there is no such schedule, a number is out of range, or interleaved micro-batches do not divide by
        the ranks.

    References
    ----------
    .. [1] Huang et al., 2019, arXiv:1811.06965, Figure 2 (GPipe).
    .. [2] Narayanan et al., 2019, "PipeDream", doi:10.1145/3341301.3359646, section 3.2 (1F1B).
    .. [3] Narayanan et al., 2021, arXiv:2104.04473, section 2.2.2 (interleaved).

    Examples
    --------
    >>> for row in pipeline_schedule(schedule="1f1b", ranks=2, micro_batches=2):
    ...     print([f"{'FB'[step.backward]}{step.micro}" for step in steps_of(row)])
    ['F0', 'F1', 'B0', 'B1']
    ['F0', 'B0', 'F1', 'B1']
    """
    p, m, v = whole("ranks", ranks), whole("micro_batches", micro_batches), whole("chunks", chunks)
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule: expected one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if (schedule == "interleaved") != (v > 1):
        raise OptionError(
            f"chunks: expected 2 or more to interleave, and otherwise 1; got {v} for {schedule}"
        )
    if schedule == "interleaved" and m % p:
        raise OptionError(f"micro_batches: interleaved, they must divide by {p} ranks; got {m}")
    rows = []
    for rank in range(p):
        if schedule == "gpipe":
            steps = _all_forward(rank, m)
        elif schedule == "1f1b":
            forward = [Step(False, micro, rank) for micro in range(m)]
            steps = _one_by_one(forward, [step._replace(backward=True) for step in forward], p - rank - 1)
        else:
            steps = _interleaved(rank, p, m, v)
        rows.append([tuple(map(int, step)) for step in steps])
    return np.array(rows, np.int64)


def check_schedule(
    schedule: IntArray, *, micro_batches: int, chunks: int = 1, in_flight: Sequence[int] | None = None
) -> list[int]:
    """Prove that ranks can execute a schedule, and return how many activations each holds at most.

    Parameters
    ----------
    schedule : ndarray of int, shape (p, steps, 3)
        As from `pipeline_schedule`, or anyone's.
    micro_batches, chunks : int
        m and v.
    in_flight : sequence of int, optional
        How many activations each rank has room for.

    Returns
    -------
    list of int
        For each rank the most pairs of stage and micro-batch that went forward and not yet back.

    Raises
    ------
    ScheduleError
        If it is no list of steps for each rank; if a step is missing, doubled, or on a rank that has not its
        stage; if ranks would wait for each other for ever; or if a rank holds more than it has room for.
    OptionError
        If a number is out of range.

    Examples
    --------
    >>> check_schedule(pipeline_schedule(schedule="1f1b", ranks=3, micro_batches=8), micro_batches=8)
    [3, 2, 1]
    >>> backwards_first = pipeline_schedule(schedule="gpipe", ranks=1, micro_batches=1)[:, ::-1]
    >>> check_schedule(backwards_first, micro_batches=1)
    Traceback (most recent call last):
    refimpl.parallel.schedules.ScheduleError: rank 0 waits: backward of micro-batch 0 in stage 0
    """
    plan = as_array("schedule", schedule)
    whole_numbers = np.issubdtype(plan.dtype, np.integer)
    if not (whole_numbers and plan.ndim == 3 and plan.shape[2] == 3 and len(plan)):
        raise ScheduleError(
            f"schedule: expected whole numbers (ranks, steps, 3), got {plan.dtype} of shape {plan.shape}"
        )
    if not np.isin(plan[..., 0], (0, 1)).all():
        raise ScheduleError("schedule: expected 0, forward, or 1, backward, at the start of each step")
    ranks = len(plan)
    if in_flight is not None and len(in_flight) != ranks:
        raise ScheduleError(f"in_flight: expected a number for each of {ranks} ranks, got {len(in_flight)}")
    micro_batches, stages = whole("micro_batches", micro_batches), ranks * whole("chunks", chunks)
    rows = [steps_of(row) for row in plan]
    _each_step_once(rows, micro_batches, stages)
    done: set[Step] = set()
    at, held, peaks = [0] * ranks, [0] * ranks, [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(rows):
            while at[rank] < len(steps) and done.issuperset(steps[at[rank]].needs(stages)):
                step = steps[at[rank]]
                done.add(step)
                at[rank] += 1
                moved = True
                held[rank] += -1 if step.backward else 1
                peaks[rank] = max(peaks[rank], held[rank])
    stuck = [f"rank {r} waits: {rows[r][at[r]]}" for r in range(ranks) if at[r] < len(rows[r])]
    if stuck:
        raise ScheduleError("; ".join(stuck))
    for rank, (peak, room) in enumerate(zip(peaks, peaks if in_flight is None else in_flight, strict=True)):
        if peak > room:
            raise ScheduleError(f"rank {rank} holds {peak} activations at once; it has room for {room}")
    return peaks


def planned_steps(
    schedule: Schedule | IntArray, *, ranks: int, micro_batches: int, chunks: int
) -> list[list[Step]]:
    """Return the steps of each rank by a schedule that is named, or given and found to be executable.

    Parameters
    ----------
    schedule : {"gpipe", "1f1b", "interleaved"} or ndarray of int, shape (p, steps, 3)
        A name that `pipeline_schedule` knows, or what `check_schedule` accepts.
    ranks, micro_batches, chunks : int
        p, m and v.

    Raises
    ------
    ScheduleError
        If the schedule is given, and not one of p ranks that can execute it.
    OptionError
        As for `pipeline_schedule`.

    Examples
    --------
    >>> planned_steps(np.array([[[0, 0, 0], [1, 0, 0]]]), ranks=1, micro_batches=1, chunks=1)
    [[Step(backward=False, micro=0, stage=0), Step(backward=True, micro=0, stage=0)]]
    """
    if isinstance(schedule, str):
        plan = pipeline_schedule(schedule=schedule, ranks=ranks, micro_batches=micro_batches, chunks=chunks)
        return [steps_of(row) for row in plan]
    held = check_schedule(schedule, micro_batches=micro_batches, chunks=chunks)
    if len(held) != ranks:
        raise ScheduleError(f"schedule: expected steps of {ranks} ranks, got those of {len(held)}")
    return [steps_of(row) for row in schedule]


def _each_step_once(rows: Sequence[Sequence[Step]], micro_batches: int, stages: int) -> None:
    for rank, steps in enumerate(rows):
        wanted = Counter(
            Step(backward, micro, stage)
            for backward in (False, True)
            for micro in range(micro_batches)
            for stage in range(rank, stages, len(rows))
        )
        found = Counter(steps)
        if found != wanted:
            wrong = sorted((found - wanted) + (wanted - found))
            raise ScheduleError(f"rank {rank} must run each of its steps once; see {wrong[0]}")
