"""PyTorch's caching allocator, played: granules, segments, splitting and merging, and so fragmentation.

>>> allocator = CachingAllocator()
>>> small = allocator.take(1000)
>>> allocator.allocated, allocator.reserved  # a granule of 512 bytes, a segment of 2 MiB
(1024, 2097152)
>>> allocator.give(small)
>>> allocator.allocated, allocator.reserved
(0, 2097152)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

from memsim.memory.step_memory import Step
from refimpl.validation import whole

__all__ = ["Block", "CachingAllocator", "Played", "play"]

# https://github.com/pytorch/pytorch, c10/cuda/CUDACachingAllocator.cpp, the constants at its head.
GRANULE = 512
SMALL = 2**20  # the largest request that goes to the pool of small blocks
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20
OWN_SEGMENT = 10 * 2**20  # the least request that has a segment of its own
ROUND_SEGMENT = 2 * 2**20


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment; pieces know their neighbors."""

    segment: int
    offset: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """What free blocks are sorted by: the smallest first, of equal ones that with the lowest address."""
        return self.size, self.segment, self.offset


class CachingAllocator:
    """The allocator of one stream, without limits to splitting and without expandable segments.

    Attributes
    ----------
    allocated, reserved : int
        Bytes of blocks in use, and of segments taken from the driver.
    peak_allocated, peak_reserved : int
        The most of each so far.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._segments = 0
        self._free: dict[bool, list[tuple[tuple[int, int, int], Block]]] = {True: [], False: []}

    def take(self, size: int) -> Block:
        """Return a block for `size` bytes: the best fit of the free ones, or a new segment's.

        Raises
        ------
        OptionError
            If `size` is no whole number above 0.
        """
        size = -(-whole("size", size) // GRANULE) * GRANULE
        small = size <= SMALL
        block = self._best_fit(size, small) or self._new_segment(size, small)
        rest = block.size - size
        if rest >= GRANULE if small else rest > SMALL:
            self._split(block, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def give(self, block: Block) -> None:
        """Take a block back; it melts with free neighbors, and stays reserved."""
        self.allocated -= block.size
        block.free = True
        for neighbor in (block.before, block.after):
            if neighbor is not None and neighbor.free:
                self._remove(neighbor)
                first, second = (neighbor, block) if neighbor is block.before else (block, neighbor)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        block.free = True
        insort(self._free[block.small], (block.place, block), key=lambda item: item[0])

    def _best_fit(self, size: int, small: bool) -> Block | None:
        pool = self._free[small]
        index = bisect_left(pool, (size, 0, 0), key=lambda item: item[0])
        if index == len(pool):
            return None
        block = pool.pop(index)[1]
        block.free = False
        return block

    def _remove(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, block.place, key=lambda item: item[0])]

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            length = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            length = LARGE_SEGMENT
        else:
            length = -(-size // ROUND_SEGMENT) * ROUND_SEGMENT
        self._segments += 1
        self.reserved += length
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Block(self._segments, 0, length, small)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(
            block.segment, block.offset + size, block.size - size, block.small, True, block, block.after
        )
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        insort(self._free[rest.small], (rest.place, rest), key=lambda item: item[0])


class Played(NamedTuple):
    """What a step takes from the allocator at most: in use, and from the driver."""

    allocated: int
    reserved: int

    @property
    def overhead(self) -> float:
        """What is reserved besides what is in use, as a share of that."""
        return self.reserved / self.allocated - 1


def play(step: Step) -> Played:
    """Return what PyTorch's allocator makes of a step.

    >>> from memsim.memory.run import Run
    >>> from memsim.memory.step_memory import step_memory
    >>> step = step_memory(model="gpt2", run=Run(sequence=1024))
    >>> played = play(step)
    >>> step.peak <= played.allocated <= played.reserved
    True
    """
    allocator = CachingAllocator()
    blocks: dict[object, Block] = {}
    for event in step.events:
        if event.size > 0:
            blocks[event.key] = allocator.take(event.size)
        elif event.size < 0:
            allocator.give(blocks.pop(event.key))
    return Played(allocator.peak_allocated, allocator.peak_reserved)
