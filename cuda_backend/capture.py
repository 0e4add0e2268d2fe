"""What a graph needs and does not repeat, got while a stream is under capture: memory with contents, kernels.

Meanwhile the driver refuses, in every thread, calls that no graph records, lest a program wants them repeated
[1]_.  Here nothing is to be repeated: the thread asks for the mode in which they are allowed, as PyTorch does
for memory [2]_; contents are copied on a stream of our own, which is not under capture and is waited for, as
Warp does [3]_.

References
----------
.. [1] CUDA Driver API, "Stream Management: cuThreadExchangeStreamCaptureMode".
.. [2] PyTorch, c10/cuda/CUDACachingAllocator.cpp, cudaMallocMaybeCapturing.
.. [3] NVIDIA Warp, warp/native/sort.cu; and ``capture_begin``: modules load under capture since CUDA 12.3.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cuda_backend.context import checked, current_device, driver
from refimpl.errors import UnsupportedError

__all__ = ["capturing", "lasting", "refuse_capture", "relaxed"]


def capturing(stream: int) -> bool:
    """Return whether work on `stream` is recorded in place of being done."""
    return bool(checked(driver.cuStreamIsCapturing(stream)))


def refuse_capture(caller: str, stream: int, why: str) -> None:
    """Raise UnsupportedError if `stream` is under capture: a call that waits for the GPU would end it."""
    if capturing(stream):
        raise UnsupportedError(f"{caller}: the stream is under capture, and {why}")


@contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread ask for memory and load kernels, whatever is under capture."""
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        checked(driver.cuThreadExchangeStreamCaptureMode(before))


def lasting(size: int, content: bytes = b"") -> int:
    """Return the address of `size` bytes that are never freed, since graphs may hold them.

    They begin with `content`, which is there when this returns, for work on any stream.
    """
    with relaxed():
        stream = _aside(current_device()) if content else None
        address = int(checked(driver.cuMemAlloc(size)))
        if content:
            try:
                source = ctypes.create_string_buffer(content, len(content))
                checked(driver.cuMemcpyHtoDAsync(address, ctypes.addressof(source), len(content), stream))
                checked(driver.cuStreamSynchronize(stream))
            except BaseException:
                driver.cuMemFree(address)
                raise
    return address


@functools.cache
def _aside(_device: int) -> Any:
    """Return a stream that waits for no other, not for the default stream either."""
    return checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
