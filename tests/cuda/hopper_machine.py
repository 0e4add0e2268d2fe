"""A Hopper multiprocessor played by NumPy: the source of a kernel runs, its PTX instructions are played.

A warpgroup is one Python thread whose registers are vectors of 128 lanes; a thread that works alone is one
with scalars.  Shared memory is bytes, barriers count arrivals and bytes, descriptors are decoded bit by bit,
so a wrong layout, parity, count or turn gives wrong numbers or hangs, and a hang is an error.  If everybody
waits, it is one at once, which says who waits for what.

What the hardware does later, at a time that no program knows, is done as early (`late` False) or as late
(True) as it may be: a product reads shared memory when it is issued or when it is waited for, a copy arrives
when it is started or when somebody waits for it.  Until then registers and tiles hold NaN.  What the tensor
cores or the copy engine read must have been published after it was stored.
"""

from __future__ import annotations

import ctypes
import functools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

KINDS = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
LANES = np.arange(128)
PATIENCE = 60.0  # seconds until a wait is called a hang


class HangError(AssertionError):
    """Somebody waits for what nobody does."""


def one(value: Any) -> int:
    """Return a number that all lanes agree on."""
    if np.ndim(value) == 0:
        return int(value)
    values = np.unique(value)
    assert values.size == 1, "lanes differ where the instruction wants one value"
    return int(values[0])


