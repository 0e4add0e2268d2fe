"""Laws of the order in which blocks of keys come to blocks of queries without a mask, and take turns."""

from __future__ import annotations

import inspect
import random
from collections import deque
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_backend.attention import schedule_backward_hopper
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.variant_backward_hopper import choose_backward
from cuda_backend.attention.variant_wide_backward_hopper import choose_wide_backward

Problem = tuple[int, int, int, int]  # blocks of keys, blocks of queries, heads, blocks of the grid

problems = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 4), st.integers(1, 30)).map(
    lambda sizes: (*sizes[:3], min(sizes[3], sizes[0] * sizes[2]))
)


def schedule_of(grid: int, *, wide: bool = False, mutant: tuple[str, str] | None = None) -> BackwardSchedule:
    """Return the schedule of the deterministic kernel without a mask, played, in a grid of so many blocks."""
    choose, width = (choose_wide_backward, 256) if wide else (choose_backward, 128)
    source, module = inspect.getsource(schedule_backward_hopper), ModuleType("schedule")
    if mutant is not None:
        assert source.count(mutant[0]) == 1, mutant[0]
        source = source.replace(*mutant)
    exec(compile(source, str(schedule_backward_hopper.__file__), "exec"), vars(module))
    vars(module).update(
        device_function=lambda function: function,
        grid=SimpleNamespace(blocks=lambda: np.int32(grid)),
        registers=SimpleNamespace(quotient=lambda x, y: np.int32(int(x) // int(y))),
    )
    found: BackwardSchedule = vars(module)["build_backward_schedule"](
        choose("f16", width, width, False, deterministic=True)
    )
    return found


def visits(schedule: BackwardSchedule, problem: Problem, key_block: int) -> list[tuple[int, int]]:
    """Return the blocks of queries that a block of keys comes to, step by step, and its turn at each."""
    per_head, blocks, _, _ = (np.int32(size) for size in problem)
    n, nothing = np.int32(key_block), np.int32(0)
    walk, found = schedule.walk(n, per_head, blocks), []
    for step in range(int(schedule.first_block(n, blocks, nothing, nothing)), int(blocks)):
        block = schedule.block_at(np.int32(step), walk, blocks)
        found.append(
            (
                int(block),
                int(schedule.turn(walk, np.int32(step), n, block, blocks, nothing, nothing, nothing)),
            )
        )
    return found


def faults(schedule: BackwardSchedule, problem: Problem, seed: int = 0) -> str | None:
    """Return the first law that is broken."""
    per_head, blocks, _, grid = problem
    walks = [visits(schedule, problem, n) for n in range(per_head)]
    if any(sorted(block for block, _ in walk) != list(range(blocks)) for walk in walks):
        return "a block of keys comes to each block of queries once"
    turns: list[dict[int, int]] = [{} for _ in range(blocks)]
    for n, walk in enumerate(walks):
        for block, turn in walk:
            turns[block][turn] = n
    if any(sorted(order) != list(range(per_head)) for order in turns):
        return "turns count from 0 to the number of blocks of keys"
    if per_head <= min(blocks, grid) and any(
        len({walk[step][0] for walk in walks}) < per_head for step in range(blocks)
    ):
        return "no two are at one block of queries in one step"
    if per_head <= min(blocks, grid):
        steps = [{block: step for step, (block, _) in enumerate(walk)} for walk in walks]
        for block, order in enumerate(turns):
            arrivals = [steps[order[turn]][block] for turn in range(per_head)]
            if arrivals != sorted(arrivals):
                return "they add in the order in which they arrive"
    return None if all_end(walks, problem, seed) else "nobody waits for ever"


def all_end(walks: list[list[tuple[int, int]]], problem: Problem, seed: int) -> bool:
    """Return whether the blocks of a grid that draw tiles in order all come to an end."""
    per_head, blocks, heads, grid = problem
    rest = deque((head, n) for head in range(heads) for n in range(per_head))
    words = np.zeros((heads, blocks), int)
    running: list[Any] = [[*rest.popleft(), 0] for _ in range(min(grid, len(rest)))]
    chance = random.Random(seed)
    while running:
        chance.shuffle(running)
        moved = False
        for mine in list(running):
            head, n, step = mine
            block, turn = walks[n][step]
            if words[head, block] != turn:
                continue
            moved = True
            words[head, block] += 1
            mine[2] += 1
            if mine[2] == blocks:
                running.remove(mine)
                if rest:
                    running.append([*rest.popleft(), 0])
        if not moved:
            return False
    return bool((words == per_head).all())


@given(problem=problems, wide=st.booleans(), seed=st.integers(0, 99))
def test_laws(problem: Problem, wide: bool, seed: int) -> None:
    assert faults(schedule_of(problem[3], wide=wide), problem, seed) is None


@pytest.mark.parametrize(
    "problem",
    [(32, 64, 2, 132), (128, 256, 1, 128), (200, 256, 1, 132), (4, 1, 3, 3), (1, 5, 1, 1), (7, 3, 2, 5)],
)
def test_sizes_of_the_table(problem: Problem) -> None:
    assert faults(schedule_of(problem[3]), problem) is None


def test_the_ring_is_shared_evenly() -> None:
    """With 32 blocks of keys and 64 of queries each arrives two steps behind the one before it."""
    schedule = schedule_of(132)
    arrivals = []
    for n in range(32):
        walk = visits(schedule, (32, 64, 4, 132), n)
        arrivals.append([block for block, _ in walk].index(40))
    assert sorted(arrivals) == list(range(arrivals[0] % 2, 64, 2))


MOST = "most = min(int32(blocks), int32(grid.blocks()))"
MUTANTS = {
    "a window wider than the grid": (MOST, "most = int32(blocks)"),
    "a window wider than the ring": (MOST, "most = grid.blocks()"),
    "the last window as large as others": (
        "min(int32(first + size), int32(per_head))",
        "int32(first + size)",
    ),
    "the ring does not close": ("block = int32(block + blocks)", "block = int32(block + blocks - 1)"),
    "all begin at once": ("int32((key_block - first) * spacing)", "int32(0)"),
    "steps in place of spacings": ("int32(first + registers.quotient(step, spacing))", "int32(first + step)"),
    "come around too late": ("int32(blocks - step + spacing - 1)", "int32(blocks - step)"),
    "nobody comes around": ("return max(key_block, int32(end", "return min(key_block, int32(end"),
    "turns of the first window": ("int32(registers.quotient(key_block, size) * size)", "int32(0)"),
    "around too late": ("if step < behind:", "if step + 1 < behind:"),
}
SHAPES = ((5, 12, 2, 8), (7, 3, 2, 5), (9, 20, 2, 4), (1, 5, 1, 1), (4, 8, 3, 12))


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(name: str) -> None:
    def seen(problem: Problem) -> bool:
        try:
            with np.errstate(all="ignore"):
                return faults(schedule_of(problem[3], mutant=MUTANTS[name]), problem) is not None
        except (IndexError, ZeroDivisionError):
            return True

    assert any(seen(problem) for problem in SHAPES)
