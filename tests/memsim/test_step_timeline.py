"""The timeline is the closed form where there is one, the other replay of a schedule, or within bounds."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.planning.division import Division
from memsim.planning.training_setting import AS_IN_2022, Setting
from memsim.planning.training_step import training_step
from memsim.step_timeline import Durations, durations_of, step_tasks, step_timeline
from memsim.streams import COMPUTE, Task, chrome_trace, makespan, play, usage
from memsim.timeline import replay
from refimpl.errors import OptionError
from refimpl.parallel.schedules import pipeline_schedule

TIMES = st.integers(1, 9)
FROM_0 = st.integers(0, 9)
SHAPES = st.tuples(
    st.sampled_from(("gpipe", "1f1b", "interleaved")), st.integers(1, 5), st.integers(1, 9), st.integers(2, 3)
)


def schedule_of(shape: tuple[Any, int, int, int]) -> tuple[Any, int, int, int]:
    kind, p, m, v = shape
    m, v = (p * (1 + m % 3), v) if kind == "interleaved" else (m, 1)
    return pipeline_schedule(schedule=kind, ranks=p, micro_batches=m, chunks=v), p, m, v


@settings(max_examples=150, deadline=None)
@given(SHAPES, TIMES, TIMES, FROM_0, FROM_0, FROM_0, FROM_0)
def test_pipelines_take_the_closed_form(
    shape: Any, f: int, b: int, linked: int, back: int, head: int, loss: int
) -> None:
    """m (slot + head) + (p - 1) slot / v: Narayanan et al. 2021, section 2.2, and the last rank's head."""
    schedule, p, m, v = schedule_of(shape)
    durations = Durations(f, b, linked, back, head, loss)
    events = play(step_tasks(durations, schedule))
    one = f + b + linked + back
    assert makespan(events) == m * (v * one + head + loss) + (p - 1) * one
    spent = usage(events)
    for rank, found in enumerate(spent):
        ends = rank == p - 1
        assert found.computing == m * (v * (f + b) + ends * (head + loss))
        assert found.exposed == m * v * (linked + back)
        assert sum(found) == makespan(events)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(2, 9), st.integers(2, 9), st.integers(0, 2))
def test_two_replays_of_a_schedule_agree(shape: Any, f: int, b: int, send: int) -> None:
    """`memsim.timeline` lets any number of sends run at once; they never queue if they are short."""
    schedule, p, _, v = schedule_of(shape)
    events = play(step_tasks(Durations(f, b, send=send), schedule))
    other = replay(schedule, forward_time=f, backward_time=b, send_time=send)
    assert makespan(events) == other.makespan
    ours = sorted((e.task.rank, e.start, e.end) for e in events if e.task.stream == COMPUTE)
    assert ours == sorted((slot.rank, slot.start, slot.end) for slot in other.slots)
    if p > 1 or v > 1:
        assert makespan(events) >= makespan(play(step_tasks(Durations(f, b), schedule)))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), TIMES, TIMES, FROM_0, FROM_0, st.integers(0, 3)
)
def test_data_parallelism_hides_behind_computation(
    zero: int, m: int, pieces: int, f: int, b: int, gather: int, reduce: int, prefetch: int
) -> None:
    schedule = pipeline_schedule(schedule="1f1b", ranks=1, micro_batches=m)
    durations = Durations(f, b, gather=gather, reduce=reduce)
    sent = (2 * reduce, reduce + gather, m * reduce + gather, m * (2 * gather + reduce))[zero]
    options: Any = {"zero": zero, "pieces": pieces, "prefetch": prefetch}
    behind = makespan(play(step_tasks(durations, schedule, overlap=False, **options)))
    assert behind == m * (f + b) + sent  # nothing hidden: the closed form with overlap 0
    time = makespan(play(step_tasks(durations, schedule, **options)))
    assert max(m * (f + b), sent) <= time <= behind
    further = {**options, "prefetch": prefetch + 1}
    assert makespan(play(step_tasks(durations, schedule, **further))) <= time
    # Fast enough links show at the ends only: the first gather, and the last reduction.
    quick = Durations(f, b, gather=Fraction(gather, 100), reduce=Fraction(reduce, 100))
    ends = (quick.gather if zero else 0) + quick.reduce * (2 if zero == 0 else 1)
    if prefetch:
        shown = makespan(play(step_tasks(quick, schedule, **options)))
        assert shown == m * (f + b) + ends / Fraction(pieces)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_step_of_a_model_is_between_its_bounds(zero: int) -> None:
    setting = Setting("llama-2-7b", "a100-80gb", 8, 32, 4096)
    division = Division(data=8, zero=zero)
    step = training_step(setting, division)
    played = step_timeline(step, division)
    one = durations_of(step, division)
    assert step.time.total <= played.time <= step.time.total + (one.gather + 2 * one.reduce) / 32
    assert played.bubble == 0
    assert played.mfu <= step.value("mfu")
    assert played.mfu * played.time == step.value("mfu") * step.time.total