def memory(address: int, size: int) -> Any:
    """Return bytes of the host, which stand for global memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def swizzled(address: Any, width: int = 128) -> Any:
    """Return where a byte lies: bits 4 to 6 are changed by bits 7 to 9; in 32 bytes bit 4 by bit 7."""
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4)


def fragment(columns: int) -> tuple[Any, Any]:
    """Return rows and columns of accumulators [columns // 2, 128]."""
    index = np.arange(columns // 2)[:, None]
    warp, lane = LANES // 32, LANES % 32
    rows = 16 * warp + lane // 4 + 8 * (index % 4 // 2)
    return np.broadcast_to(rows, (columns // 2, 128)), 8 * (index // 4) + 2 * (lane % 4) + index % 2


def join(known: dict[Any, int], more: dict[Any, int]) -> None:
    """Let `known` say the later of what two clocks say of everybody."""
    for who, time_ in more.items():
        known[who] = max(known.get(who, 0), time_)


class Barrier:
    """An mbarrier; and what is known to whom it lets go on, which `happens_before` keeps."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.missing = arrivals
        self.bytes = self.phase = 0
        self.coming: dict[Any, int] = {}
        self.known: dict[Any, int] = {}

    def count(self, arrivals: int, size: int) -> None:
        """Count arrivals and announced (or, negative, arrived) bytes."""
        assert arrivals <= self.missing, "more arrivals than the barrier was made for"
        self.missing, self.bytes = self.missing - arrivals, self.bytes + size
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.arrivals, self.phase + 1
            join(self.known, self.coming)
            self.coming = {}


class Machine:
    """Blocks of one grid that run side by side."""

    def __init__(self, *, late: bool, seed: int = 0) -> None:
        self.late, self.changed, self.own = late, threading.Condition(), threading.local()
        self.random = random.Random(seed)
        self.maps: list[Any] = []
        self.problems: list[BaseException] = []
        self.counts: dict[str, int] = {}
        self.additions: list[tuple[int, int]] = []  # where to, and the tile of who added
        self.waiting: dict[int, tuple[Callable[[], bool], str]] = {}  # by thread: for what, in words
        self.running = 0
        self.names: dict[int, str] = {}  # of barriers

    @property
    def block(self) -> Block:
        """The block of the calling thread."""
        return self.own.block  # type: ignore[no-any-return]

    def run(self, roles: list[tuple[Block, int, Callable[[], None]]]) -> None:
        """Run roles, each in a block on a number of lanes, until all have ended."""

        def play(block: Block, lanes: int, role: Callable[[], None]) -> None:
            self.own.block, self.own.lanes, self.own.groups, self.own.open = block, lanes, [], []
            self.own.added, self.own.unpublished, self.own.tile = [], set(), -1
            try:
                role()
                assert not self.own.groups, "products are still running at the end"
            except BaseException as error:
                self.problems.append(error)
                block.meeting.abort()
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

        self.running = len(roles)
        threads = [threading.Thread(target=play, args=role, daemon=True) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.problems:
            raise self.problems[0]

    def until(self, condition: Callable[[], bool], what: str = "something") -> None:
        """Wait, with `changed` held, until `condition`, which other threads may ask, too."""
        end, me = time.monotonic() + PATIENCE, threading.get_ident()
        self.waiting[me] = condition, f"{threading.current_thread().name} waits for {what}"
        try:
            while not condition():
                if self.problems or time.monotonic() > end:
                    raise HangError("a wait does not end")
                if len(self.waiting) == self.running and not any(met() for met, _ in self.waiting.values()):
                    raise HangError("; ".join(sorted(words for _, words in self.waiting.values())))
                self.changed.wait(0.2)
        finally:
            del self.waiting[me]

    def released(self, barrier: Barrier) -> None:
        """Note that the calling thread arrives: who goes on will know what it has done."""

    def acquired(self, barrier: Barrier) -> None:
        """Note that the calling thread goes on."""

    def pause(self) -> None:
        """Let others overtake, now and then."""
        if self.random.random() < 0.05:
            time.sleep(0.0005)


class Block:
    """One block: its number, shared memory, barriers, copies under way, those of its threads that meet."""

    def __init__(self, number: int, size: int, those_that_meet: int) -> None:
        self.number = number
        self.shared = np.full(size, 0xFF, np.uint8)  # NaN in every format
        self.dirty = np.zeros(size, bool)
        self.barriers: dict[int, Barrier] = {}
        self.turns: dict[int, Barrier] = defaultdict(lambda: Barrier(2))  # of two warpgroups
        self.copies: list[tuple[int, Callable[[], int]]] = []
        self.meeting = threading.Barrier(those_that_meet, timeout=PATIENCE)
        self.warps = [threading.Barrier(32, timeout=PATIENCE) for _ in range(16)]
        self.slots: list[Any] = [None] * 512

    def exchange(self, thread: int, value: Any, mask: int) -> Any:
        """Return the value of another lane of the warp, for threads that run alone."""
        self.slots[thread] = value
        self.warps[thread // 32].wait()
        other = self.slots[thread ^ mask]
        self.warps[thread // 32].wait()
        return other

    def store(self, places: Any, data: Any) -> None:
        """Store bytes as a thread does: nobody but threads sees them until they are published."""
        self.shared[places], self.dirty[places] = data, True

    def read(self, places: Any) -> Any:
        """Read bytes as tensor cores and the copy engine do."""
        assert not self.dirty[places].any(), "read what was stored but not published"
        return self.shared[places]


@functools.lru_cache(256)
def operand_bytes(descriptor: int, rows: int, turned: bool) -> Any:
    """Return where the 32 bytes of each row lie that a wgmma descriptor describes."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = {1: 128, 3: 32}[descriptor >> 62]  # of the swizzle
    r, byte = np.arange(rows)[:, None], np.arange(32)[None]
    if turned:
        assert width == 128
        k = byte // 2
        address = start + r // 64 * leading + k // 8 * stride + k % 8 * 128 + r % 64 * 2 + byte % 2
    else:
        address = start + r // 8 * stride + r % 8 * width + byte
    return swizzled(address, width)


def operand(block: Block, descriptor: int, rows: int, turned: bool, kind: Any) -> Any:
    """Return the matrix [rows, 16] that a wgmma descriptor describes; of codes, [rows, 32]."""
    found = block.read(operand_bytes(int(descriptor), rows, turned))
    return np.ascontiguousarray(found).view(kind).astype(np.float32)


class Product:
    """A chain of wgmma that has been issued: what it adds is known early or late."""

    def __init__(self, accumulators: Any, old: Any, compute: Callable[[], Any], late: bool) -> None:
        self.accumulators, self.old, self.compute = accumulators, old, compute
        self.value = None if late else compute()
        accumulators[...] = np.nan

    def finish(self) -> None:
        """Write the sums."""
        value = self.compute() if self.value is None else self.value
        self.accumulators[...] = self.old + value[fragment(value.shape[1])]
