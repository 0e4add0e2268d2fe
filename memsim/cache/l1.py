"""What blocks read from the L2 where their loads go through the L1 of a multiprocessor.

Blocks of one multiprocessor that read the same tiles find in its L1 what another of them has just read.  How
often that happens depends on when they come by, so here blocks run in time, not in turns: a load takes as
long as it is to where it finds its line.  Blocks that are in step stay in step, for the first one waits for
the L2 and the next ones do not.  And which block comes next to a multiprocessor depends on how many others
have ended before: whether two of them read the same keys is decided there.

>>> from memsim.cache.replay import Access, Block, Kernel, traced
>>> tile = Access("x", 0, 64)
>>> program = traced([Kernel("two blocks read x", (Block((tile,)), Block((tile,))), workers=2)], {"x": 64})
>>> near, apart = L1(size=64, processors=1), L1(size=64, processors=2)
>>> read_from_l2(program, 0, near), read_from_l2(program, 0, apart)
(64, 128)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from memsim.cache.compiled import compiled
from memsim.cache.lru import LOAD, scattered
from memsim.cache.replay import Program
from refimpl.errors import OptionError
from refimpl.validation import whole

__all__ = ["L1", "carve_out", "read_from_l2"]


class L1(NamedTuple):
    """The L1 caches of a card, one a multiprocessor, and how far it is to what they do not hold.

    Attributes
    ----------
    size : int
        Bytes of one; the lines loaded last are kept (LRU), and stores pass it by.
    processors : int
        Multiprocessors.  Worker w is on number w modulo this one, as blocks are launched.
    near, far, farthest : int
        Cycles of a load that finds its line in the L1, in the L2, and in HBM, from where the first load of a
        kernel takes it.
    spread : int
        A multiprocessor is so many cycles nearer to the L2 or farther at most, and a line as well.
    """

    size: int
    processors: int
    near: int = 1
    far: int = 1
    farthest: int = 1
    spread: int = 0


def carve_out(shared: int, blocks: int, *, steps: Sequence[int], reserved: int) -> int:
    """Return the bytes of a multiprocessor that become shared memory for so many blocks.

    >>> carve_out(50_000, 4, steps=(0, 102_400, 233_472), reserved=1024)
    233472

    Raises
    ------
    OptionError
        If no step holds them.
    """
    needed = blocks * (whole("shared", shared, 0) + reserved)
    for step in sorted(steps):
        if step >= needed:
            return step
    raise OptionError(f"shared: expected at most {max(steps)} bytes for {blocks} blocks; got {needed}")


def read_from_l2(program: Program, number: int, l1: L1, *, chart: int = 0) -> int:
    """Return the bytes that a kernel's blocks read from the L2.

    Parameters
    ----------
    program : Program
        Kernels as numbers.
    number : int
        Which of them runs.
    l1 : L1
        The L1 caches.
    chart : int
        Which random chart says how far away multiprocessors and lines are.

    Raises
    ------
    OptionError
        If there are no multiprocessors, less than no bytes, or a distance that is less than none.

    Notes
    -----
    A line takes its bytes times its cycles: threads load one element after the other.  Stores and arithmetic
    take no time; bandwidth and sectors are left out.
    """
    for name in ("size", "near", "spread"):
        whole(name, getattr(l1, name), 0)
    whole("processors", l1.processors)
    if not l1.near <= l1.far - 2 * l1.spread <= l1.far <= l1.farthest:
        raise OptionError(f"l1: expected near <= far - 2 spread and far <= farthest; got {l1}")
    kernel, widths = program.kernels[number], program.widths
    fit = min(len(widths), l1.size // int(widths.min(initial=1 << 30)))
    away = _drawn(l1.processors + len(widths), chart, l1.spread)
    return int(
        _compiled()(
            *(kernel.first, kernel.stop, kernel.needs, kernel.blocks, kernel.workers),
            *(widths, l1.size, fit + 2),  # room for the first that does not fit, and for an end
            *(l1.near, l1.far, l1.farthest, away[: l1.processors], away[l1.processors :]),
        )
    )


def _drawn(count: int, number: int, spread: int) -> Any:
    """Return whole numbers from -spread to spread that look random, others for each `number`."""
    places = scattered((number + 1) * count)[number * count :] >> np.uint64(32)
    return (places * np.uint64(2 * spread + 1) >> np.uint64(32)).astype(np.int64) - spread


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return compiled(_run)


def _run(
    first: Any, stop: Any, needs: Any, blocks: Any, workers: Any, widths: Any, size: Any, slots: Any,
    near: Any, far: Any, farthest: Any, away: Any, beyond: Any,
) -> Any:  # fmt: skip
    """Play one kernel, the worker first whose time has come: bytes read from the L2."""
    processors, count = len(away), len(blocks) - 1
    workers = min(workers, max(1, count))
    place, end, line = np.zeros(workers, np.int64), np.zeros(workers, np.int64), np.zeros(workers, np.int64)
    held = np.full((processors, slots), -1, np.int64)  # lines of each L1, the one loaded last in front
    arrives = np.zeros((processors, slots), np.int64)  # they may be on their way
    in_l2 = np.full(len(widths), -1, np.int64)  # when a line is there
    queue = [(np.int64(0), np.int64(worker)) for worker in range(workers)]
    given, read = 0, 0
    while len(queue) > 0:
        now, worker = queue[0]
        if place[worker] == end[worker]:
            if given == count:
                heapq.heappop(queue)
                continue
            place[worker], end[worker] = blocks[given], blocks[given + 1]
            given += 1
            if place[worker] < end[worker]:
                line[worker] = first[place[worker]]
            continue
        at, x = place[worker], line[worker]
        if x == stop[at]:  # of an access all lines are done, or it has none
            place[worker] += 1
            if place[worker] < end[worker]:
                line[worker] = first[place[worker]]
            continue
        line[worker] += 1
        width = widths[x]
        if not needs[at] & LOAD:
            if in_l2[x] < 0:
                in_l2[x] = now
            continue
        here = worker % processors
        slot, kept, hit = 0, 0, False
        while held[here, slot] >= 0:
            kept += widths[held[here, slot]]
            if kept > size:
                break
            hit = held[here, slot] == x
            if hit:
                break
            slot += 1
        if hit:
            arrival = arrives[here, slot]
            now = max(now + width * near, arrival)
        else:
            read += width
            if in_l2[x] < 0:
                in_l2[x] = now + width * (farthest - far)
            arrival = max(now, in_l2[x]) + width * (far + away[here] + beyond[x])
            now = arrival
            held[here, slot + 1] = -1  # behind the first one that did not fit none is kept
        for older in range(slot, 0, -1):
            held[here, older], arrives[here, older] = held[here, older - 1], arrives[here, older - 1]
        held[here, 0], arrives[here, 0] = x, arrival
        heapq.heapreplace(queue, (now, worker))
    return read
