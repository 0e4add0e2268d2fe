"""Timing by events and the current GPU, with a driver whose clock the test turns: no GPU needed."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend import context, timing
from refimpl.errors import BackendUnavailableError


class Driver:
    """A GPU that does what it is given at once; its clock moves when a call or a write says so."""

    def __init__(self) -> None:
        self.clock, self.events, self.log = 0.0, {}, []
        self.flushed = False

    def cuEventCreate(self, _: int) -> tuple[int, int]:
        self.events[len(self.events)] = 0.0
        return 0, len(self.events) - 1

    def cuEventDestroy(self, _: int) -> tuple[int]:
        return (0,)

    def cuEventRecord(self, event: int, _: int) -> tuple[int]:
        if event == 0:
            assert self.flushed, "the caches are to be emptied before each measurement"
            self.flushed = False
        self.events[event] = self.clock
        return (0,)

    def cuEventSynchronize(self, _: int) -> tuple[int]:
        return (0,)

    cuStreamSynchronize = cuEventSynchronize  # noqa: N815 (the name of the driver)
    cuMemFree = cuEventSynchronize  # noqa: N815

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return 0, 1e3 * (self.events[end] - self.events[start])  # milliseconds

    def cuMemAlloc(self, _: int) -> tuple[int, int]:
        return 0, 4096

    def cuMemsetD8Async(self, *_: int) -> tuple[int]:
        self.clock, self.flushed = self.clock + 1.0, True
        return (0,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(timing, "driver", fake)
    monkeypatch.setattr(timing, "current_device", lambda: 0)
    return fake


def test_medians_of_rounds_in_turn(driver: Driver) -> None:
    seconds = {"a": iter([9.0] * 2 + [1.0] * 4 + [5.0] * 4 + [2.0] * 4), "b": iter([3.0] * 100)}

    def contestant(name: str) -> Any:
        def call(index: int) -> None:
            driver.clock += next(seconds[name])
            driver.log.append((name, index))

        return call

    found = timing.interleaved({name: contestant(name) for name in "ab"}, rounds=3)
    assert (found["a"].device_s, found["a"].least_s) == (2.0, 1.0)
    assert found["b"].device_s == 3.0
    assert [name for name, _ in driver.log] == ["a"] * 2 + ["b"] * 2 + (["a"] * 4 + ["b"] * 4) * 3
    indices = [index for name, index in driver.log if name == "a"][2:]
    assert indices == list(range(8, 20))  # each set of inputs in its turn


def test_long_calls_are_made_once_a_round(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", lambda: driver.clock)
    calls = []

    def slow(index: int) -> None:
        driver.clock += 0.3
        calls.append(index)

    assert timing.interleaved({"slow": slow}, rounds=2)["slow"].device_s == pytest.approx(0.3)
    assert len(calls) == 2 + 2


def test_a_contestant_is_called_in_its_context(driver: Driver) -> None:
    inside: list[bool] = []
    state = {"entered": 0, "on": False}

    @contextmanager
    def switched() -> Any:
        state.update(entered=state["entered"] + 1, on=True)
        yield
        state["on"] = False

    def call(_: int) -> None:
        inside.append(bool(state["on"]))

    timing.interleaved({"a": call, "b": call}, contexts={"b": switched}, rounds=2, calls=1)
    assert state["entered"] == 1 + 2
    assert inside.count(True) == inside.count(False)


@pytest.fixture
def numba(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver with a current context by thread, and a Numba that makes one current when it is asked."""
    state = SimpleNamespace(context=None, device=3, asked=0)

    def current_context() -> None:
        state.asked += 1
        state.context = state.context or 0x1000

    fake = SimpleNamespace(
        cuCtxGetCurrent=lambda: (0, state.context), cuCtxGetDevice=lambda: (0, state.device)
    )
    monkeypatch.setattr(context, "driver", fake)
    monkeypatch.setattr(context, "_devices", {})
    monkeypatch.setattr(context, "missing", lambda _: None)
    monkeypatch.setattr(context, "cuda", SimpleNamespace(current_context=current_context))
    return state


def test_numba_is_asked_once_for_each_context(numba: SimpleNamespace) -> None:
    assert [context.current_device() for _ in range(3)] == [3, 3, 3]
    assert numba.asked == 1
    numba.context, numba.device = 0x2000, 1  # another GPU is made current
    assert [context.current_device() for _ in range(3)] == [1, 1, 1]
    assert numba.asked == 2
    numba.context, numba.device = 0x1000, 3
    assert context.current_device() == 3
    assert numba.asked == 2
    numba.context = None  # another thread, which has none yet
    assert context.current_device() == 3
    assert numba.asked == 3
    assert numba.context == 0x1000


def test_without_a_gpu_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "missing", lambda _: "no driver")
    monkeypatch.setattr(context, "_devices", {})
    with pytest.raises(BackendUnavailableError, match="cuda: no driver"):
        context.current_device()


def test_an_error_of_the_driver_is_named() -> None:
    failed = SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        context.checked((failed, 3))
    assert context.checked((0, 3)) == 3
    assert context.checked((0,)) is None
