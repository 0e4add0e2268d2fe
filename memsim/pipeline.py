"""Time and activations of a pipeline with equal stages, in closed form.

>>> print(pipeline_time(schedule="1f1b", ranks=8, micro_batches=32).explain()[1])
bubble: (p - 1)*(f + b) = (8 - 1)*(1 + 2) = 21 s
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity
from refimpl.errors import OptionError
from refimpl.parallel.schedules import SCHEDULES, Schedule
from refimpl.registry import Case, Source, technique

__all__ = ["pipeline_in_flight", "pipeline_time"]

_GPIPE = "Huang et al. 2019, arXiv:1811.06965, section 2.3"
_NARAYANAN = "Narayanan et al. 2021, arXiv:2104.04473, section 2.2"
_AXES = {"ranks": (1, 6), "rounds": (1, 4), "chunks": (2, 4)}
_EDGES: tuple[dict[str, Any], ...] = (
    {"ranks": 1, "schedule": "gpipe"},
    {"ranks": 4, "rounds": 1, "schedule": "1f1b"},
    {"ranks": 4, "rounds": 1, "chunks": 3, "schedule": "interleaved"},
)


def _sample(rng: np.random.Generator, *, schedule: str, ranks: int, rounds: int, chunks: int) -> Case:
    interleaves = schedule == "interleaved"
    micro_batches = rounds * ranks if interleaves else int(rng.integers(1, rounds * ranks + 1))
    options: dict[str, Any] = {"schedule": schedule, "ranks": ranks, "micro_batches": micro_batches}
    return Case((), options | {"chunks": chunks if interleaves else 1})


def _sample_time(rng: np.random.Generator, **shape: Any) -> Case:
    case = _sample(rng, **shape)
    forward, backward = (case.kwargs["chunks"] * int(time) for time in rng.integers(1, 9, 2))
    return case.replace(forward_time=forward, backward_time=backward)


def _sample_in_flight(rng: np.random.Generator, **shape: Any) -> Case:
    case = _sample(rng, **shape)
    return case.replace(rank=int(rng.integers(case.kwargs["ranks"])))


def _values(schedule: str, **numbers: Quantity) -> dict[str, Number]:
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule: expected one of {', '.join(SCHEDULES)}; got {schedule!r}")
    values = positive_values(**numbers)
    if (schedule == "interleaved") != (values["v"] > 1):
        raise OptionError(f"chunks: expected 2 or more if interleaved, 1 otherwise; got {numbers['v']}")
    if schedule == "interleaved" and values["m"] % values["p"]:
        raise OptionError(f"micro_batches: interleaved, they must divide by {values['p']} ranks")
    return values


@technique(
    "cost.pipeline",
    entries=(93,),
    kind="cost",
    source=Source("Narayanan et al. 2021", "arXiv:2104.04473", "sections 2.2.1 and 2.2.2"),
    axes=_AXES,
    options={"schedule": SCHEDULES},
    edges=_EDGES,
    sample=_sample_time,
    exact=True,
)
def pipeline_time(
    *,
    schedule: Schedule,
    ranks: Quantity,
    micro_batches: Quantity,
    chunks: Quantity = 1,
    forward_time: Quantity = 1,
    backward_time: Quantity = 2,
) -> Estimate:
    """Return the time of a step of a pipeline whose ranks have equal work: (m + (p-1)/v)(f + b).

    Parameters
    ----------
    schedule : {"gpipe", "1f1b", "interleaved"}
        As for `refimpl.parallel.schedules.pipeline_schedule`.
    ranks, micro_batches, chunks : int
        p, m, and v stages a rank.
    forward_time, backward_time : number
        f and b, seconds of one micro-batch in all stages of a rank.

    Returns
    -------
    Estimate
        Work and bubble of a rank, in seconds; their sum is the makespan.

    Raises
    ------
    OptionError
        If a number is not positive, or the schedule does not fit.

    Notes
    -----
    The bubble is the share (p-1)/(m + p-1) of the time, or interleaved (p-1)/(m v + p-1); of the work it is
    (p-1)/m and (p-1)/(m v).  `memsim.timeline.replay` tells what unequal stages or slow links make of it.

    References
    ----------
    .. [1] Huang et al., 2019, arXiv:1811.06965, section 2.3.
    .. [2] Narayanan et al., 2021, arXiv:2104.04473, sections 2.2.1 and 2.2.2.

    Examples
    --------
    >>> pipeline_time(schedule="interleaved", ranks=4, micro_batches=8, chunks=2, forward_time=2,
    ...               backward_time=4)["bubble"]
    9
    """
    values = _values(schedule, p=ranks, m=micro_batches, v=chunks, f=forward_time, b=backward_time)
    source = _GPIPE if schedule == "gpipe" else _NARAYANAN
    bubble = "(p - 1)*(f + b)" + "/v" * (schedule == "interleaved")
    return estimate(
        f"a step of a pipeline, {schedule}",
        [term("work", "m*(f + b)", values, "s", source), term("bubble", bubble, values, "s", source)],
        leaves_out="unequal stages, time on the wire, the optimizer",
    )


@technique(
    "cost.pipeline.in_flight",
    entries=(93,),
    kind="cost",
    source=Source("Korthikanti et al. 2022", "arXiv:2205.05198", "section 4.2.3, appendix C"),
    axes=_AXES,
    options={"schedule": SCHEDULES},
    edges=_EDGES,
    sample=_sample_in_flight,
    exact=True,
)
def pipeline_in_flight(
    *,
    schedule: Schedule,
    ranks: Quantity,
    micro_batches: Quantity,
    chunks: Quantity = 1,
    rank: int = 0,
) -> Estimate:
    """Return how many micro-batches of one stage a rank holds at most, gone forward and not yet back.

    Parameters
    ----------
    schedule, ranks, micro_batches, chunks
        As for `pipeline_time`.
    rank : int
        r, from 0.

    Returns
    -------
    Estimate
        A count; one is the activations of 1/v of a rank's layers for one micro-batch.

    Raises
    ------
    OptionError
        If a number is not positive, there is no such rank, or the schedule does not fit.

    Notes
    -----
    GPipe holds m, 1F1B p - r, interleaved 2(p-r-1) + (v-1)p + 1, and none more than there are.  Rank 0 of
    the last holds (p v + p - 1)/v micro-batches of all its layers: L(1 + (p-1)/(p v)) layers of one.

    References
    ----------
    .. [1] Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.3.

    Examples
    --------
    >>> [pipeline_in_flight(schedule=name, ranks=4, micro_batches=32).total for name in ("gpipe", "1f1b")]
    [32, 4]
    """
    values = _values(schedule, p=ranks, m=micro_batches, v=chunks)
    if not 0 <= rank < values["p"]:
        raise OptionError(f"rank: expected one below {values['p']}; got {rank}")
    values["r"] = rank
    formula = {"gpipe": "m", "1f1b": "p - r", "interleaved": "2*(p - r - 1) + (v - 1)*p + 1"}[schedule]
    held = term("held", formula, values, "1", "Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3")
    everything = term("held", "m*v", values, "1", "no more than there are")
    return estimate(
        f"activations in flight, {schedule}", [held if held.value <= everything.value else everything]
    )
