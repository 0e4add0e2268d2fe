"""TMA descriptors of matrices: encoded on the host, kept on the device for one stream.

The matrices of a layer are its weight and what its stream keeps in memory: their addresses come again in
every call, so their descriptors are copied once.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from cuda_backend.capture import lasting, relaxed
from cuda_backend.context import checked, driver

__all__ = ["Descriptors", "encoder"]

DESCRIPTOR_BYTES = 128  # sizeof(CUtensorMap)
SET_BYTES = 4 * DESCRIPTOR_BYTES  # those of a product
SETS = 1024  # kept on the device for calls


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
    """Sets of descriptors in device memory, of calls on a stream or of those that are captured on it.

    For calls the least recently used is replaced: copies run on the stream, so none is overwritten under a
    kernel that still reads it.  Graphs read theirs at each replay, so what is `captured` is never replaced:
    each set has memory of its own, which holds it before the kernel is recorded; no copy is.
    """

    def __init__(self, stream: int, captured: bool) -> None:
        self._stream, self._captured = stream, captured
        self._base = 0 if captured else lasting(SET_BYTES * SETS)
        self._places: OrderedDict[Any, int] = OrderedDict()

    def place(self, kind: int, addresses: tuple[int, ...], encoders: Sequence[Callable[[int], Any]]) -> int:
        """Return where on the device the descriptors of matrices at these addresses lie.

        `kind` names the encoders, one for each address, which make them if they are not there.
        """
        key = (kind, addresses)
        place = self._places.get(key)
        if place is not None:
            self._places.move_to_end(key)
            return place
        made = [encoder(address) for encoder, address in zip(encoders, addresses, strict=True)]
        content = b"".join(ctypes.string_at(int(each.getPtr()), DESCRIPTOR_BYTES) for each in made)
        place = lasting(len(content), content) if self._captured else self._copied(content)
        self._places[key] = place
        return place

    def _copied(self, content: bytes) -> int:
        """Copy a set to a place of its own, or that of the least recently used."""
        if len(self._places) < SETS:
            place = self._base + SET_BYTES * len(self._places)
        else:
            _, place = self._places.popitem(last=False)
        # The driver has read pageable memory when this returns.
        source = ctypes.create_string_buffer(content, len(content))
        with relaxed():  # another stream may be under capture
            checked(driver.cuMemcpyHtoDAsync(place, ctypes.addressof(source), len(content), self._stream))
        return place
