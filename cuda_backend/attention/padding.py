"""Rows that the copy engine cannot take, copied to ones it can: it wants steps of multiples of 16 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cuda_backend.arrays import ITEMSIZE, View
from cuda_backend.context import checked, current_device, driver

__all__ = ["ROW_BYTES", "aligned_rows", "needs_copy"]

ROW_BYTES = 16


def needs_copy(given: View) -> bool:
    """Return whether rows lie at odd addresses, but one behind the other, so that a copy can mend it."""
    step = given.strides[2]
    spaced = step * given.shape[2], step
    return step % ROW_BYTES != 0 and given.strides[3] == ITEMSIZE[given.dtype] and _follow(given, spaced)


def _follow(given: View, spaced: tuple[int, int]) -> bool:
    """Return whether [B, T, H] rows have one distance, axes of one element aside."""
    token, head = spaced
    wanted = (token * given.shape[1], token, head)
    sizes = given.shape[:3]
    return all(
        size == 1 or step == want for size, step, want in zip(sizes, given.strides, wanted, strict=False)
    )


@contextmanager
def aligned_rows(given: View, stream: int) -> Iterator[View]:
    """Give `given`, or, if its rows have to be copied, a copy of [B, T, H] rows further apart.

    The gaps are never read: descriptors know the width.  When the block ends the copy is freed behind the
    work queued on `stream`; nothing waits.
    """
    if len(given.shape) != 4 or 0 in given.shape or not needs_copy(given):  # what is wrong is said elsewhere
        yield given
        return
    width = given.shape[3] * ITEMSIZE[given.dtype]
    pitch = -(-width // ROW_BYTES) * ROW_BYTES
    batch, tokens, heads, _ = given.shape
    rows = batch * tokens * heads
    current_device()  # or raises BackendUnavailableError: this is the first that a call asks of the driver
    address = int(checked(driver.cuMemAllocAsync(rows * pitch, stream)))
    try:
        copy = driver.CUDA_MEMCPY2D()
        device = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcMemoryType = copy.dstMemoryType = device
        copy.srcDevice, copy.srcPitch = driver.CUdeviceptr(given.address), given.strides[2]
        copy.dstDevice, copy.dstPitch = driver.CUdeviceptr(address), pitch
        copy.WidthInBytes, copy.Height = width, rows
        checked(driver.cuMemcpy2DAsync(copy, stream))
        strides = (tokens * heads * pitch, heads * pitch, pitch, ITEMSIZE[given.dtype])
        yield given._replace(strides=strides, address=address, stream=None)
    finally:
        checked(driver.cuMemFreeAsync(address, stream))
