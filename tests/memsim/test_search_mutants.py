"""The search, the streams and MPI's collectives, each broken in one place, and the check that sees it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from memsim import mpi_collectives, step_timeline, streams
from memsim.planning import plan_space, planner
from memsim.planning.division import Division, reason_against
from memsim.planning.training_setting import Setting
from memsim.planning.training_step import training_step
from memsim.step_timeline import Durations
from refimpl.parallel.schedules import pipeline_schedule
from tests.parallel.monitored import ELEMENTS
from tests.parallel.test_monitored import COUNTED

SMALL = Setting("gpt2", "l4", 8, 16, 512)


def front() -> None:
    """Against all pairs, ties among them."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        time, memory = rng.integers(0, 6, (2, 12)).astype(float)
        pairs = set(zip(time, memory, strict=True))
        best = {a for a in pairs if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in pairs)}
        found = planner.pareto(time, memory)
        assert [(time[at], memory[at]) for at in found] == sorted(best)


def whole() -> None:
    """The best division is what one-by-one computation says it is, it fits, and slices change nothing."""
    grids = plan_space.space(SMALL)
    found = planner.merge(map(planner.search, planner.slices(grids, 3e9)))
    parts = planner.merge(map(planner.search, planner.slices(grids, 3e9, 1)))
    assert found.time.tolist() == parts.time.tolist()
    assert found.runnable == parts.runnable
    assert found.fitting < found.runnable
    for index, time, memory in zip(found.places, found.time, found.memory, strict=True):
        division = planner._division(grids, int(index))
        assert reason_against(SMALL, division) is None
        step = training_step(SMALL, division)
        assert float(step.time.total) == pytest.approx(time, rel=1e-12)
        assert float(step.memory.total) == pytest.approx(memory, rel=1e-12)
        assert memory <= 3e9


