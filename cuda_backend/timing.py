"""How long calls take on a GPU: CUDA events, contestants in turn, inputs that have left the cache.

Clocks and neighbours drift, so contestants are timed round by round, and the median of the rounds counts.
Before each measurement a write to a large buffer empties the L2 cache and keeps the GPU busy while the host
queues the calls: what is measured is the GPU, also for kernels shorter than their launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any, NamedTuple

from cuda_backend.context import checked, current_device, driver

__all__ = ["Timing", "device_name", "input_sets", "interleaved"]

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
FLUSH_BYTES_PER_S = 8e12  # more than any GPU writes, so that the head start is not too short
LONG_S = 20e-3
LEAST_ROTATED_BYTES = 128 << 20  # twice the L2 cache of an H200

Call = Callable[[int], object]
Context = Callable[[], AbstractContextManager[Any]]


class Timing(NamedTuple):
    """Seconds for one call.

    Attributes
    ----------
    device_s, least_s
        On the GPU: the median of the rounds, and the least.
    host_s
        Until the call returned, without waiting for the GPU: the median.
    """

    device_s: float
    least_s: float
    host_s: float


def interleaved(
    contestants: Mapping[str, Call],
    *,
    contexts: Mapping[str, Context] | None = None,
    stream: int = 0,
    rounds: int = 9,
    calls: int = 4,
) -> dict[str, Timing]:
    """Time each contestant on the current GPU, in turn.

    Parameters
    ----------
    contestants : mapping of str to callable
        ``call(i)`` queues one call on `stream` with the i-th set of inputs, counted without end.
    contexts : mapping of str to callable, optional
        ``context()`` is entered around the measurements of a contestant, and costs it nothing.
    stream : int
        A CUstream; 0 is the legacy default stream.
    rounds : int
        Measurements of each contestant, at least 1.
    calls : int
        Calls in one measurement, fewer if they take longer than 20 ms together.

    Returns
    -------
    dict of str to Timing
        By contestant.

    Raises
    ------
    BackendUnavailableError
        If there is no GPU.
    """
    current_device()
    around: dict[str, Context] = dict.fromkeys(contestants, nullcontext) | dict(contexts or {})
    device: dict[str, list[float]] = {name: [] for name in contestants}
    host: dict[str, list[float]] = {name: [] for name in contestants}
    with _events() as (start, end), _flush(stream) as flush:
        together: dict[str, int] = {}
        for name, call in contestants.items():
            with around[name]():
                call(0)  # compiles, loads, fills caches of launches
                checked(driver.cuStreamSynchronize(stream))
                begin = time.perf_counter()
                host[name].append(_host_seconds(call, 1, 1))
                checked(driver.cuStreamSynchronize(stream))
            together[name] = max(1, min(calls, int(LONG_S / (time.perf_counter() - begin))))
        for number in range(2, rounds + 2):
            for name, call in contestants.items():
                count = together[name]
                with around[name]():
                    flush(2 * count * median(host[name]))
                    checked(driver.cuEventRecord(start, stream))
                    host[name].append(_host_seconds(call, count, number))
                    checked(driver.cuEventRecord(end, stream))
                checked(driver.cuEventSynchronize(end))
                milliseconds = float(checked(driver.cuEventElapsedTime(start, end)))
                device[name].append(1e-3 * milliseconds / count)
    return {name: Timing(median(device[name]), min(device[name]), median(host[name])) for name in contestants}


def input_sets(set_bytes: int) -> int:
    """Return how many sets of inputs to rotate so that none is in the L2 cache when its turn comes.

    >>> input_sets(1 << 30), input_sets(40 << 20)
    (2, 4)
    """
    return min(16, max(2, -(-LEAST_ROTATED_BYTES // max(1, set_bytes))))


def device_name() -> str:
    """Return what the driver calls the current GPU."""
    name: bytes = checked(driver.cuDeviceGetName(128, current_device()))
    return name.split(b"\0")[0].decode()


def _host_seconds(call: Call, calls: int, number: int) -> float:
    start = time.perf_counter()
    for index in range(calls):
        call(number * calls + index)
    return (time.perf_counter() - start) / calls


@contextmanager
def _events() -> Iterator[tuple[Any, Any]]:
    events = [checked(driver.cuEventCreate(0)) for _ in range(2)]
    try:
        yield events[0], events[1]
    finally:
        for event in events:
            checked(driver.cuEventDestroy(event))


@contextmanager
def _flush(stream: int) -> Iterator[Callable[[float], None]]:
    """Give a function that empties the L2 cache and keeps the GPU busy for at least so many seconds."""
    buffer = checked(driver.cuMemAlloc(FLUSH_BYTES))

    def flush(seconds: float) -> None:
        for _ in range(min(100, 1 + int(seconds * FLUSH_BYTES_PER_S / FLUSH_BYTES))):
            checked(driver.cuMemsetD8Async(buffer, 0, FLUSH_BYTES, stream))

    try:
        yield flush
    finally:
        checked(driver.cuMemFree(buffer))
