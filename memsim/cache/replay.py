"""What a kernel moves between its multiprocessors, the L2 cache and HBM: its tile schedule, replayed.

The cache keeps the lines used last (LRU), and a written line goes to HBM when it is dropped, or never within
the kernel.  A kernel's blocks are given to workers in the order of the launch, and workers take turns, one
tile each.  With no cache every access counts, as in `memsim.attention_io`; with one that holds everything
each line is read once at most.

>>> twice = Kernel("read twice", (Block((Access("x", 0, 256), Access("x", 0, 256))),))
>>> [replay([twice], {"x": 256}, cache=size)[0].dram_read for size in (0, 128, 256)]
[512, 512, 256]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import IntArray
from refimpl.validation import whole

__all__ = ["Access", "Block", "Kernel", "Traffic", "replay", "total"]

_KINDS = ("read", "write", "update")


class Access(NamedTuple):
    """Bytes `start` to ``start + size`` of an array, read, written, or read and written (``"update"``)."""

    array: str
    start: int
    size: int
    kind: Literal["read", "write", "update"] = "read"


class Block(NamedTuple):
    """What one block of threads, or one tile of a persistent one, moves, in order."""

    accesses: tuple[Access, ...]


class Kernel(NamedTuple):
    """Blocks in the order in which they start, on so many workers: multiprocessors, times blocks of each."""

    name: str
    blocks: tuple[Block, ...]
    workers: int = 1


class Traffic(NamedTuple):
    """Bytes that a kernel moved.

    Attributes
    ----------
    name : str
        The kernel's.
    l2_read, l2_write : int
        What its blocks asked of the cache.
    dram_read, dram_write : int
        What the cache asked of HBM until the kernel's end.
    left : int
        Written bytes that are still in the cache then; a counter of HBM does not see them.
    """

    name: str
    l2_read: int
    l2_write: int
    dram_read: int
    dram_write: int
    left: int


def replay(
    kernels: Sequence[Kernel], arrays: Mapping[str, int], *, cache: int, line: int | None = None
) -> list[Traffic]:
    """Return what kernels move, one after the other, the first with an empty cache.

    Parameters
    ----------
    kernels : sequence of Kernel
        What runs.
    arrays : mapping of str to int
        Bytes of each array.
    cache : int
        Bytes of the L2 cache; 0 for none.
    line : int, optional
        Bytes that are kept or dropped together.  Default: the most that divides all tiles, which is as good
        as a smaller one but for what is left of the cache.

    Returns
    -------
    list of Traffic
        One for each kernel.

    Raises
    ------
    OptionError
        If an access leaves its array, or `line` does not divide the tiles.

    Notes
    -----
    Left out are what differs between cards: sectors, sets, copies of a line in the other half of an L2, the
    order in which blocks really run.  Reading is counted when a tile is asked for, not by the thread.
    Without numba the loop runs in Python, some hundred times slower.
    """
    whole("cache", cache, 0)
    traces = [_trace(kernel, arrays) for kernel in kernels]
    sizes = np.concatenate([np.zeros(1, np.int64), *(t.ravel() for trace in traces for t in trace[:2])])
    common = math.gcd(*sizes.tolist(), *arrays.values()) or 1
    each = common if line is None else whole("line", line)
    if common % each:
        raise OptionError(f"line: expected a divisor of the tiles' {common} bytes; got {line}")
    lines = sum(arrays.values()) // each
    state = _State(np.full((2, lines + 1), -1, np.int64), np.zeros((2, lines), np.bool_), np.full(3, 0))
    state.ends[:2] = -1
    run = _compiled()
    found = []
    for kernel, (starts, counts, kinds, blocks) in zip(kernels, traces, strict=True):
        counted = run(starts // each, counts // each, kinds, blocks, kernel.workers, cache // each, *state)
        found.append(Traffic(kernel.name, *(int(count) * each for count in counted)))
    return found


def total(found: Sequence[Traffic]) -> Traffic:
    """Return the sum over kernels; what is left is what the last one left."""
    read, write, dram_read, dram_write = (
        sum(getattr(one, name) for one in found) for name in Traffic._fields[1:-1]
    )
    return Traffic("all", read, write, dram_read, dram_write, found[-1].left if found else 0)


class _State(NamedTuple):
    """The cache: neighbors of each line in order of use; whether it is in, whether written; ends and size."""

    neighbors: IntArray
    flags: Any
    ends: IntArray


def _trace(kernel: Kernel, arrays: Mapping[str, int]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return where each access starts, its size and kind, and where each block's accesses begin."""
    bases = dict(zip(arrays, np.concatenate([[0], np.cumsum(list(arrays.values()))]), strict=False))
    whole("workers", kernel.workers)
    rows, blocks = [], [0]
    for block in kernel.blocks:
        for access in block.accesses:
            if access.array not in arrays or not 0 <= access.start <= access.start + access.size:
                raise OptionError(f"{kernel.name}: expected bytes of {sorted(arrays)}; got {access}")
            if access.start + access.size > arrays[access.array]:
                raise OptionError(
                    f"{kernel.name}: {access.array} has {arrays[access.array]} bytes; got {access}"
                )
            rows.append((bases[access.array] + access.start, access.size, _KINDS.index(access.kind)))
        blocks.append(len(rows))
    table = np.array(rows, np.int64).reshape(-1, 3)
    return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), np.array(blocks, np.int64)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """Return the loop, compiled if numba is there."""
    try:
        import numba
    except ImportError:
        return _run
    compiled: Callable[..., Any] = numba.njit(_run)
    return compiled


