"""The fastest way to divide a step of training that fits, and all that nothing else beats in time and memory.

Every division of the space is computed, by the formulas that explain the best one: see `plan_space`
and `memsim.planning.training_step`.

>>> setting = Setting("gpt3-175b", "a100-80gb", accelerators=64, batch=64, sequence=2048, **AS_IN_2022)
>>> found = plan(setting)
>>> paper = Division(tensor=8, pipeline=8, interleave=3, recompute="selective", sequence_parallel=True)
>>> found.best.time <= training_step(setting, paper).time.total
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memsim.formula import Array
from memsim.hardware import hardware
from memsim.planning.division import Division
from memsim.planning.plan_space import Grid, space
from memsim.planning.training_setting import (
    AS_IN_2022,  # noqa: F401 (the doctest)
    Setting,
)
from memsim.planning.training_step import TrainingStep, training_step
from refimpl.errors import OptionError

__all__ = ["Found", "Plan", "Planned", "Slice", "merge", "pareto", "plan", "search", "slices"]

# Elements of a grid that are computed together: few enough for the second-level cache.
CELLS = 1 << 16


class Found(NamedTuple):
    """A part of a search: how many divisions can be run and fit, and the best ones by time, ascending."""

    runnable: int
    fitting: int
    places: npt.NDArray[np.int64]
    time: Array
    memory: Array


class Slice(NamedTuple):
    """Layouts `start` to `stop` of a grid whose divisions are numbered from `first` on; bytes that fit."""

    grid: Grid
    first: int
    start: int
    stop: int
    capacity: float


class Planned(NamedTuple):
    """A division, its seconds a step and the bytes of its fullest rank."""

    division: Division
    time: float
    memory: float


class Plan(NamedTuple):
    """What a search found.

    Attributes
    ----------
    grid, runnable, fitting : int
        Divisions of the grid, those that can be run, and those of them that fit into memory.
    front : tuple of Planned
        Those than which nothing is both faster and smaller, fastest first.
    step : TrainingStep
        The fastest one, exact and explained.
    """

    grid: int
    runnable: int
    fitting: int
    front: tuple[Planned, ...]
    step: TrainingStep

    @property
    def best(self) -> Planned:
        """The fastest division."""
        return self.front[0]


def pareto(time: Array, memory: Array) -> npt.NDArray[np.int64]:
    """Return the places of the pairs that no other is at least as good as in both, by ascending time.

    Of equal pairs the first stays.

    Examples
    --------
    >>> pareto(np.array([3.0, 1.0, 2.0, 1.0]), np.array([1.0, 5.0, 5.0, 4.0]))
    array([3, 0])
    """
    order: npt.NDArray[np.int64] = np.lexsort((memory, time))
    held = memory[order]
    lowest = np.minimum.accumulate(held)
    better = np.ones(len(order), np.bool_)
    better[1:] = held[1:] < lowest[:-1]
    return order[better]


def search(part: Slice) -> Found:
    """Return what a slice holds; slices are independent of each other and can be searched anywhere."""
    costs = part.grid.costs(part.start, part.stop)
    fits = costs.valid & (costs.memory <= part.capacity)
    index = np.flatnonzero(fits)
    time, memory = costs.time[fits], costs.memory[fits]
    best = pareto(time, memory)
    start = part.first + part.start * (part.grid.size // len(part.grid.layouts))
    return Found(int(costs.valid.sum()), len(index), index[best] + start, time[best], memory[best])


def merge(parts: Iterable[Found]) -> Found:
    """Return the whole of several parts; their order changes nothing but which of equal ones stays."""
    runnable, fitting, places, time, memory = zip(*parts, strict=True)
    where, times, sizes = (np.concatenate(arrays) for arrays in (places, time, memory))
    best = pareto(times, sizes)
    return Found(sum(runnable), sum(fitting), where[best], times[best], sizes[best])


def slices(grids: Sequence[Grid], capacity: float, cells: int = CELLS) -> list[Slice]:
    """Return the slices of a search, each of about `cells` divisions."""
    found: list[Slice] = []
    first = 0
    for grid in grids:
        step = max(1, cells * len(grid.layouts) // grid.size)
        found += [Slice(grid, first, at, at + step, capacity) for at in range(0, len(grid.layouts), step)]
        first += grid.size
    return found


def _division(grids: Sequence[Grid], index: int) -> Division:
    for grid in grids:
        if index < grid.size:
            return grid.division(index)
        index -= grid.size
    raise IndexError(index)


def plan(
    setting: Setting,
    grids: Sequence[Grid] | None = None,
    *,
    capacity: float | None = None,
    each: Callable[[list[Slice]], Iterator[Found]] = lambda parts: map(search, parts),
) -> Plan:
    """Return the divisions of a training step that are worth having.

    Parameters
    ----------
    setting : Setting
        What is trained, on what.
    grids : sequence of Grid, optional
        What may be chosen; all of `memsim.planning.plan_space.space`.
    capacity : float, optional
        Bytes of an accelerator that may be filled; those of its memory.
    each : callable
        How the slices are searched: one after the other, with progress, or by other processes.

    Returns
    -------
    Plan

    Raises
    ------
    OptionError
        If nothing can be run, or nothing fits: with the least memory that there is.

    Notes
    -----
    Every formula is computed for arrays of divisions in float64; the best is then computed exactly.  Left out
    are stragglers, workspaces and fragmentation: ``capacity`` leaves room for the latter.

    Examples
    --------
    >>> small = plan(Setting("gpt2", "a100-80gb", accelerators=8, batch=64, sequence=1024))
    >>> small.best.division.data
    8
    """
    chosen = space(setting) if grids is None else grids
    limit = hardware(setting.hardware).hbm.value if capacity is None else capacity
    if not chosen:
        raise OptionError(f"no layout of {setting.accelerators} ranks divides heads, layers and batch")
    found = merge(each(slices(chosen, limit)))
    if not found.fitting:
        least = merge(map(search, slices(chosen, float("inf"))))
        if not least.runnable:
            raise OptionError(f"no division among {setting.accelerators} ranks can be run")
        raise OptionError(
            f"nothing fits: of {least.runnable} divisions the smallest needs {least.memory[-1] / 1e9:.2f} GB"
            f" a rank; got {limit / 1e9:.2f} GB"
        )
    front = tuple(
        Planned(_division(chosen, int(index)), float(time), float(memory))
        for index, time, memory in zip(found.places, found.time, found.memory, strict=True)
    )
    step = training_step(setting, front[0].division)
    return Plan(sum(grid.size for grid in chosen), found.runnable, found.fitting, front, step)
