"""TMA descriptors of [B, T, H, D] arrays: encoded on the host, kept on the device for one stream.

A descriptor says where a tensor lies (address, shape, strides) and which box one copy takes.  For arrays that
differ from earlier ones in their addresses only, those are exchanged in place.  The copy to the device takes
about four microseconds, which is saved when the same arrays come again, as caches of keys, parameters and the
buffers of CUDA graphs do.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from cuda_backend.context import checked, driver
from refimpl.errors import UnsupportedError

__all__ = ["DescriptorCache", "encode_together", "encoder"]

DESCRIPTOR_BYTES = 128  # sizeof(CUtensorMap)
ALIGNMENT = 64  # of a CUtensorMap
SETS = 256  # sets of descriptors kept on the device


def encoder(shape: Sequence[int], strides: Sequence[int], dtype: str, rows: int) -> Callable[[int], Any]:
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

    def encode(address: int) -> Any:
        return checked(driver.cuTensorMapEncodeTiled(kind, 4, address, *settled))

    return encode


def encode_together(encoders: Sequence[Callable[[int], Any]]) -> Callable[[Sequence[int]], int]:
    """Return the function from addresses to where on the host their descriptors lie, one behind the other.

    Each call overwrites what the one before it returned, and is to be protected from other threads.
    """
    memory = (ctypes.c_char * (DESCRIPTOR_BYTES * len(encoders) + ALIGNMENT))()
    skipped = -ctypes.addressof(memory) % ALIGNMENT
    members: list[Any] = []

    def encode(addresses: Sequence[int]) -> int:
        start = ctypes.addressof(memory) + skipped
        for member, address in zip(members, addresses, strict=False):
            checked(driver.cuTensorMapReplaceAddress(member, address))
        if not members:
            encoded = [encoder(address) for encoder, address in zip(encoders, addresses, strict=True)]
            places = range(start, start + DESCRIPTOR_BYTES * len(encoded), DESCRIPTOR_BYTES)
            for place, descriptor in zip(places, encoded, strict=True):
                ctypes.memmove(place, int(descriptor.getPtr()), DESCRIPTOR_BYTES)
            members.extend(driver.CUtensorMap(_ptr=place) for place in places)
        return start

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

    def address(
        self, kind: object, addresses: tuple[int, ...], encode: Callable[[Sequence[int]], int]
    ) -> int:
        """Return where on the device the set for arrays of this `kind` at these addresses lies.

        If it is not there, `encode` makes it on the host, and it is copied.
        """
        key = (kind, addresses)
        place = self._places.get(key)
        capturing = checked(driver.cuStreamIsCapturing(self._stream))
        if place is None:
            if capturing:
                raise UnsupportedError(
                    "a stream under capture: call once with the same arrays before capturing"
                )
            place = self._places[key] = self._copy(encode(addresses))
        else:
            self._places.move_to_end(key)
        if capturing:
            self._captured.add(key)
        return place

    def _copy(self, source: int) -> int:
        """Copy a set to a place of its own, or that of the least recently used which no graph holds."""
        place = self._base + self._size * len(self._places)
        if len(self._places) == SETS:
            oldest = next((key for key in self._places if key not in self._captured), None)
            if oldest is None:
                raise UnsupportedError(f"captured graphs hold all {SETS} sets of descriptors of this stream")
            place = self._places.pop(oldest)
        # The driver has read pageable memory when this returns: it is free for the next set.
        checked(driver.cuMemcpyHtoDAsync(place, source, self._size, self._stream))
        return place
