"""TMA descriptors of [B, T, H, D] arrays, encoded on the host into the arguments of a launch.

A descriptor says where a tensor lies (address, shape, strides) and which box one copy takes.  For arrays that
differ from earlier ones in their addresses only, those are exchanged in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from cuda_backend.context import checked, driver

__all__ = ["ALIGNMENT", "DESCRIPTOR_BYTES", "encode_together", "encoder", "row_encoder"]

DESCRIPTOR_BYTES = 128  # sizeof(CUtensorMap)
ALIGNMENT = 64  # of a CUtensorMap
STEP = 16  # bytes: strides are multiples of it


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
    steps = [stride if size > 1 else STEP for size, stride in zip(shape, strides, strict=True)]
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


def row_encoder(rows: int, columns: int) -> Callable[[int], Any]:
    """Return the function from an address to the descriptor of float32 [rows, columns], copied row by row.

    `columns` is a multiple of 4, at most 256.
    """
    settled = (
        [driver.cuuint64_t(size) for size in (columns, rows)],
        [driver.cuuint64_t(4 * columns)],
        [driver.cuuint32_t(size) for size in (columns, 1)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    kind = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32

    def encode(address: int) -> Any:
        return checked(driver.cuTensorMapEncodeTiled(kind, 2, address, *settled))

    return encode


def encode_together(encoders: Sequence[Callable[[int], Any]], place: int) -> Callable[[Sequence[int]], None]:
    """Return what writes the descriptors of arrays at given addresses, one behind the other.

    They go to host address `place`, a multiple of 64, to be protected from other threads.
    """
    members: list[Any] = []
    written: list[int] = []

    def encode(addresses: Sequence[int]) -> None:
        if members:
            for member, address, old in zip(members, addresses, written, strict=True):
                if address != old:
                    checked(driver.cuTensorMapReplaceAddress(member, address))
        else:
            encoded = [encoder(address) for encoder, address in zip(encoders, addresses, strict=True)]
            places = range(place, place + DESCRIPTOR_BYTES * len(encoded), DESCRIPTOR_BYTES)
            for target, descriptor in zip(places, encoded, strict=True):
                ctypes.memmove(target, int(descriptor.getPtr()), DESCRIPTOR_BYTES)
            members.extend(driver.CUtensorMap(_ptr=target) for target in places)
        written[:] = addresses

    return encode
