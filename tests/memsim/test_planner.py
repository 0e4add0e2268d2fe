"""The search: every division it computes is the one-by-one computation, and nothing it keeps is beaten."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.planning.division import Division, reason_against
from memsim.planning.plan_space import Grid, divisors, space
from memsim.planning.planner import merge, pareto, plan, search, slices
from memsim.planning.training_setting import AS_IN_2022, Setting
from memsim.planning.training_step import training_step
from refimpl.errors import OptionError

GPT3 = Setting("gpt3-175b", "a100-80gb", accelerators=64, batch=64, sequence=2048, **AS_IN_2022)
PAPER = Division(tensor=8, pipeline=8, interleave=3, recompute="selective", sequence_parallel=True)
SETTINGS = (
    GPT3,
    Setting("llama-2-70b", "h100-sxm", 48, 96, 4096, latency=5e-6, network=0.7),
    Setting("deepseek-v2", "h200", 128, 256, 4096, overlap=0.5, states="zero"),
    Setting("mixtral-8x7b", "a100-40gb", 24, 48, 1536, compute=0.6, memory=0.8, dropout=True),
    Setting("gpt2", "l40s", 6, 30, 1024, attention="standard"),
)
PRECISIONS = {"h100-sxm": ("bf16", "fp8", "fp32"), "h200": ("bf16", "fp8")}


def grids(setting: Setting) -> list[Grid]:
    return space(setting, precisions=PRECISIONS.get(setting.hardware, ("bf16", "fp32")))


SPACES = [grids(setting) for setting in SETTINGS]


@settings(max_examples=120, deadline=None)
@given(st.integers(0, len(SETTINGS) - 1), st.randoms(use_true_random=False))
def test_a_cell_of_the_grid_is_the_one_configuration(which: int, random: object) -> None:
    setting = SETTINGS[which]
    grid = random.choice(SPACES[which])  # type: ignore[attr-defined]
    layout = random.randrange(len(grid.layouts))  # type: ignore[attr-defined]
    costs = grid.costs(layout, layout + 1)
    inside = costs.valid.size
    at = random.randrange(inside)  # type: ignore[attr-defined]
    division = grid.division(layout * inside + at)
    assert costs.valid.ravel()[at] == (reason_against(setting, division) is None)
    ours = np.flatnonzero(costs.valid.ravel())
    if len(ours):
        at = int(random.choice(ours))  # type: ignore[attr-defined]
        division = grid.division(layout * inside + at)
        step = training_step(setting, division)
        # The same formulas, some 100 roundings apart.
        assert costs.time.ravel()[at] == pytest.approx(float(step.time.total), rel=1e-13)
        assert costs.memory.ravel()[at] == pytest.approx(float(step.memory.total), rel=1e-13)


def test_the_space_misses_nothing() -> None:
    """Every combination of small numbers, one by one, against what the grids call runnable."""
    setting = Setting("gpt2", "a100-80gb", 4, 4, 1024, attention="standard")
    sizes = (1, 2, 3, 4)
    found = set()
    for t, p, d, c in itertools.product(sizes, repeat=4):
        if t * p * d * c != 4:
            continue
        for v, b, z in itertools.product(divisors(12), (1, 2, 4), range(4)):
            for r, q, o in itertools.product(("none", "selective", "full"), (False, True), (False, True)):
                division = Division(t, p, d, c, 1, v, b, z, r, q, o)
                if reason_against(setting, division) is None:
                    found.add(division)
    ours = [
        grid.division(int(at))
        for grid in space(setting)
        for at in np.flatnonzero(grid.costs(0, len(grid.layouts)).valid)
    ]
    assert len(ours) == len(set(ours))
    assert set(ours) == found


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_pareto_against_pairs(pairs: list[tuple[int, int]]) -> None:
    time = np.array([pair[0] for pair in pairs], np.float64)
    memory = np.array([pair[1] for pair in pairs], np.float64)
    kept = [(int(time[at]), int(memory[at])) for at in pareto(time, memory)]
    best = {a for a in pairs if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in pairs)}
    assert kept == sorted(best)


@pytest.mark.parametrize("cells", [1, 1 << 12, 1 << 20])
def test_slices_change_nothing(cells: int) -> None:
    setting = SETTINGS[1]
    whole = merge(map(search, slices(SPACES[1], 80e9)))
    parts = merge(map(search, reversed(slices(SPACES[1], 80e9, cells))))
    assert (parts.runnable, parts.fitting) == (whole.runnable, whole.fitting)
    assert parts.time.tolist() == whole.time.tolist()
    assert parts.memory.tolist() == whole.memory.tolist()
    assert plan(setting, SPACES[1]).best.time == whole.time[0]


@pytest.mark.parametrize("capacity", [1.4e9, 80e9])
def test_the_front_is_that_of_all_divisions_one_by_one(capacity: float) -> None:
    setting = Setting("gpt2", "a100-80gb", 2, 2, 1024, attention="standard", latency=1e-5)
    kept = []
    for t, p, d, c in [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]:
        for v, b, z in itertools.product(divisors(6), (1, 2), range(4)):
            for r, q, o in itertools.product(("none", "selective", "full"), (False, True), (False, True)):
                division = Division(t, p, d, c, 1, v, b, z, r, q, o)
                if reason_against(setting, division) is None:
                    step = training_step(setting, division)
                    kept.append((step.time.total, step.memory.total))
    fitting = {pair for pair in kept if pair[1] <= capacity}
    best = {a for a in fitting if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in fitting)}
    found = plan(setting, capacity=capacity)
    assert found.runnable == len(kept)
    assert (capacity < 80e9) == (len(fitting) < len(set(kept)))
    front = [training_step(setting, item.division) for item in found.front]
    assert {(step.time.total, step.memory.total) for step in front} == best
    assert found.step.time.total == min(time for time, _ in fitting)


def test_gpt_3_is_planned_at_least_as_well_as_its_authors_did() -> None:
    found = plan(GPT3)
    assert 0 < found.fitting < found.runnable < found.grid
    paper = training_step(GPT3, PAPER)
    assert paper.memory.total < 80e9
    assert found.best.time <= paper.time.total
    times = [item.time for item in found.front]
    sizes = [item.memory for item in found.front]
    assert times == sorted(times)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= 80e9
    for item in found.front:
        step = training_step(GPT3, item.division)
        assert item.time == pytest.approx(float(step.time.total), rel=1e-13)
    assert found.step.time.total == training_step(GPT3, found.best.division).time.total


def test_the_paper_s_plan_is_on_the_grid_and_beaten_only_by_what_it_lacks() -> None:
    """With the paper's own choices held, tensor 8 in the node and its pipeline, nothing else is faster."""
    narrow = [
        replace(grid, layouts=kept, micro_batches=(1,), offloads=(False,))
        for grid in space(GPT3)
        if (kept := tuple(layout for layout in grid.layouts if layout.context == layout.data == 1))
    ]
    best = plan(GPT3, narrow, capacity=64e9).best  # of 80 GB, as a rank also needs workspaces
    assert best.time <= training_step(GPT3, PAPER).time.total
    assert best.division.recompute == "selective"
    assert best.division.sequence_parallel


def test_more_memory_is_never_slower() -> None:
    times = [plan(GPT3, capacity=capacity).best.time for capacity in (45e9, 60e9, 80e9, 200e9)]
    assert times == sorted(times, reverse=True)


def test_what_does_not_fit_says_how_much_it_needs() -> None:
    setting = Setting("gpt3-175b", "l4", 8, 8, 2048)
    with pytest.raises(
        OptionError, match=r"nothing fits: of \d+ divisions the smallest needs \d+\.\d\d GB"
    ) as said:
        plan(setting)
    least = float(str(said.value).split("needs ")[1].split(" GB")[0]) * 1e9
    assert plan(setting, capacity=least + 5e6).fitting > 0
    with pytest.raises(OptionError, match="nothing fits"):
        plan(setting, capacity=least - 6e6)
    with pytest.raises(OptionError, match="no layout of 13 ranks"):
        plan(Setting("gpt2", "l4", 13, 8, 1024))


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_grids_are_numbered_row_by_row() -> None:
    for grid in SPACES[2]:
        assert grid.size == math.prod(grid.shape)
        assert grid.division(0).micro_batch == grid.micro_batches[0]
        assert grid.division(grid.size - 1).precision == grid.precisions[-1]