def layouts() -> None:
    for ranks in (6, 8, 12):
        setting = Setting("mixtral-8x7b", "h200", ranks, 24, 512)
        found = plan_space.layouts(setting.letters())
        divisions = [Division(*layout) for layout in found]
        assert len(set(found)) == len(found)
        every = [
            Division(t, p, d, c, e)
            for t in range(1, ranks + 1) for p in range(1, ranks + 1) for c in range(1, ranks + 1)
            for d in range(1, ranks + 1) for e in (1, 2, 4, 8)
            if t * p * c * d == ranks
            and reason_against(setting, Division(t, p, d, c, e)) is None
        ]  # fmt: skip
        assert set(every) <= set(divisions)
    for layers in (1, 12, 126):
        for stages in (1, 2, 5, 12):
            chunks = plan_space.chunkings(layers, stages)
            sizes = {-(-layers // (stages * v)) for v in chunks}
            assert len(sizes) == len(chunks)
            assert all(v * stages <= layers for v in chunks)


def closed_forms() -> None:
    for kind, p, m, v in (("gpipe", 3, 4, 1), ("1f1b", 3, 4, 1), ("interleaved", 2, 4, 3)):
        schedule = pipeline_schedule(schedule=kind, ranks=p, micro_batches=m, chunks=v)  # type: ignore[arg-type]
        durations = Durations(3, 5, 1, 2, 4, 7)
        events = streams.play(step_timeline.step_tasks(durations, schedule))
        assert streams.makespan(events) == m * (v * 11 + 11) + (p - 1) * 11
        spent = streams.usage(events)
        assert [found.exposed for found in spent] == [3 * m * v] * p
        assert all(sum(found) == streams.makespan(events) for found in spent)


def data_parallel() -> None:
    schedule = pipeline_schedule(schedule="1f1b", ranks=1, micro_batches=3)
    for zero, sent in enumerate((2 * 4, 4 + 2, 3 * 4 + 2, 3 * (2 * 2 + 4))):
        for pieces in (1, 2):
            durations = Durations(30, 60, gather=2, reduce=4)
            options: Any = {"zero": zero, "pieces": pieces}
            behind = streams.play(step_timeline.step_tasks(durations, schedule, overlap=False, **options))
            assert streams.makespan(behind) == 3 * 90 + sent
            beside = streams.play(step_timeline.step_tasks(durations, schedule, **options))
            shown = Fraction((2 if zero else 0) + (4 if zero else 8), pieces)
            assert streams.makespan(beside) == 3 * 90 + shown
            assert streams.usage(beside) == [(3 * 90, shown, 0)]
            # At most one piece is gathered ahead of the one at work.
            if zero == 3:
                gathers = [event for event in beside if event.task.name == "weights"]
                works = [event for event in beside if event.task.stream == streams.COMPUTE]
                assert all(gathers[k].start >= works[k - 2].end for k in range(2, len(works)))


def monitored() -> None:
    for (operation, algorithm, ranks), counted in COUNTED.items():
        messages = mpi_collectives.mpi_messages(operation, algorithm, elements=ELEMENTS, ranks=ranks)
        assert [(len(sizes), 4 * sum(sizes)) for sizes in messages] == counted
    uneven = mpi_collectives.mpi_messages("all_reduce", "ring", elements=10, ranks=4)
    assert [sum(sizes) for sizes in uneven] == [15, 16, 15, 14]


MUTANTS: list[tuple[ModuleType, str, str, str, Callable[[], None]]] = [
    (planner, "pareto", "held[1:] < lowest", "held[1:] <= lowest", front),
    (planner, "pareto", "(memory, time)", "(time, memory)", front),
    (planner, "search", "costs.valid & (", "(", whole),
    (planner, "search", " <= part.capacity", " <= 2 * part.capacity", whole),
    (planner, "search", "+ start", "", whole),
    (planner, "merge", "where[best]", "where[: len(best)]", whole),
    (planner, "slices", "first += grid.size", "pass", whole),
    (planner, "_division", "index -= grid.size", "pass", whole),
    (plan_space, "layouts", "if p <= L", "if L % p == 0", layouts),
    (plan_space, "layouts", "math.gcd(d, E)", "math.gcd(d, 2)", layouts),
    (plan_space, "chunkings", "v * stages <= layers", "v <= layers", layouts),
    (streams, "play", "max(starts[follower], end)", "end", closed_forms),
    (streams, "usage", "busy - computing", "busy", closed_forms),
    (streams, "_covered", "max(event.start, until)", "event.start", data_parallel),
    (step_timeline, "_Builder", "*self._tail[rank], *after", "*after", closed_forms),
    (step_timeline, "_Builder", "self._tail[rank] = (place,)", "pass", closed_forms),
    (step_timeline, "_Builder", "(2 if self._zero == 0 else 1)", "1", data_parallel),
    (step_timeline, "_Builder", "self._zero > 1 or step", "self._zero > 2 or step", data_parallel),
    (step_timeline, "_Builder", "gathered) - 1 - self._a", "gathered) - 3 - self._a", data_parallel),
    (step_timeline, "_Builder", "new = self._zero > 2 or", "new = self._zero > 9 or", data_parallel),
    (mpi_collectives, "_ring_all_reduce", "rank + 1 - step", "rank - step", monitored),
    (mpi_collectives, "_rabenseifner_all_reduce", "*core, n]", "*core]", monitored),
    (mpi_collectives, "_doubling_all_reduce", "(rounds + 1)", "rounds", monitored),
    (mpi_collectives, "_halved", "reversed(distances)", "distances", monitored),
    (mpi_collectives, "_butterfly_reduce_scatter", "if block != own", "", monitored),
    (mpi_collectives, "_binomial_broadcast", "rank < step and ", "", monitored),
]  # fmt: skip


def mutant(module: ModuleType, name: str, old: str, new: str) -> Any:
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert source.count(old) == 1, (name, old)
    space = dict(vars(module))
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), name, "exec"), space)
    return space[name]


@pytest.mark.parametrize(
    ("module", "name", "old", "new", "check"), MUTANTS, ids=[f"{m[1]}: {m[2]} -> {m[3]}" for m in MUTANTS]
)
def test_a_mutant_is_caught(
    module: ModuleType, name: str, old: str, new: str, check: Callable[[], None], monkeypatch: Any
) -> None:
    check()
    broken = mutant(module, name, old, new)
    original = getattr(module, name)
    monkeypatch.setattr(module, name, broken)
    if module is mpi_collectives:
        for pair, function in list(mpi_collectives.ALGORITHMS.items()):
            if function is original:
                monkeypatch.setitem(mpi_collectives.ALGORITHMS, pair, broken)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check()
