"""TMA descriptors of [B, T, H, D] arrays: encoded on the host, kept on the device for one stream.

A descriptor says where a tensor lies (address, shape, strides) and which box one copy takes.  Encoding takes
about a microsecond, the copy to the device about four; both are saved when the same arrays come again, as
caches of keys, parameters and the buffers of CUDA graphs do.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from cuda.bindings import driver

from refimpl.errors import UnsupportedError

__all__ = ["DescriptorCache", "checked", "encoder"]

DESCRIPTOR_BYTES = 128  # sizeof(CUtensorMap)
SETS = 256  # sets of descriptors kept on the device


def encoder(
    shape: Sequence[int], strides: Sequence[int], dtype: str, rows: int
) -> Callable[[int], driver.CUtensorMap]:
    """Return the function from an address to its ``CUtensorMap``, everything else being settled.

    Parameters
    ----------
    shape, strides : sequence of int
        Of (B, T, H, D), in elements and in bytes; all strides but the last, of 2, multiples of 16.
    dtype : str
        ``"float16"`` or ``"bfloat16"``.
    rows : int
        Tokens in a box, at most 256; it is 64 columns wide and swizzled by 128 bytes.  Elements outside the
        array arrive as zeros.

    References
    ----------
    .. [1] CUDA Driver API, "Tensor Map Object Management: cuTensorMapEncodeTiled".
    """
    kinds = driver.CUtensorMapDataType
    # The stride of an axis of one element is any number; the driver wants a multiple of 16 all the same.
    steps = [stride if size > 1 else 2 * shape[3] for size, stride in zip(shape, strides, strict=True)]
    settled = (
        [driver.cuuint64_t(shape[axis]) for axis in (3, 1, 2, 0)],
        [driver.cuuint64_t(steps[axis]) for axis in (1, 2, 0)],
        [driver.cuuint32_t(size) for size in (64, rows, 1, 1)],
        [driver.cuuint32_t(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    kind = getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{dtype.upper()}")

    def encode(address: int) -> driver.CUtensorMap:
        return checked(driver.cuTensorMapEncodeTiled(kind, 4, address, *settled))

    return encode


class DescriptorCache:
    """Sets of descriptors in device memory, the least recently used replaced first.

    It belongs to one stream: copies run on it, so no set is overwritten under a kernel that still reads it.
    Graphs read their sets at each replay, so sets used under capture are never replaced.  The copy itself is
    not to be captured, since its source changes: arrays must have been seen on the stream before.

    Parameters
    ----------
    stream : int
        A CUstream.
    members : int
        Descriptors in a set, which are copied at once.
    """

    def __init__(self, stream: int, members: int) -> None:
        self._stream = stream
        self._size = members * DESCRIPTOR_BYTES
        self._base = int(checked(driver.cuMemAlloc(self._size * SETS)))
        self._places: OrderedDict[Any, int] = OrderedDict()
        self._captured: set[Any] = set()
        self._staging = (ctypes.c_char * self._size)()

    def address(self, key: Any, encode: Callable[[], Sequence[Any]]) -> int:
        """Return where the set named `key` lies on the device; `encode` makes it if it is not there."""
        place = self._places.get(key)
        capturing = int(checked(driver.cuStreamIsCapturing(self._stream))) != 0
        if place is None:
            if capturing:
                raise UnsupportedError(
                    "a stream under capture: call once with the same arrays before capturing"
                )
            place = self._copy(encode())
        if capturing:
            self._captured.add(key)
        self._places[key] = place
        self._places.move_to_end(key)
        return place

    def _copy(self, descriptors: Sequence[Any]) -> int:
        """Copy a set to a place of its own, or that of the least recently used which no graph holds."""
        staging = ctypes.addressof(self._staging)
        for index, member in enumerate(descriptors):
            ctypes.memmove(staging + index * DESCRIPTOR_BYTES, member.getPtr(), DESCRIPTOR_BYTES)
        place = self._base + self._size * len(self._places)
        if len(self._places) == SETS:
            oldest = next((key for key in self._places if key not in self._captured), None)
            if oldest is None:
                raise UnsupportedError(f"captured graphs hold all {SETS} sets of descriptors of this stream")
            place = self._places.pop(oldest)
        # The driver has read pageable memory when this returns: the staging buffer is free again.
        checked(driver.cuMemcpyHtoDAsync(place, staging, self._size, self._stream))
        return place


def checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a driver call, or raise RuntimeError with the driver's name for what went wrong."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None
