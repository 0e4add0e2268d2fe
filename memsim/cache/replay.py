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
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np

from memsim.cache.lru import LOAD, READ, WRITE, Cache, compiled_loop, empty
from refimpl.errors import OptionError
from refimpl.numerics import IntArray
from refimpl.validation import whole

__all__ = ["Access", "Block", "Cache", "Kernel", "Program", "Traffic", "play", "replay", "total", "traced"]

LINE = 1 << 13
# What each kind of access needs of a line, and which kinds cross to the multiprocessor, and back.
_KINDS = {"read": 0, "write": 1, "update": 2, "add": 3}
_NEEDS = (READ | LOAD, WRITE, READ | WRITE | LOAD, READ | WRITE)
_ASKS = ((0, 2), (1, 2, 3))


Kind = Literal["read", "write", "update", "add"]


class Access(NamedTuple):
    """Bytes `start` to ``start + size`` of an array, and what is done with them.

    They are read, written, read and written (``"update"``), or added to by the cache itself (``"add"``),
    which needs what was there, but sends nothing to the multiprocessor.
    """

    array: str
    start: int
    size: int
    kind: Kind = "read"


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
    kernels: Sequence[Kernel], arrays: Mapping[str, int], *, cache: int | Cache, line: int = LINE
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
    return play(traced(kernels, arrays, line), range(len(kernels)), cache)


class Program(NamedTuple):
    """Kernels as numbers, to be played in any order; arrays lie one behind the other, in lines."""

    kernels: tuple[_Trace, ...]
    widths: IntArray  # of each line: bytes


class _Trace(NamedTuple):
    """All accesses of a kernel in the order of its blocks: lines, what they need, and where blocks begin."""

    name: str
    workers: int
    first: IntArray
    stop: IntArray
    needs: IntArray
    blocks: IntArray
    l2_read: int
    l2_write: int


def traced(kernels: Sequence[Kernel], arrays: Mapping[str, int], line: int = LINE) -> Program:
    """Return kernels as numbers; arguments and errors are those of `replay`."""
    whole("line", line)
    tables = [_table(kernel, arrays) for kernel in kernels]
    each, counts = [], []
    for number, size in enumerate(arrays.values()):
        places = [
            value for table, _ in tables for value in table[table[:, 0] == number, 1:3].ravel().tolist()
        ]
        each.append(math.gcd(line, size, *places))
        counts.append(size // each[-1])
    bases = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    widths = np.array(each, np.int64)
    found = []
    for kernel, (table, order) in zip(kernels, tables, strict=True):
        array, start, size, kind = table.T
        first = bases[array] + start // widths[array]
        stop = first + size // widths[array]
        often = np.bincount(order, minlength=len(table))
        asked = [int((size * often)[np.isin(kind, kinds)].sum()) for kinds in _ASKS]
        blocks = np.cumsum([0, *(len(block.accesses) for block in kernel.blocks)], dtype=np.int64)
        needs = np.array(_NEEDS, np.int64)[kind]
        found.append(
            _Trace(kernel.name, kernel.workers, first[order], stop[order], needs[order], blocks, *asked)
        )
    return Program(tuple(found), np.repeat(widths, counts))


def _table(kernel: Kernel, arrays: Mapping[str, int]) -> tuple[IntArray, IntArray]:
    """Return a kernel's different accesses as rows of numbers, and the order in which they come."""
    whole("workers", kernel.workers)
    order = list(chain.from_iterable(block.accesses for block in kernel.blocks))
    marks = list(map(id, order))
    distinct = dict(zip(marks, order, strict=True))  # those that blocks share are looked at once
    for name in {access.array for access in distinct.values()} - arrays.keys():
        raise OptionError(f"{kernel.name}: expected bytes of {sorted(arrays)}; got those of {name!r}")
    numbers = {name: number for number, name in enumerate(arrays)}
    columns = tuple(zip(*distinct.values(), strict=True)) or ((),) * 4
    named = (map(numbers.__getitem__, columns[0]), *columns[1:3], map(_KINDS.__getitem__, columns[3]))
    table = np.stack([np.fromiter(column, np.int64, len(distinct)) for column in named], axis=1)
    array, start, size, _ = table.T
    outside = (start < 0) | (size < 0) | (start + size > np.array([*arrays.values(), 0])[array])
    if outside.any():
        wrong = list(distinct.values())[int(outside.argmax())]
        raise OptionError(f"{kernel.name}: {wrong.array} has {arrays[wrong.array]} bytes; got {wrong}")
    places = dict(zip(distinct, range(len(distinct)), strict=True))
    return table, np.fromiter(map(places.__getitem__, marks), np.int64, len(order))


def play(program: Program, order: Iterable[int], cache: int | Cache) -> list[Traffic]:
    """Return what kernels of a program move, by their numbers and in that order, from an empty cache on."""
    state = empty(cache if isinstance(cache, Cache) else Cache(cache), program.widths)
    run, found = compiled_loop(), []
    for number in order:
        kernel = program.kernels[number]
        read, written = run(kernel.first, kernel.stop, kernel.needs, kernel.blocks, kernel.workers, state)
        left = int((state.written.reshape(state.halves, -1) * state.widths).sum())
        found.append(Traffic(kernel.name, kernel.l2_read, kernel.l2_write, int(read), int(written), left))
    return found


def total(found: Sequence[Traffic]) -> Traffic:
    """Return the sum over kernels; what is left is what the last one left."""
    read, write, dram_read, dram_write = (
        sum(getattr(one, name) for one in found) for name in Traffic._fields[1:-1]
    )
    return Traffic("all", read, write, dram_read, dram_write, found[-1].left if found else 0)
