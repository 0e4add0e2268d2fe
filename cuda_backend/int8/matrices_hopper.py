"""Matrices as the copy engine reads them, and the memory that calls on one stream share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Lock
from typing import Any

from cuda_backend.attention.descriptors import DescriptorCache
from cuda_backend.context import checked, driver
from cuda_backend.int8.variant_hopper import STEP
from refimpl.errors import UnsupportedError

__all__ = ["Shared", "encoder", "padded", "shared_by"]

ALIGNMENT = 256
MEMBERS = 4  # descriptors of a product


def padded(size: int, multiple: int = 16) -> int:
    """Return the least multiple of `multiple` that is not less than `size`, and not 0."""
    return max(1, -(-size // multiple)) * multiple


def encoder(rows: int, row_bytes: int, pitch: int, box_rows: int) -> Callable[[int], Any]:
    """Return the function from an address to the ``CUtensorMap`` of a matrix of bytes.

    Parameters
    ----------
    rows, row_bytes : int
        What there is: the box's bytes outside arrive as zeros.
    pitch : int
        Bytes from a row to the next, a multiple of 16.
    box_rows : int
        Rows of a copy, at most 256; it is 128 bytes wide and swizzled.

    References
    ----------
    .. [1] CUDA Driver API, "Tensor Map Object Management: cuTensorMapEncodeTiled".
    """
    settled = (
        [driver.cuuint64_t(max(1, row_bytes)), driver.cuuint64_t(max(1, rows))],
        [driver.cuuint64_t(pitch)],
        [driver.cuuint32_t(STEP), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    kind = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8

    def encode(address: int) -> Any:
        return checked(driver.cuTensorMapEncodeTiled(kind, 2, address, *settled))

    return encode


class Shared:
    """Descriptors and memory of one stream, whose kernels run one after the other.

    Memory grows and is never given back: plans and captured graphs hold its addresses.  What kernels find in
    `zeros` is 0, and they leave it so; what they find in `scratch` means nothing.
    """

    def __init__(self, stream: int) -> None:
        self.descriptors = DescriptorCache(stream, MEMBERS)
        self.lock = Lock()
        self._stream = stream
        self._held = {"zeros": (0, 0), "scratch": (0, 0)}

    def zeros(self, size: int) -> int:
        """Return the address of at least `size` bytes that are 0 between calls."""
        return self._memory("zeros", size)

    def scratch(self, size: int) -> int:
        """Return the address of at least `size` bytes."""
        return self._memory("scratch", size)

    def _memory(self, name: str, size: int) -> int:
        address, held = self._held[name]
        if size > held:
            if checked(driver.cuStreamIsCapturing(self._stream)):
                raise UnsupportedError("a stream under capture: call once with these shapes before capturing")
            held = max(size, 2 * held)
            address = int(checked(driver.cuMemAlloc(held)))
            if name == "zeros":
                checked(driver.cuMemsetD8Async(address, 0, held, self._stream))
            self._held[name] = address, held
        return address


@functools.cache
def shared_by(stream: int, _device: int) -> Shared:
    """Return what calls on `stream` share."""
    return Shared(stream)