def test_gpt_3_hides_its_sends() -> None:
    setting = Setting("gpt3-175b", "a100-80gb", accelerators=64, batch=64, sequence=2048, **AS_IN_2022)
    division = Division(tensor=8, pipeline=8, interleave=3, recompute="selective", sequence_parallel=True)
    step = training_step(setting, division)
    played = step_timeline(step, division)
    sends = step.value("hops_step")
    assert step.time.total - sends - step.value("bubble") < played.time < step.time.total
    shares = played.bubble + played.exposed
    assert 0 < played.bubble < shares < 1
    plain = step_timeline(
        training_step(setting, Division(8, 8, recompute="full")), Division(8, 8, recompute="full")
    )
    assert plain.bubble > 2 * played.bubble  # (p - 1)/m against (p - 1)/(v m)


def test_durations_of_chunks_add_up_to_those_of_a_micro_batch() -> None:
    setting = Setting("gpt2", "a100-80gb", 8, 16, 1024, latency=Fraction(1, 10**5))
    division = Division(tensor=2, pipeline=2, data=2, interleave=3, zero=1, recompute="full")
    step = training_step(setting, division)
    one = durations_of(step, division)
    worked = step.value("forward") + step.value("gradient") + step.value("again")
    assert 3 * (one.forward + one.backward) == worked
    assert 3 * (one.linked_forward + one.linked_backward) == step.value("tensor")
    assert 3 * (one.send + one.send) == step.value("hops")  # onward and back
    assert 3 * (one.gather + one.reduce) == step.value("data")
    assert one.head_forward + one.head_backward == step.value("head")


def test_stage_1_gathers_all_at_once_and_stage_3_a_piece_ahead() -> None:
    schedule = pipeline_schedule(schedule="1f1b", ranks=1, micro_batches=1)
    durations = Durations(40, 80, gather=4)
    for zero, starts in ((1, [0, 1, 2, 3]), (3, [0, 1, 11, 21])):
        events = play(step_tasks(durations, schedule, zero=zero, pieces=4))
        assert [event.start for event in events if event.task.name == "weights"][:4] == starts


def test_tasks_wait() -> None:
    tasks = [Task("a", 0, "x", 2, (1,)), Task("b", 1, "x", 3), Task("c", 0, "x", 1)]
    assert [(e.start, e.end) for e in play(tasks)] == [(3, 5), (0, 3), (5, 6)]
    assert makespan([]) == 0
    assert usage([]) == []
    for bad in (
        [Task("a", 0, "x", -1)],
        [Task("a", 0, "x", 1, (1,)), Task("b", 0, "x", 1)],
        [Task("a", 0, "x", 1, (1,)), Task("b", 1, "x", 1, (0,))],
    ):
        with pytest.raises(OptionError, match=r"duration from 0|waits for ever"):
            play(bad)
    with pytest.raises(OptionError, match="zero 0 to 3"):
        step_tasks(Durations(1, 1), pipeline_schedule(schedule="gpipe", ranks=1, micro_batches=1), zero=4)
    backwards_first = pipeline_schedule(schedule="gpipe", ranks=1, micro_batches=1)[:, ::-1]
    with pytest.raises(OptionError, match="for ever"):
        step_tasks(Durations(1, 1), backwards_first)


def test_a_trace_holds_every_event_in_microseconds() -> None:
    schedule = pipeline_schedule(schedule="1f1b", ranks=3, micro_batches=4)
    events = play(step_tasks(Durations(Fraction(1, 2), 1, send=Fraction(1, 4), optimizer=1), schedule))
    trace = json.loads(json.dumps(chrome_trace(events)))["traceEvents"]
    shown = [entry for entry in trace if entry["ph"] == "X"]
    assert len(shown) == len(events)
    assert {entry["pid"] for entry in shown} == {0, 1, 2}
    for entry, event in zip(shown, events, strict=True):
        assert entry["ts"] == event.start * 10**6
        assert entry["dur"] == event.task.duration * 10**6
    nothing = chrome_trace(play([Task("a", 0, COMPUTE, 0), Task("b", 0, COMPUTE, 1)]))["traceEvents"]
    assert [entry["name"] for entry in nothing if entry["ph"] == "X"] == ["b"]
    for rank in range(3):  # what one thread shows never overlaps
        for thread in {entry["tid"] for entry in shown if entry["pid"] == rank}:
            own = sorted((e["ts"], e["dur"]) for e in shown if (e["pid"], e["tid"]) == (rank, thread))
            assert all(a + d <= b for (a, d), (b, _) in itertools.pairwise(own))
