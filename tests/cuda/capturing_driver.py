"""A driver that captures as CUDA does: what it refuses meanwhile, what it records, and when copies arrive.

Memory is the host's and begins as garbage.  Kernels are those of `int8_hopper_played`, which read descriptors
from memory when they run: at once, or with each replay of a graph.
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend import capture
from cuda_backend.int8 import descriptors_hopper, few_hopper, memory_hopper, plan_hopper, product_hopper
from tests.cuda import int8_hopper_played
from tests.cuda.int8_hopper_driver import forget_plans
from tests.cuda.int8_hopper_played import aligned, played

GLOBAL, RELAXED, NON_BLOCKING = 0, 2, 1
REFUSED = SimpleNamespace(name="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
FULL = SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")
CAPTURING = capture.capturing
MAPS = {"product": 4, "narrow": 2, "layer_few": 1}

Work = tuple[str, Callable[[], Any]]


class CapturingDriver:
    """Streams, memory and one capture at a time, begun in the strictest mode."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=RELAXED)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=NON_BLOCKING)

    def __init__(self) -> None:
        self.captured: int | None = None  # the stream
        self.graph: list[Work] = []
        self.mode = GLOBAL
        self.full = False
        self.memory: list[Any] = []
        self.pending: dict[int, list[Callable[[], Any]]] = defaultdict(list)  # on streams made here

    @contextmanager
    def capture(self, stream: int) -> Iterator[list[Work]]:
        """Give the graph, which is filled by what is queued on `stream` meanwhile."""
        self.captured, self.graph = stream, []
        yield self.graph
        self.captured = None
        assert self.mode == GLOBAL

    def strict(self) -> bool:
        return self.captured is not None and self.mode != RELAXED

    def queued(self, name: str, stream: int, work: Callable[[], Any]) -> None:
        """Record work, keep it until its stream is waited for, or do it at once."""
        if stream == self.captured:
            self.graph.append((name, work))
        elif stream in self.pending:
            self.pending[stream].append(work)
        else:
            work()

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:
        before, self.mode = self.mode, mode
        return 0, before

    def cuStreamIsCapturing(self, stream: int) -> tuple[int, int]:
        return 0, int(stream == self.captured)

    def cuMemAlloc(self, size: int) -> tuple[Any, int]:
        if self.strict() or self.full:
            return REFUSED if self.strict() else FULL, 0
        self.memory.append(aligned((size,), "uint8"))
        return 0, self.memory[-1].ctypes.data

    def cuStreamCreate(self, flags: int) -> tuple[Any, int]:
        if self.strict():
            return REFUSED, 0
        assert flags == NON_BLOCKING, "others wait for the default stream, whatever that does"
        stream = 1000 + len(self.pending)
        self.pending[stream] = []
        return 0, stream

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        if self.strict() and stream != self.captured:
            return (REFUSED,)
        content = ctypes.string_at(source, size)
        self.queued("copy", stream, lambda: ctypes.memmove(target, content, size))
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any]:
        if self.strict() or stream == self.captured:
            return (REFUSED,)
        for work in self.pending[stream]:
            work()
        self.pending[stream].clear()
        return (0,)


def encoder(rows: int, row_bytes: int, pitch: int, _box_rows: int, _box_bytes: int) -> Callable[[int], Any]:
    """Return what makes the descriptor of a matrix: its four numbers, in memory as long as a real one."""

    def encode(address: int) -> Any:
        content = (ctypes.c_int64 * 16)(address, rows, row_bytes, pitch)
        return SimpleNamespace(getPtr=lambda: ctypes.addressof(content))

    return encode


def captures(monkeypatch: pytest.MonkeyPatch) -> CapturingDriver:
    """Let kernels be played, with the library's own memory and descriptors, by the driver returned."""
    driver = CapturingDriver()
    played(monkeypatch, {})
    for module in (capture, descriptors_hopper):
        monkeypatch.setattr(module, "driver", driver)
    monkeypatch.setattr(capture, "current_device", lambda: 0)
    for module in (product_hopper, few_hopper):
        monkeypatch.setattr(module, "encoder", encoder)
    monkeypatch.setattr(plan_hopper, "shared_by", memory_hopper.shared_by)
    for module in (capture, plan_hopper):
        monkeypatch.setattr(module, "capturing", CAPTURING)

    def launch(kernel: Callable[..., None], item: SimpleNamespace, _matrices: Any) -> None:
        def run() -> None:
            count = MAPS.get(item.name, 0)
            maps = ((ctypes.c_int64 * 16) * count).from_address(item.values[0]) if count else ()
            kernel(item, [tuple(each[:4]) for each in maps])

        driver.queued(item.name, item.stream, run)

    for name, kernel in int8_hopper_played.KERNELS.items():
        monkeypatch.setitem(int8_hopper_played.KERNELS, name, functools.partial(launch, kernel))
    forget()
    return driver


def forget() -> None:
    """Forget plans, memory and the stream of another driver."""
    forget_plans()
    memory_hopper.shared_by.cache_clear()
    capture._aside.cache_clear()
