"""What has been read or overwritten without a barrier between: found whatever threads happen to do first.

Each role has a clock, and knows of others what barriers have told it.  Memory remembers of each cell who
wrote it and who has read it, and when: who does not know of that may come too early.  A copy is written by
the barrier on which it completes; a product reads from when it is issued until it is waited for.

Source: L. Lamport 1978, "Time, Clocks, and the Ordering of Events in a Distributed System",
doi:10.1145/359545.359563.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import numpy as np

from tests.cuda.hopper_machine import Barrier, Machine, join

CELL = 4  # bytes
UNDER_WAY = 1 << 60


class RaceError(AssertionError):
    """An access that no barrier orders behind an earlier one."""


class Clocked(Machine):
    """A machine whose roles know of each other what barriers tell them."""

    @property
    def block(self) -> Any:
        """The block of the calling thread, whose shared memory is watched."""
        return self.own.block

    def begin(self, name: str) -> None:
        """Give the calling thread a clock."""
        self.own.name, self.own.known = name, {name: 1}

    def released(self, barrier: Barrier) -> None:
        join(barrier.coming, self.own.known)
        self.own.known[self.own.name] += 1

    def acquired(self, barrier: Barrier) -> None:
        join(self.own.known, barrier.known)
        self.own.known[barrier] = barrier.phase


def cells_of(places: Any) -> Any:
    """Return the cells in which bytes lie."""
    return np.unique(np.asarray(places).reshape(-1) // CELL)


class Watch:
    """Who wrote and read each cell of a memory."""

    def __init__(self, machine: Clocked, size: int, what: str) -> None:
        cells = -(-size // CELL)
        self._machine, self._what = machine, what
        self._writer, self._written = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self._writers: list[Any] = [None]
        self._reads: dict[str, Any] = defaultdict(lambda: np.zeros(cells, np.int64))
        self._lock = threading.RLock()

    def write(self, cells: Any, barrier: Barrier | None = None) -> None:
        """Note a store of the calling thread, or a copy that it has started."""
        own = self._machine.own
        with self._lock:
            self.after_writes(cells, "overwritten before it")
            for who, times in self._reads.items():
                if (times[cells] > own.known.get(who, 0)).any():
                    self._complain(f"overwritten while {who} may still read it")
            by, time = (own.name, own.known[own.name]) if barrier is None else (barrier, barrier.phase + 1)
            if by not in self._writers:
                self._writers.append(by)
            self._writer[cells], self._written[cells] = self._writers.index(by), time

    def read(self, cells: Any, *, under_way: bool = False) -> None:
        """Note a load of the calling thread, or that a product begins to read."""
        own = self._machine.own
        with self._lock:
            self.after_writes(cells, "read before it")
            self._reads[own.name][cells] = UNDER_WAY if under_way else own.known[own.name]

    def look(self, cells: Any) -> None:
        """Note a load that waits for a word to change: it may come too early, what overwrites may not."""
        own = self._machine.own
        with self._lock:
            self._reads[own.name][cells] = own.known[own.name]

    def end_reads(self, ended: list[Any], under_way: list[Any]) -> None:
        """Note which cells products of the calling thread have read, and which they still read."""
        own = self._machine.own
        with self._lock:
            times = self._reads[own.name]
            for cells in ended:
                times[cells] = own.known[own.name]
            for cells in under_way:
                times[cells] = UNDER_WAY

    def after_writes(self, cells: Any, how: str) -> None:
        """Complain if the calling thread does not know that what is here has been written."""
        known = self._machine.own.known
        with self._lock:
            for number in np.unique(self._writer[cells]):
                times = self._written[cells[self._writer[cells] == number]]
                if number and (times > known.get(self._writers[number], 0)).any():
                    self._complain(f"{how} is known to have been written")

    def _complain(self, problem: str) -> None:
        raise RaceError(f"{self._machine.own.name}: {self._what} is {problem}")
