"""Laws of a pipeline's cost: closed forms are what the schedules do in time."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from memsim.estimate import Estimate
from memsim.laws.comparison import same
from memsim.timeline import replay
from refimpl.parallel.schedules import pipeline_schedule
from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Estimate]
SHAPE = ("schedule", "ranks", "micro_batches", "chunks")


@law("cost.pipeline")
def the_makespan_is_that_of_the_schedule(f: Model, case: Case, _close: object) -> None:
    """Replayed with equal stages, the schedule ends after work and bubble."""
    chunks = case.kwargs["chunks"]
    schedule = pipeline_schedule(**{name: case.kwargs[name] for name in SHAPE})
    times = {name: Fraction(case.kwargs[name], chunks) for name in ("forward_time", "backward_time")}
    line = replay(schedule, **times)
    found = case.call(f)
    same(found.total, line.makespan, "time of a step")
    same(Fraction(found["bubble"], 1) / found.total, line.idle_share, "bubble's share")


@law("cost.pipeline")
def the_bubble_is_a_share_of_ranks_and_micro_batches(f: Model, case: Case, _close: object) -> None:
    """Idle is (p-1)/(m v + p-1) of the time: none on one rank, and less the more micro-batches there are."""
    p, m, v = (case.kwargs[name] for name in ("ranks", "micro_batches", "chunks"))
    shares = []
    for times in (1, 10):
        found = case.replace(micro_batches=times * m).call(f)
        shares.append(Fraction(found["bubble"], 1) / found.total)
        same(shares[-1], Fraction(p - 1, times * m * v + p - 1), "bubble's share")
    require(shares[1] < shares[0] or p == 1, f"more micro-batches, more bubble: {shares}")
    same(case.replace(ranks=1).call(f)["bubble"], 0, "bubble of one rank")


@law("cost.pipeline.in_flight")
def no_rank_holds_more_than_the_first(f: Model, case: Case, _close: object) -> None:
    """Later ranks hold no more, and more micro-batches make 1F1B hold no more than p on any rank."""
    p, v = case.kwargs["ranks"], case.kwargs["chunks"]
    held = [case.replace(rank=rank).call(f).total for rank in range(p)]
    require(held == sorted(held, reverse=True), f"activations in flight grow with the rank: {held}")
    many = case.replace(micro_batches=50 * p, rank=0).call(f).total
    same(many, {"gpipe": 50 * p, "1f1b": p, "interleaved": p * v + p - 1}[case.kwargs["schedule"]], "held")


@law("cost.pipeline.in_flight")
def held_as_the_schedule_holds(f: Model, case: Case, _close: object) -> None:
    """A replay of the schedule holds as many at its fullest."""
    line = replay(pipeline_schedule(**{name: case.kwargs[name] for name in SHAPE}))
    same(case.call(f).total, line.in_flight[case.kwargs["rank"]], "activations in flight")