def _run(
    starts: Any, counts: Any, kinds: Any, blocks: Any, workers: Any, capacity: Any,
    neighbors: Any, flags: Any, ends: Any,
) -> Any:  # fmt: skip
    """Play one kernel; `ends` holds the line used last, the one used longest ago, and how many are in."""
    newer, older = neighbors[0], neighbors[1]
    inside, written = flags[0], flags[1]
    l2_read, l2_write, dram_read, dram_write = 0, 0, 0, 0
    workers = min(workers, max(1, len(blocks) - 1))
    place, stop = np.zeros(workers, np.int64), np.zeros(workers, np.int64)
    given = 0
    busy = True
    while busy:
        busy = False
        for worker in range(workers):
            while place[worker] == stop[worker] and given < len(blocks) - 1:
                place[worker], stop[worker] = blocks[given], blocks[given + 1]
                given += 1
            if place[worker] == stop[worker]:
                continue
            busy = True
            at = place[worker]
            place[worker] += 1
            reads, writes = kinds[at] != 1, kinds[at] != 0
            l2_read += counts[at] if reads else 0
            l2_write += counts[at] if writes else 0
            for line in range(starts[at], starts[at] + counts[at]):
                if capacity == 0:
                    dram_read += 1 if reads else 0
                    dram_write += 1 if writes else 0
                    continue
                if inside[line]:  # take it out of the order
                    after, before = newer[line], older[line]
                    if after >= 0:
                        older[after] = before
                    else:
                        ends[0] = before
                    if before >= 0:
                        newer[before] = after
                    else:
                        ends[1] = after
                else:
                    dram_read += 1 if reads else 0
                    inside[line] = True
                    if ends[2] == capacity:  # drop the one used longest ago
                        last = ends[1]
                        ends[1] = newer[last]
                        if ends[1] >= 0:
                            older[ends[1]] = -1
                        else:
                            ends[0] = -1
                        inside[last] = False
                        if written[last]:
                            dram_write += 1
                            written[last] = False
                    else:
                        ends[2] += 1
                newer[line], older[line] = -1, ends[0]  # and put it in front
                if ends[0] >= 0:
                    newer[ends[0]] = line
                else:
                    ends[1] = line
                ends[0] = line
                if writes:
                    written[line] = True
    return l2_read, l2_write, dram_read, dram_write, written.sum()
