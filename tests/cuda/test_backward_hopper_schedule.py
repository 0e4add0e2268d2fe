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
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule, spacing_of
from cuda_backend.attention.variant_backward_hopper import choose_backward
from cuda_backend.attention.variant_wide_backward_hopper import choose_wide_backward

Problem = tuple[int, int, int, int]  # blocks of keys, blocks of queries, heads, blocks of the grid

problems = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 4), st.integers(1, 30)).map(
    lambda sizes: (*sizes[:3], min(sizes[3], sizes[0] * sizes[2]))
)


def schedule_of(*, wide: bool = False, mutant: tuple[str, str] | None = None) -> BackwardSchedule:
    """Return the schedule of the deterministic kernel without a mask, played, in a grid of so many blocks."""
    choose, width = (choose_wide_backward, 256) if wide else (choose_backward, 128)
    source, module = inspect.getsource(schedule_backward_hopper), ModuleType("schedule")
    if mutant is not None:
        assert source.count(mutant[0]) == 1, mutant[0]
        source = source.replace(*mutant)
    exec(compile(source, str(schedule_backward_hopper.__file__), "exec"), vars(module))
    vars(module).update(
        device_function=lambda function: function,
        registers=SimpleNamespace(quotient=lambda x, y: np.int32(int(x) // int(y))),
    )
    found: BackwardSchedule = vars(module)["build_backward_schedule"](
        choose("f16", width, width, False, deterministic=True)
    )
    return found


def visits(schedule: BackwardSchedule, problem: Problem, key_block: int) -> list[tuple[int, int]]:
    """Return the blocks of queries that a block of keys comes to, step by step, and its turn at each."""
    per_head, blocks, _, grid = problem
    n, nothing, number = np.int32(key_block), np.int32(0), np.int32(blocks)
    spacing = np.int32(spacing_of(per_head, blocks, grid))
    sizes = np.int32(per_head), spacing, number, nothing, nothing, nothing
    found = []
    for step in range(int(schedule.first_block(n, number, nothing, nothing)), blocks):
        block = schedule.block_at(np.int32(step), n, spacing, number)
        found.append((int(block), int(schedule.turn(n, np.int32(step), block, sizes))))
    return found


def faults(schedule: BackwardSchedule, problem: Problem, seed: int = 0) -> str | None:
    """Return the first law that is broken."""
    per_head, blocks, heads, grid = problem
    tiles = [schedule.place(np.int32(tile), np.int32(per_head), 0, 0) for tile in range(per_head * heads)]
    if [(int(n), int(head)) for n, head in tiles] != [(n, h) for h in range(heads) for n in range(per_head)]:
        return "tiles of a head are drawn one behind the other"
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
    assert faults(schedule_of(wide=wide), problem, seed) is None


@pytest.mark.parametrize(
    "problem",
    [(32, 64, 2, 132), (128, 256, 1, 128), (200, 256, 1, 132), (4, 1, 3, 3), (1, 5, 1, 1), (7, 3, 2, 5)],
)
def test_sizes_of_the_table(problem: Problem) -> None:
    assert faults(schedule_of(), problem) is None


def test_the_ring_is_shared_evenly() -> None:
    """With 32 blocks of keys and 64 of queries each arrives two steps behind the one before it."""
    schedule = schedule_of()
    arrivals = []
    for n in range(32):
        walk = visits(schedule, (32, 64, 4, 132), n)
        arrivals.append([block for block, _ in walk].index(40))
    assert sorted(arrivals) == list(range(arrivals[0] % 2, 64, 2))


MUTANTS = {
    "the ring does not close": ("block = int32(block + blocks)", "block = int32(block + blocks - 1)"),
    "all begin at once": ("int32(step - key_block * spacing)", "int32(step)"),
    "the other way around": ("int32(step - key_block * spacing)", "int32(key_block * spacing - step)"),
    "steps in place of spacings": ("return registers.quotient(step, spacing)", "return step"),
    "come around too late": ("int32(blocks - step + spacing - 1)", "int32(blocks - step)"),
    "nobody comes around": ("max(int32(key_block), int32(per_head", "min(int32(key_block), int32(per_head"),
    "before and behind exchanged": ("if block > step:", "if block <= step:"),
    "together in order": ("if spacing == 0:", "if spacing < 0:"),
    "heads side by side": ("int32(tile - head * per_head), head", "int32(tile - head * per_head), head + 1"),
}
SHAPES = ((5, 12, 2, 8), (7, 3, 2, 5), (9, 20, 2, 4), (1, 5, 1, 1), (4, 8, 3, 12))


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(name: str) -> None:
    def seen(problem: Problem) -> bool:
        try:
            with np.errstate(all="ignore"):
                return faults(schedule_of(mutant=MUTANTS[name]), problem) is not None
        except (IndexError, ZeroDivisionError):
            return True

    assert any(seen(problem) for problem in SHAPES)


def test_a_grid_too_small_hangs() -> None:
    """What `spacing_of` prevents: key blocks that begin apart, of which one waits for one not drawn."""
    walks = [visits(schedule_of(), (8, 16, 1, 8), n) for n in range(8)]
    assert all_end(walks, (8, 16, 1, 8), 0)
    assert not all_end(walks, (8, 16, 1, 7), 0)
