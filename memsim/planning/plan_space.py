"""All ways to divide a step of training, as grids: every axis a list, every formula computed on all of it.

The layouts of ranks with equally many pipeline stages are one axis of a grid, what else there is to choose
the others.  A quantity that an axis does not enter is computed once for all of it, because arrays of one
element along an axis broadcast.

>>> grids = space(Setting("gpt2", "a100-80gb", accelerators=8, batch=8, sequence=1024))
>>> [(grid.layouts[0].pipeline, len(grid.layouts), grid.shape[1:]) for grid in grids]
[(1, 9, (4, 1, 4, 2, 2, 2, 1)), (2, 6, (4, 4, 2, 2, 2, 2, 1)), (4, 3, (4, 3, 2, 2, 2, 2, 1)),
 (8, 1, (4, 1, 2, 2, 2, 2, 1))]
>>> sum(int(grid.costs(0, len(grid.layouts)).valid.sum()) for grid in grids)
1528
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memsim.derivation import derive_arrays, needed
from memsim.formula import Array, evaluate_array
from memsim.planning.division import CONSTRAINTS, RECOMPUTE, Division, Recompute
from memsim.planning.division_memory import MEMORY
from memsim.planning.division_time import KERNEL_TIME, TIME
from memsim.planning.training_setting import Precision, Setting, precision_letters
from memsim.units import Number

__all__ = ["Costs", "Grid", "Layout", "chunkings", "divisors", "layouts", "space"]

_NEEDED, _NEEDED_OF_KERNELS = (needed((*MEMORY, *time), ("step", "memory")) for time in (TIME, KERNEL_TIME))


class Layout(NamedTuple):
    """Ranks of each kind; their product, without `expert`, is the number of accelerators."""

    tensor: int
    pipeline: int
    data: int
    context: int
    expert: int


class Costs(NamedTuple):
    """What a grid of divisions costs; arrays of one shape."""

    valid: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    time: Array
    memory: Array


def divisors(number: int) -> list[int]:
    """Return the divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def chunkings(layers: int, stages: int) -> list[int]:
    """Return the numbers of chunks of a stage, ascending: of each size of a chunk the fewest.

    >>> chunkings(96, 8), chunkings(126, 16)
    ([1, 2, 3, 4, 6, 12], [1, 2, 3, 4])
    """
    sizes = range(1, -(-layers // stages) + 1)
    found = {-(-layers // (stages * size)) for size in sizes}
    return sorted(v for v in found if v * stages <= layers)


def layouts(letters: dict[str, Number]) -> list[Layout]:
    """Return the layouts whose ranks divide heads, sequence, batch and experts, with at most a stage a layer.

    Parameters
    ----------
    letters : dict
        Of a `Setting`.
    """
    G, B, s, L, E, heads = (int(letters[name]) for name in ("G", "B", "s", "L", "E", "H_k"))
    return [
        Layout(t, p, d, c, e)
        for t in divisors(math.gcd(G, heads))
        for p in divisors(G // t)
        if p <= L
        for c in divisors(math.gcd(G // (t * p), s))
        for d in [G // (t * p * c)]
        if B % d == 0
        for e in (divisors(math.gcd(d, E)) if E else [1])
    ]


def space(
    setting: Setting,
    *,
    zeros: Sequence[int] = (0, 1, 2, 3),
    recomputes: Sequence[Recompute] | None = None,
    offloads: Sequence[bool] = (False, True),
    precisions: Sequence[Precision] = ("bf16",),
    largest_micro_batch: int | None = None,
) -> list[Grid]:
    """Return the grids of a setting, one for each number of pipeline stages, ascending.

    Parameters
    ----------
    setting : Setting
        What is trained, on what.
    zeros, recomputes, offloads, precisions : sequence
        What may be chosen.  Recomputation of the scores is among the defaults where they are kept in memory.
    largest_micro_batch : int, optional
        Micro-batches are divisors of the batch up to it.
    """
    letters = setting.letters()
    batch, deep = int(letters["B"]), int(letters["L"])
    if recomputes is None:
        recomputes = RECOMPUTE if setting.attention == "standard" else ("none", "full")
    groups: dict[int, list[Layout]] = {}
    for layout in layouts(letters):
        groups.setdefault(layout.pipeline, []).append(layout)
    grids = [
        Grid(
            setting,
            tuple(found),
            tuple(b for b in divisors(batch) if b <= (largest_micro_batch or batch)),
            tuple(chunkings(deep, stages)) if stages > 1 else (1,),
            tuple(zero for zero in zeros if stages == 1 or zero < 2),
            tuple(recomputes),
            (False, True),
            tuple(offloads),
            tuple(precisions),
        )
        for stages, found in sorted(groups.items())
    ]
    return [grid for grid in grids if grid.size]  # only ZeRO 3 chosen leaves no pipeline


@dataclass(frozen=True, slots=True)
class Grid:
    """Divisions with one number of pipeline stages; the axes in order."""

    setting: Setting
    layouts: tuple[Layout, ...]
    micro_batches: tuple[int, ...]
    interleaves: tuple[int, ...]
    zeros: tuple[int, ...]
    recomputes: tuple[Recompute, ...]
    sequence_parallel: tuple[bool, ...]
    offloads: tuple[bool, ...]
    precisions: tuple[Precision, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        axes: tuple[Sequence[object], ...] = (
            self.layouts, self.micro_batches, self.interleaves, self.zeros, self.recomputes,
            self.sequence_parallel, self.offloads, self.precisions,
        )  # fmt: skip
        return tuple(map(len, axes))

    @property
    def size(self) -> int:
        """How many divisions the grid holds, those that cannot be run among them."""
        return math.prod(self.shape)

    def _letters(self, start: int, stop: int) -> dict[str, float | Array]:
        """Return the letters of layouts `start` to `stop`, each along its axis."""
        rank = len(self.shape)

        def along(axis: int, values: Sequence[float]) -> Array:
            return np.array(values, np.float64).reshape([-1 if at == axis else 1 for at in range(rank)])

        ranks = zip("tpdce", zip(*self.layouts[start:stop], strict=True), strict=True)
        found: dict[str, float | Array] = {letter: along(0, values) for letter, values in ranks}
        found |= {"b": along(1, self.micro_batches), "v": along(2, self.interleaves)}
        found |= {"z": along(3, self.zeros)}
        found |= {"r": along(4, [RECOMPUTE.index(name) for name in self.recomputes])}
        found |= {"q": along(5, self.sequence_parallel), "o": along(6, self.offloads)}
        rates = [precision_letters(self.setting, name) for name in self.precisions]
        return found | {name: along(7, [float(rate[name]) for rate in rates]) for name in rates[0]}

    def costs(self, start: int, stop: int) -> Costs:
        """Return the costs of all divisions with layouts `start` to `stop`."""
        fixed = {name: float(value) for name, value in self.setting.letters().items()}
        letters = fixed | self._letters(start, stop)
        shape = (min(stop, len(self.layouts)) - start, *self.shape[1:])
        valid = np.ones(shape, np.bool_)
        for formula, _ in CONSTRAINTS:
            valid &= np.asarray(evaluate_array(formula, letters)) == 0
        found = derive_arrays(_NEEDED if self.setting.start is None else _NEEDED_OF_KERNELS, letters)
        return Costs(valid, *(np.broadcast_to(found[name], shape) for name in ("step", "memory")))

    def division(self, index: int) -> Division:
        """Return the division at a place of the grid, counted row by row."""
        layout, *places = (int(place) for place in np.unravel_index(index, self.shape))
        b, v, z, r, q, o, precision = places
        return Division(
            **self.layouts[layout]._asdict(),
            micro_batch=self.micro_batches[b],
            interleave=self.interleaves[v],
            zero=self.zeros[z],
            recompute=self.recomputes[r],
            sequence_parallel=self.sequence_parallel[q],
            offload=self.offloads[o],
            precision=self.precisions[precision],
        )
