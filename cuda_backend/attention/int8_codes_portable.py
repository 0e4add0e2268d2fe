"""Codes of queries and smoothed keys for attention in int8: sums over tokens, their mean, codes by blocks.

Sums are made in parts and added in one order, so codes repeat.  Codes lie in words of four along a head, its
width filled with zeros; a block of zeros has scale 1, so that no score is 0 times infinity.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda, kernel, types
from cuda_backend.attention.tiles_portable import INDEX
from cuda_backend.formats import storage_type
from cuda_backend.int8.arithmetic import nearest_code, reader
from refimpl.quant.absmax import LIMIT

__all__ = ["PART", "Kernels", "kernels", "signatures", "sources"]

PART = 16 if SIMULATOR else 256  # tokens of one partial sum
THREADS = 8 if SIMULATOR else 128
_ZERO, _ONE, _LIMIT = np.float32(0), np.float32(1), np.float32(LIMIT)


class Kernels(NamedTuple):
    """Launched with `THREADS` threads, and as many bytes of shared memory, times four."""

    add: Any
    divide: Any
    quantize: Any


def signatures(kind: str) -> Kernels:
    """Return the argument types of the kernels for arrays of format `kind`, with any strides."""

    def array(dtype: Any, ndim: int) -> Any:
        return types.Array(dtype, ndim, "A")

    number, float32 = storage_type(kind), types.float32
    return Kernels(
        types.void(array(number, 4), array(float32, 4)),  # k [B, T, H, D], sums [parts, B, H, D]
        types.void(array(float32, 4), array(float32, 3), types.int64),  # sums, mean [B, H, D], T
        # x, mean, whether to take it off, codes [B, T, H, words], scale [B, H, blocks], tokens of a block
        types.void(
            array(number, 4),
            array(float32, 3),
            types.int64,
            array(types.uint32, 4),
            array(float32, 3),
            types.int64,
        ),
    )


@functools.cache
def kernels(kind: str) -> Kernels:
    """Return the compiled kernels for arrays of format `kind`."""
    return Kernels(*(kernel(s)(f) for s, f in zip(signatures(kind), sources(kind), strict=True)))


def sources(kind: str) -> Kernels:
    """Return the kernels for arrays of format `kind` as Python functions."""
    load = reader(kind)

    def add(k: Any, sums: Any) -> None:
        """One block for a part of the tokens of a head."""
        block = cuda.blockIdx.x & INDEX
        heads = k.shape[2]
        h, rest = block % heads, block // heads
        b, part = rest % k.shape[0], rest // k.shape[0]
        first = part * PART
        last = min(first + PART, k.shape[1])
        for e in range(cuda.threadIdx.x, k.shape[3], THREADS):
            d = e & INDEX
            total = _ZERO
            for t in range(first, last):
                total += load(k[b, t & INDEX, h, d])
            sums[part, b, h, d] = total

    def divide(sums: Any, mean: Any, tokens: Any) -> None:
        """One block for a head."""
        block = cuda.blockIdx.x & INDEX
        h, b = block % mean.shape[1], block // mean.shape[1]
        for e in range(cuda.threadIdx.x, mean.shape[2], THREADS):
            d = e & INDEX
            total = _ZERO
            for part in range(sums.shape[0]):
                total += sums[part & INDEX, b, h, d]
            mean[b, h, d] = total / np.float32(tokens)

    def quantize(x: Any, mean: Any, smooth: Any, codes: Any, scale: Any, size: Any) -> None:
        """One block for the tokens that share a scale, of a head: their absmax, then their codes."""
        largest = cuda.shared.array(0, types.float32)
        thread = cuda.threadIdx.x & (THREADS - 1)
        block = cuda.blockIdx.x & INDEX
        heads, D, words = x.shape[2], x.shape[3], codes.shape[3]
        h, rest = block % heads, block // heads
        index, b = rest % scale.shape[2], rest // scale.shape[2]
        first = index * size
        tokens = min(size, x.shape[1] - first)
        top = _ZERO
        for e in range(thread, tokens * D, THREADS):
            t, d = (e & INDEX) // D, (e & INDEX) % D
            value = load(x[b, (first + t) & INDEX, h, d])
            if smooth != 0:
                value -= mean[b, h, d]
            top = max(top, abs(value))
        largest[thread] = top
        cuda.syncthreads()
        step = THREADS // 2
        while step > 0:
            if thread < step:
                largest[thread] = max(largest[thread], largest[thread + step])
            cuda.syncthreads()
            step //= 2
        top = largest[0]
        factor = _LIMIT / top  # infinite for zeros: 0 * inf is NaN, and no code
        for e in range(thread, tokens * words, THREADS):
            t, w = (e & INDEX) // words, (e & INDEX) % words
            word = np.uint32(0)
            for i in range(4):
                d = 4 * w + i
                if d < D:
                    value = load(x[b, (first + t) & INDEX, h, d])
                    if smooth != 0:
                        value -= mean[b, h, d]
                    code = np.uint32(nearest_code(value, factor) & 0xFF)
                    word = np.uint32(word | np.uint32(code << np.uint32(8 * i)))
            codes[b, (first + t) & INDEX, h, w] = word
        if thread == 0:
            scale[b, h, index] = top / _LIMIT if top > _ZERO else _ONE

    return Kernels(add, divide, quantize)
