"""Memory of a `Clocked` machine that knows who may touch what: global memory, and that of a block.

Global memory is one arena of the host's: an access outside the arrays that were placed there is an error, as
is one to shared memory outside what was asked for.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from tests.cuda.happens_before import Clocked, Watch, cells_of
from tests.cuda.hopper_machine import Barrier, Block

SLACK = 256  # bytes from the start of shared memory to where the kernel's begins
ROOM = 1 << 22


class Arena:
    """Global memory: bytes, which of them belong to an array, how often each was stored.

    Of those that are watched nobody may read or overwrite what he does not know to have been stored.
    """

    def __init__(self, machine: Clocked) -> None:
        self._bytes = np.full(ROOM + 1024, 0xA5, np.uint8)
        self._start, self._end = self._bytes.ctypes.data, -self._bytes.ctypes.data % 1024
        self._valid, self._watched, self._hidden = np.zeros((3, ROOM + 1024), bool)
        self.stores = np.zeros(ROOM + 1024, np.int32)
        self.watch = Watch(machine, ROOM + 1024, "global memory")
        self.told: dict[int, Barrier] = defaultdict(lambda: Barrier(1))  # by whoever has changed a word
        self.passed = 0  # turns, in all words
        self._machine, self._own = machine, machine.own

    def place(self, array: Any, *, watched: bool = False) -> Any:
        """Return a copy of an array that lies here, at a multiple of 256 bytes."""
        start, size = self._end, array.nbytes
        self._end = -(-(start + size) // 256) * 256 + 256
        self._valid[start : start + size], self._watched[start : start + size] = True, watched
        found = self._bytes[start : start + size].view(array.dtype).reshape(array.shape)
        found[...] = array
        return found

    def stored(self, array: Any) -> Any:
        """Return how often each byte of an array has been stored."""
        return self.stores[array.ctypes.data - self._start :][: array.nbytes]

    def places(self, addresses: Any, size: int) -> Any:
        """Return indices [lanes, size] of bytes, all of which must belong to arrays."""
        start = np.asarray(addresses, np.int64).reshape(-1, 1) - self._start
        assert np.all(start % size == 0), "misaligned"
        places = start + np.arange(size)
        assert self._valid[places].all(), "outside all arrays"
        return places

    def load(self, addresses: Any, size: int) -> Any:
        """Return bytes [lanes, size] that threads load."""
        assert self._own.behind_earlier_grids, "read before the grid ahead has ended"
        places = self.places(addresses, size)
        seen = places[self._watched[places]]
        if seen.size:
            self.watch.read(cells_of(seen))
        return self._bytes[places]

    def look(self, address: Any) -> Any:
        """Return a word as a relaxed load sees it: who looks may not yet know what was done before."""
        assert self._own.behind_earlier_grids, "read before the grid ahead has ended"
        places = self.places(address, 4)
        if self._watched[places].all():
            self.watch.look(cells_of(places))
        return self._bytes[places].view(np.int32)[0, 0]

    def store(self, addresses: Any, data: Any) -> None:
        """Store bytes [lanes, size] as threads do: the copy engine must be told of it."""
        places = self.places(addresses, data.shape[-1])
        assert np.unique(places).size == places.size, "two lanes store to one place"
        self._bytes[places], self._hidden[places] = data, True
        self.stores[places] += 1
        seen = places[self._watched[places]]
        if seen.size:
            self.watch.write(cells_of(seen))
        self._own.hidden.append(places)
        self._own.apart = True

    def pass_on(self, address: Any) -> None:
        """Let who sees a word know what the calling thread has done."""
        self._machine.released(self.told[int(address)])
        self.told[int(address)].count(1, 0)

    def publish(self) -> None:
        """Tell the copy engine what the calling thread has stored."""
        for places in self._own.hidden:
            self._hidden[places] = False
        self._own.hidden.clear()

    def copied(self, array: Any) -> None:
        """Note that the copy engine reads an array."""
        first = array.ctypes.data - self._start + array.strides[0] * np.arange(len(array))
        places = first[:, None] + np.arange(array.shape[1])
        assert not self._hidden[places].any(), "the copy engine reads what it has not been told of"
        self.watch.after_writes(cells_of(places), "copied before it")


class SharedBlock(Block):
    """A block whose shared memory is watched."""

    def __init__(self, machine: Clocked, number: int, size: int, roles: int) -> None:
        super().__init__(number, SLACK + size, roles)
        self.watch = Watch(machine, SLACK + size, "shared memory")

    def places(self, addresses: Any, size: int) -> Any:
        """Return indices [lanes, size] of bytes."""
        start = np.asarray(addresses, np.int64).reshape(-1, 1)
        assert np.all(start % size == 0), "misaligned"
        assert np.all((start >= SLACK) & (start + size <= self.shared.size)), "outside shared memory"
        places = start + np.arange(size)
        assert not self.barriers.keys() & set(places[:, 0].tolist()), "a barrier's bytes"
        return places
