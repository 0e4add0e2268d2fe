"""Two levels of memory, counted: what a tiled algorithm moves between HBM and on-chip SRAM.

A reference written against `Memory` reads like the paper's algorithm, and what it moves is counted as it
runs, so a cost model can be held to the count exactly.

>>> import numpy as np
>>> hbm = Memory(log=True)
>>> q = np.ones((4, 2), np.float16)
>>> with hbm.on_chip():
...     q_i = hbm.load("Q", q, slice(0, 2))
>>> hbm.elements_read, hbm.bytes_read, hbm.peak, hbm.held
(4, 8, 4, 0)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from refimpl.errors import CapacityError
from refimpl.numerics import Array, FloatArray, contract, round_to, widen

__all__ = ["LOG_LIMIT", "Event", "Memory"]

# Steps that a log keeps: more than anyone reads, and less than fills a machine.
LOG_LIMIT = 100_000


class Event(NamedTuple):
    """One step of the log: what moved, how much, and what the SRAM holds afterwards."""

    step: int
    kind: Literal["load", "store", "compute", "free", "note"]
    array: str
    rows: str
    elements: int
    bytes: int
    on_chip: int


class Memory:
    """Counts loads and stores, and enforces the capacity of the SRAM.

    Parameters
    ----------
    capacity : int, optional
        Elements that fit on chip.  Exceeding it raises `CapacityError`.  None: unlimited, only counted.
    log : bool
        Keep every step in `events`, up to `LOG_LIMIT`.

    Attributes
    ----------
    elements_read, elements_written, bytes_read, bytes_written : int
        Totals moved from and to HBM.
    held, peak : int
        Elements on chip now, and at most so far.
    flops : int
        Operations of the products that went through `contract`, a multiply-add being two.
    state : dict of str to int
        Elements of each array that a recurrence carries from one step to the next (`keep`).
    events : list of Event
        The steps, if `log`.
    """

    def __init__(self, capacity: int | None = None, *, log: bool = False) -> None:
        self.capacity = capacity
        self.log = log
        self.elements_read = self.elements_written = 0
        self.bytes_read = self.bytes_written = 0
        self.held = self.peak = 0
        self.flops = 0
        self.state: dict[str, int] = {}
        self.events: list[Event] = []

    def load(self, name: str, array: Array, rows: slice | None = None) -> Array:
        """Copy `rows` of `array` from HBM onto the chip and return them, bfloat16 widened to float32."""
        source = array[rows if rows is not None else ...]
        self.elements_read += source.size
        self.bytes_read += source.nbytes
        self._hold(name, source)
        self._record("load", name, rows, source.size, source.nbytes)
        return widen(source).copy()

    def store(self, name: str, array: Array, rows: slice | None, tile: Array) -> None:
        """Write `tile`, rounded to the dtype of `array`, over `rows` of `array` in HBM."""
        target = array[rows if rows is not None else ...]
        target[...] = round_to(tile, array.dtype)
        self.elements_written += target.size
        self.bytes_written += target.nbytes
        self._record("store", name, rows, target.size, target.nbytes)

    def compute(self, name: str, tile: Array) -> Array:
        """Declare that `tile` was computed on chip and takes room there; return it."""
        self._hold(name, tile)
        self._record("compute", name, None, tile.size, 0)
        return tile

    def contract(self, subscripts: str, a: FloatArray, b: FloatArray) -> FloatArray:
        """Return ``numpy.einsum(subscripts, a, b)`` and count two operations for each product of elements.

        >>> import numpy as np
        >>> memory = Memory()
        >>> memory.contract("id,jd->ij", np.ones((3, 4)), np.ones((5, 4))).shape, memory.flops
        ((3, 5), 120)
        """
        left, right = subscripts.partition("->")[0].split(",")
        sizes = dict(zip(left + right, a.shape + b.shape, strict=True))
        self.flops += 2 * math.prod(sizes.values())
        return contract(subscripts, a, b)

    def keep(self, name: str, array: Array) -> Array:
        """Declare that `array` is carried to the next step, in place of what `name` was before; return it."""
        self.state[name] = array.size
        return array

    def note(self, text: str) -> None:
        """Put a remark into the log."""
        self._record("note", text, None, 0, 0)

    @contextmanager
    def on_chip(self) -> Iterator[None]:
        """Free, at the end of the block, everything that was loaded or computed inside it."""
        before = self.held
        try:
            yield
        finally:
            freed = self.held - before
            self.held = before
            if freed:
                self._record("free", "", None, freed, 0)

    def counted(self, what: str) -> dict[str, int]:
        """Return the counters that a price of kind `what` predicts: ``hbm``, ``flops`` or ``state``.

        >>> Memory().counted("flops")
        {'flops': 0}
        """
        if what == "flops":
            return {"flops": self.flops}
        if what == "state":
            return {"state_elements": sum(self.state.values())}
        return self.totals()

    def totals(self) -> dict[str, int]:
        """Return the four counters of traffic by name."""
        return {
            "elements_read": self.elements_read,
            "elements_written": self.elements_written,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }

    def _hold(self, name: str, tile: Array) -> None:
        if self.capacity is not None and self.held + tile.size > self.capacity:
            raise CapacityError(
                f"{name}: {tile.size} elements do not fit on chip beside the {self.held} held; "
                f"capacity {self.capacity}"
            )
        self.held += tile.size
        self.peak = max(self.peak, self.held)

    def _record(
        self,
        kind: Literal["load", "store", "compute", "free", "note"],
        name: str,
        rows: slice | None,
        elements: int,
        size: int,
    ) -> None:
        if self.log:
            if len(self.events) == LOG_LIMIT:
                raise CapacityError(f"log: more than {LOG_LIMIT} steps; take larger tiles or a shorter case")
            span = "" if rows is None else f"{rows.start}:{rows.stop}"
            self.events.append(Event(len(self.events) + 1, kind, name, span, elements, size, self.held))
