"""An L2 cache of lines: the ones used last are kept, in one place or in two halves with sets.

>>> state = empty(Cache(2), np.ones(3, np.int64))  # three lines of a byte each, and room for two
>>> [bool(_touch(state, line, 1)[0]) for line in (0, 1, 0, 2, 0, 1)]  # was it there?
[False, False, True, False, True, False]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from memsim.cache.compiled import compiled
from refimpl.errors import OptionError
from refimpl.numerics import IntArray
from refimpl.validation import whole

__all__ = ["LOAD", "READ", "WRITE", "Cache", "State", "compiled_loop", "empty", "scattered"]

# What an access needs of a line, and does to it; and whether the line goes to the multiprocessor.
READ, WRITE, LOAD = 1, 2, 4


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


class State(NamedTuple):
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


def empty(cache: Cache, widths: IntArray) -> State:
    """Return an empty cache for lines of so many bytes.

    Raises
    ------
    OptionError
        If it has less than no bytes, other than one or two halves, or no ways.
    """
    whole("cache", cache.size, 0)
    if cache.halves not in (1, 2):
        raise OptionError(f"cache: expected 1 or 2 halves; got {cache.halves}")
    lines, half = len(widths), cache.size // cache.halves
    sets = 1
    if cache.ways is not None:
        sets = max(1, half // (whole("ways", cache.ways) * max(1, int(widths.max(initial=1)))))
    mixed = scattered(lines)
    places = (mixed >> np.uint64(1)) % np.uint64(sets)
    every = np.concatenate([places.astype(np.int64) + part * sets for part in range(cache.halves)])
    homes = np.arange(lines) + lines * (mixed % np.uint64(cache.halves)).astype(np.int64)
    entries, all_sets = cache.halves * lines, cache.halves * sets
    ring = np.arange(entries + all_sets)
    flags = np.zeros((2, entries), np.bool_)
    used = np.zeros(all_sets, np.int64)
    return State(
        ring, ring.copy(), flags[0], flags[1], every, homes, widths, used, half // sets, cache.halves
    )


def scattered(count: int) -> Any:
    """Return for each number from 0 on one that looks random: the finalizer of SplitMix64."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1)
def compiled_loop() -> Callable[..., Any]:
    """Return the loop, compiled if numba is there."""
    return compiled(_loop(compiled(_touch)))


def _touch(state: Any, entry: Any, width: Any) -> Any:
    """Make an entry the newest of its set, and drop the oldest: whether it was in, and bytes then written."""
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
    """Return the loop over a kernel's accesses, with `touch` compiled or not."""

    def run(first: Any, stop: Any, needs: Any, blocks: Any, workers: Any, state: Any) -> Any:
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
                reads, writes = needs[at] & READ, needs[at] & WRITE
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
