"""Codes copied to where the copy engine can read them: rows along K, at multiples of 16 bytes, whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import cuda
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["SIGNATURE", "THREADS", "WIDTH", "Variant", "build"]

int32, uint32, uint64 = types.int32, types.uint32, types.uint64

SIGNATURE = types.void(
    *[uint64] * 3,  # codes, their strides by row and along K in bytes
    uint64,  # target
    *[int32] * 3,  # rows, K, words of 16 codes in a row of the target
)
THREADS, WIDTH = 256, 16


class Variant(NamedTuple):
    """The one compiled kernel."""


def build(_variant: Variant) -> Callable[..., None]:
    """Return the kernel, to be compiled with `SIGNATURE`: a thread for each 16 codes, rows first."""

    def pack(codes: Any, by_row: Any, by_k: Any, target: Any, rows: Any, K: Any, words_of_row: Any) -> None:
        item = int32(cuda.blockIdx.x * THREADS + cuda.threadIdx.x)
        index = registers.quotient(item, rows)
        row = int32(item - index * rows)
        if index < words_of_row:
            words = cuda.local.array(4, uint32)
            for w in range(4):
                word = uint32(0)
                for i in range(4):
                    k = int32(WIDTH * index + 4 * w + i)
                    if k < K:
                        byte = copy.load_byte(codes + uint64(row) * by_row + uint64(k) * by_k)
                        word = uint32(word | uint32(uint32(byte & 0xFF) << uint32(8 * i)))
                words[w] = word
            at = target + (uint64(row) * uint64(words_of_row) + uint64(index)) * uint64(WIDTH)
            copy.store_global_16(at, words[0], words[1], words[2], words[3])

    return pack
