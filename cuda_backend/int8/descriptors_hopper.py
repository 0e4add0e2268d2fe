"""TMA descriptors of matrices: encoded on the host, kept on the device for one stream.

The matrices of a layer are its weight and what its stream keeps in memory: their addresses come again in
every call, so their descriptors are copied once.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from cuda_backend.context import checked, driver
from refimpl.errors import UnsupportedError

__all__ = ["Descriptors", "encoder"]

DESCRIPTOR_BYTES = 128  # sizeof(CUtensorMap)
MEMBERS = 4  # descriptors of a product
SETS = 1024  # kept on the device


def encoder(rows: int, row_bytes: int, pitch: int, box_rows: int, box_bytes: int) -> Callable[[int], Any]:
    """Return the function from an address to the ``CUtensorMap`` of a matrix of bytes.

    Parameters
    ----------
    rows, row_bytes : int
        What there is: the box's bytes outside arrive as zeros.
    pitch : int
        Bytes from a row to the next, a multiple of 16.
    box_rows, box_bytes : int
        What one copy takes: at most 256 rows of 32 or 128 bytes, swizzled by as many.

    References
    ----------
    .. [1] CUDA Driver API, "Tensor Map Object Management: cuTensorMapEncodeTiled".
    """
    settled = (
        [driver.cuuint64_t(max(1, row_bytes)), driver.cuuint64_t(max(1, rows))],
        [driver.cuuint64_t(pitch)],
        [driver.cuuint32_t(box_bytes), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{box_bytes}B"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    kind = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8

    def encode(address: int) -> Any:
        return checked(driver.cuTensorMapEncodeTiled(kind, 2, address, *settled))

    return encode


class Descriptors:
    """Sets of descriptors in device memory, the least recently used replaced first.

    Copies run on the stream, so no set is overwritten under a kernel that still reads it.  Graphs read their
    sets at each replay, so sets used under capture are never replaced; and the copy itself is not captured:
    arrays must have been seen on the stream before.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._size = MEMBERS * DESCRIPTOR_BYTES
        self._base = int(checked(driver.cuMemAlloc(self._size * SETS)))
        self._places: OrderedDict[Any, int] = OrderedDict()
        self._captured: set[Any] = set()

    def place(self, kind: int, addresses: tuple[int, ...], encoders: Sequence[Callable[[int], Any]]) -> int:
        """Return where on the device the descriptors of matrices at these addresses lie.

        `kind` names the encoders, one for each address, which make them if they are not there.
        """
        key = (kind, addresses)
        place = self._places.get(key)
        capturing = checked(driver.cuStreamIsCapturing(self._stream))
        if place is None:
            if capturing:
                raise UnsupportedError(
                    "a stream under capture: call once with the same arrays before capturing"
                )
            made = [encoder(address) for encoder, address in zip(encoders, addresses, strict=True)]
            place = self._places[key] = self._copied(made)
        else:
            self._places.move_to_end(key)
        if capturing:
            self._captured.add(key)
        return place

    def _copied(self, descriptors: Sequence[Any]) -> int:
        """Copy a set to a place of its own, or that of the least recently used which no graph holds."""
        place = self._base + self._size * len(self._places)
        if len(self._places) == SETS:
            oldest = next((key for key in self._places if key not in self._captured), None)
            if oldest is None:
                raise UnsupportedError(f"captured graphs hold all {SETS} sets of descriptors of this stream")
            place = self._places.pop(oldest)
        content = b"".join(ctypes.string_at(int(each.getPtr()), DESCRIPTOR_BYTES) for each in descriptors)
        # The driver has read pageable memory when this returns.
        source = ctypes.create_string_buffer(content, self._size)
        checked(driver.cuMemcpyHtoDAsync(place, ctypes.addressof(source), self._size, self._stream))
        return place
