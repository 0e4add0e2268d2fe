"""Two threads that call one layer at once: each launch has the arguments of its own call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend import capture
from cuda_backend.attention import counters
from cuda_backend.int8 import descriptors_hopper, launches_hopper, memory_hopper, plan_hopper
from cuda_backend.int8.plan_hopper import linear_plan
from tests.cuda.int8_hopper_driver import forget_plans, remembered

STREAM, OUTPUTS = 5, (0x111000, 0x222000)
OUT_AT = {"layer_few": 3, "narrow": 2, "product": 4}  # where a kernel's arguments name the output


class SlowDriver:
    """What takes its time while other threads run: memory, and launches, which read arguments late."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self) -> None:
        self.asked = 0

    def cuMemAlloc(self, _: int) -> tuple[int, int]:
        self.asked += 1
        time.sleep(0.05)
        return 0, self.asked << 30

    def cuStreamIsCapturing(self, _: int) -> tuple[int, int]:
        return 0, 0

    def __getattr__(self, name: str) -> Callable[..., tuple[int, int]]:
        return lambda *_: (0, 0)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDriver]:
    driver = SlowDriver()
    monkeypatch.setattr(capture, "driver", driver)
    monkeypatch.setattr(capture, "current_device", lambda: 0)
    caches = memory_hopper.shared_by, counters.tile_counters, capture._aside
    for each in caches:
        each.cache_clear()
    yield driver
    for each in caches:
        each.cache_clear()
    forget_plans()


def together(calls: list[Callable[[], Any]]) -> None:
    """Run calls in threads of their own, each begun while the one before waits."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("T", [2, 20, 4096])
@pytest.mark.parametrize("which", ["first calls", "later calls", "one is captured"])
def test_layers(monkeypatch: pytest.MonkeyPatch, slow: SlowDriver, T: int, which: str) -> None:
    found = remembered(monkeypatch)
    monkeypatch.setattr(plan_hopper, "shared_by", memory_hopper.shared_by)
    monkeypatch.setattr(descriptors_hopper.Descriptors, "place", lambda *_: 0)

    def late(launch: Callable[..., Any]) -> Callable[..., Any]:
        def launched(*arguments: Any) -> Any:
            time.sleep(0.03)
            return launch(*arguments)

        return launched

    for name in ("cuLaunchKernelEx", "cuLaunchKernel"):
        monkeypatch.setattr(
            launches_hopper.driver, name, late(getattr(launches_hopper.driver, name)), raising=False
        )
    K = N = 1024
    layouts: Any = (
        ((T, K), (2 * K, 2), "float16", None), ((K, N), (1, K), "int8", None), None,
        ((N,), (4,), "float32", None), None,
    )  # fmt: skip

    def call(out: int) -> None:
        linear_plan(*layouts, 6.0, "released", STREAM, 0).run(0x10000, 0x20000, 0x30000, 0, 0, out)

    if which != "first calls":
        call(0x333000)
        found.clear()
    if which == "one is captured":  # whose memory and lock are others
        recorded = iter([False, True])
        monkeypatch.setattr(plan_hopper, "capturing", lambda _: next(recorded))
    together([lambda out=out: call(out) for out in OUTPUTS])  # type: ignore[misc]
    written = [item.values[OUT_AT[item.name]] for item in found if item.name in OUT_AT]
    assert sorted(written) == list(OUTPUTS)


@pytest.mark.parametrize("make", [counters.tile_counters, lambda *of: memory_hopper.shared_by(*of, False)])
def test_what_a_stream_has_is_made_once(slow: SlowDriver, make: Callable[..., Any]) -> None:
    made: list[Any] = []
    together([lambda: made.append(make(STREAM, 0))] * 2)
    assert made[0] is made[1]
    assert slow.asked == 1
