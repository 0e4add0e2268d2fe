"""Memory that a call needs for itself while its kernels run, allocated and freed in the order of a stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cuda_backend._numba import SIMULATOR
from cuda_backend.arrays import View
from cuda_backend.context import checked, driver

__all__ = ["UNWRITTEN", "ZERO", "scratch", "workspace"]

ZERO, UNWRITTEN = 0x00, 0xFF  # bytes of 0.0, and of a NaN: what is read before it is written shows


@contextmanager
def scratch(shape: tuple[int, ...], stream: int, *, fill: int) -> Iterator[View]:
    """Give a contiguous float32 array on the GPU, every byte of it `fill`, for work queued on `stream`.

    When the block ends it is freed behind that work; nothing waits.
    """
    strides = tuple(4 * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    size = 4 * math.prod(shape)
    if SIMULATOR or size == 0:
        array = np.full(shape, np.uint32(fill * 0x01010101)).view(np.float32) if SIMULATOR else None
        yield View(shape, strides, "float32", 0, array)
        return
    address = int(checked(driver.cuMemAllocAsync(size, stream)))
    try:
        checked(driver.cuMemsetD8Async(address, fill, size, stream))
        yield View(shape, strides, "float32", address, None)
    finally:
        checked(driver.cuMemFreeAsync(address, stream))


@contextmanager
def workspace(size: int, stream: int) -> Iterator[int]:
    """Give the address of `size` bytes on the GPU that mean nothing, for work queued on `stream`."""
    address = int(checked(driver.cuMemAllocAsync(size, stream)))
    try:
        yield address
    finally:
        checked(driver.cuMemFreeAsync(address, stream))
