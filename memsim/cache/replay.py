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
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import IntArray
from refimpl.validation import whole

__all__ = ["Access", "Block", "Cache", "Kernel", "Traffic", "replay", "total"]

_KINDS = ("read", "write", "update", "add")


class Access(NamedTuple):
    """Bytes `start` to ``start + size`` of an array, and what is done with them.

    They are read, written, read and written (``"update"``), or added to by the cache itself (``"add"``), which
    needs what was there, but sends nothing to the multiprocessor.
    """

    array: str
    start: int
    size: int
    kind: Literal["read", "write", "update", "add"] = "read"


class Block(NamedTuple):
    """What one block of threads, or one tile of a persistent one, moves, in order."""

    accesses: tuple[Access, ...]


class Kernel(NamedTuple):
    """Blocks in the order in which they start, on so many workers: multiprocessors, times blocks of each."""

    name: str
    blocks: tuple[Block, ...]
    workers: int = 1


class Cache(NamedTuple):
    """An L2 cache; one that is a plain LRU unless more is said.

    Attributes
    ----------
    size : int
        Bytes of all of it.
    halves : {1, 2}
        Parts of which each is next to every second worker.  A line is at home in one of them, which reads it
        from HBM, and takes all that is written; to be read from the other half it is copied there.
    ways : int, optional
        Of the largest lines, how many a set holds; lines are scattered over sets, and each set is an LRU of
        its own.  Default: all lines are in one set.
    """

    size: int
    halves: Literal[1, 2] = 1
    ways: int | None = None


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
    kernels: Sequence[Kernel], arrays: Mapping[str, int], *, cache: int | Cache, line: int = 1 << 15
) -> list[Traffic]:
    """Return what kernels move, one after the other, the first with an empty cache.

    Parameters
    ----------
    kernels : sequence of Kernel
        What runs.
    arrays : mapping of str to int
        Bytes of each array.
    cache : int or Cache
        The L2 cache, or the bytes of one that is a plain LRU; 0 for none.
    line : int
        Bytes of an array that are kept or dropped together: the most that divide this and all of its tiles.

    Returns
    -------
    list of Traffic
        One for each kernel.

    Raises
    ------
    OptionError
        If an access leaves its array, or the cache has other than one or two halves.

    Notes
    -----
    Left out are sectors, and the order in which blocks really run.  Reading is counted when a tile is asked
    for, not by the thread.  Without numba the loop runs in Python, some hundred times slower.
    """
    cache = cache if isinstance(cache, Cache) else Cache(cache)
    whole("cache", cache.size, 0)
    whole("line", line)
    if cache.halves not in (1, 2):
        raise OptionError(f"cache: expected 1 or 2 halves; got {cache.halves}")
    traces = {id(kernel): _trace(kernel, arrays) for kernel in kernels}
    each = np.array(
        [_line_of(number, size, traces.values(), line) for number, size in enumerate(arrays.values())],
        np.int64,
    )
    counts = [size // bytes_ for size, bytes_ in zip(arrays.values(), each.tolist(), strict=True)]
    bases = np.concatenate([[0], np.cumsum(counts)])
    state = _empty(cache, np.repeat(each, counts))
    run, found = _compiled(), []
    for kernel in kernels:
        trace = traces[id(kernel)]
        size = each[trace.arrays]
        first = bases[trace.arrays] + trace.starts // size
        read, written = run(first, first + trace.sizes // size, trace.kinds, trace.blocks, kernel.workers, state)
        asked = (int(trace.sizes[np.isin(trace.kinds, kinds)].sum()) for kinds in ((0, 2), (1, 2, 3)))
        left = int((state.written.reshape(cache.halves, -1) * state.widths).sum())
        found.append(Traffic(kernel.name, *asked, int(read), int(written), left))
    return found


def total(found: Sequence[Traffic]) -> Traffic:
    """Return the sum over kernels; what is left is what the last one left."""
    read, write, dram_read, dram_write = (
        sum(getattr(one, name) for one in found) for name in Traffic._fields[1:-1]
    )
    return Traffic("all", read, write, dram_read, dram_write, found[-1].left if found else 0)


class _Trace(NamedTuple):
    """All accesses of a kernel in the order of its blocks, and where each block's begin."""

    arrays: IntArray
    starts: IntArray
    sizes: IntArray
    kinds: IntArray
    blocks: IntArray


def _trace(kernel: Kernel, arrays: Mapping[str, int]) -> _Trace:
    """Return a kernel's accesses as numbers; one that stands in many blocks is looked at once."""
    whole("workers", kernel.workers)
    order = list(chain.from_iterable(block.accesses for block in kernel.blocks))
    distinct = {id(access): access for access in order}
    numbers = {name: number for number, name in enumerate(arrays)}
    rows = []
    for access in distinct.values():
        if access.array not in arrays or not 0 <= access.start <= access.start + access.size:
            raise OptionError(f"{kernel.name}: expected bytes of {sorted(arrays)}; got {access}")
        if access.start + access.size > arrays[access.array]:
            raise OptionError(
                f"{kernel.name}: {access.array} has {arrays[access.array]} bytes; got {access}"
            )
        rows.append((numbers[access.array], access.start, access.size, _KINDS.index(access.kind)))
    table = np.array(rows, np.int64).reshape(-1, 4)
    places = dict(zip(distinct, range(len(distinct)), strict=True))
    which = np.fromiter(map(places.__getitem__, map(id, order)), np.int64, len(order))
    lengths = [len(block.accesses) for block in kernel.blocks]
    blocks = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return _Trace(*(np.ascontiguousarray(column) for column in table[which].T), blocks)


def _line_of(number: int, size: int, traces: Any, most: int) -> int:
    """Return the bytes of one array that are kept together: they divide it, its tiles, and the most."""
    found = math.gcd(size, most)
    for trace in traces:
        here = trace.arrays == number
        for values in (trace.starts, trace.sizes):
            found = math.gcd(found, *np.unique(values[here]).tolist())
    return found


class _State(NamedTuple):
    """The cache between accesses.

    An entry is a line in a half: of n lines, entry i is line i in the first, and entry n + i in the second.
    Behind all entries, `newer` and `older` have an end for each set, so that neighbors form a ring.
    """

    newer: IntArray
    older: IntArray
    inside: Any  # of each entry: whether it is in
    written: Any  # and newer than HBM
    sets: IntArray  # of each entry
    homes: IntArray  # of each line: its entry at home
    widths: IntArray  # of each line: bytes
    used: IntArray  # of each set: bytes
    capacity: int  # of each set: bytes
    halves: int


def _empty(cache: Cache, widths: IntArray) -> _State:
    lines, half = len(widths), cache.size // cache.halves
    sets = 1
    if cache.ways is not None:
        sets = max(1, half // (whole("ways", cache.ways) * max(1, int(widths.max(initial=1)))))
    scattered = _scattered(lines)
    places = (scattered >> np.uint64(1)) % np.uint64(sets)
    every = np.concatenate([places.astype(np.int64) + part * sets for part in range(cache.halves)])
    homes = np.arange(lines) + lines * (scattered % np.uint64(cache.halves)).astype(np.int64)
    entries, all_sets = cache.halves * lines, cache.halves * sets
    ring = np.arange(entries + all_sets)
    flags = np.zeros((2, entries), np.bool_)
    used = np.zeros(all_sets, np.int64)
    return _State(ring, ring.copy(), flags[0], flags[1], every, homes, widths, used, half // sets, cache.halves)


def _scattered(count: int) -> Any:
    """Return for each number from 0 on one that looks random: the finalizer of SplitMix64."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """Return the loop, compiled if numba is there."""
    try:
        import numba
    except ImportError:
        return _loop(_touch)
    compiled: Callable[..., Any] = numba.njit(_loop(numba.njit(_touch)))
    return compiled


def _touch(state: Any, entry: Any, width: Any) -> Any:
    """Make an entry the newest of its set and drop the oldest: whether it was in, and bytes that go to HBM."""
    place = state.sets[entry]
    end = len(state.sets) + place
    newer, older, lines = state.newer, state.older, len(state.widths)
    was_in = state.inside[entry]
    if was_in:
        newer[older[entry]], older[newer[entry]] = newer[entry], older[entry]
    else:
        state.inside[entry] = True
        state.used[place] += width
    newer[entry], older[entry] = end, older[end]
    newer[older[end]] = entry
    older[end] = entry
    to_hbm = 0
    while state.used[place] > state.capacity:
        last = newer[end]
        newer[end] = newer[last]
        older[newer[last]] = end
        state.inside[last] = False
        state.used[place] -= state.widths[last % lines]
        if state.written[last]:
            state.written[last] = False
            to_hbm += state.widths[last % lines]
    return was_in, to_hbm


def _loop(touch: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Any, stop: Any, kinds: Any, blocks: Any, workers: Any, state: Any) -> Any:
        """Play one kernel: bytes read from HBM, and written there."""
        from_hbm, to_hbm, given, lines = 0, 0, 0, len(state.widths)
        workers = min(workers, max(1, len(blocks) - 1))
        place, end = np.zeros(workers, np.int64), np.zeros(workers, np.int64)
        busy = True
        while busy:
            busy = False
            for worker in range(workers):
                while place[worker] == end[worker] and given < len(blocks) - 1:
                    place[worker], end[worker] = blocks[given], blocks[given + 1]
                    given += 1
                if place[worker] == end[worker]:
                    continue
                busy = True
                at = place[worker]
                place[worker] += 1
                reads, writes = kinds[at] != 1, kinds[at] != 0
                for line in range(first[at], stop[at]):
                    width, home = state.widths[line], state.homes[line]
                    near = line + lines * (worker % state.halves)
                    was_in = False
                    if near != home and not writes:
                        was_in, dropped = touch(state, near, width)
                        to_hbm += dropped
                    if not was_in:
                        if writes:
                            state.written[home] = True
                        was_in, dropped = touch(state, home, width)
                        to_hbm += dropped
                        if reads and not was_in:
                            from_hbm += width
        return from_hbm, to_hbm

    return run
