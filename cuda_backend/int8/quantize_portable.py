"""Row-wise absmax quantisation in three kernels, for every CUDA GPU and Numba's simulator.

``flag`` looks at every number once: column c of a strip of rows holds an outlier, or not.  ``gather`` makes
one mask of the strips, and the indices and the number of the columns set aside; neither is told how many
there are.  ``quantize`` gives a block a row: its absmax, then its codes.

Magnitudes are compared as the bits of float32, whose order is that of the numbers: infinity comes after them
and NaN last, so a maximum keeps NaN, and one comparison, ``bits < limit``, says that a number is finite and
below the threshold.

Shared memory is one word a thread, allocated at launch: two threads of the simulator that ask for a shared
array of fixed size at the same time may get one each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda, device_function, kernel, types
from cuda_backend.formats import storage_type
from cuda_backend.int8.arithmetic import magnitude, nearest_code, reader
from refimpl.quant.absmax import LIMIT

__all__ = ["STRIPS", "Variant", "build", "read_types", "signatures", "sources", "variant_for"]

STRIPS = 32  # of rows, searched for outliers side by side
_INDEX = 0x7FFFFFFF  # as an operand of & it tells the compiler that an index is not negative
_LIMIT, _NONE = np.float32(LIMIT), np.uint32(0)
_WORDS = {1: "uint8", 2: "uint16", 4: "uint32"}


class Variant(NamedTuple):
    """One set of compiled kernels.

    Attributes
    ----------
    kind
        Format of the numbers.
    width
        How many of them are read at a time: 1, or as many as make 8 bytes.
    aside
        What a row's absmax skips: "" nothing, "cells" outliers, "columns" those that hold one.
    threads, scan_threads
        Of a block of ``flag`` and ``quantize``, and of the one block of ``gather``; powers of two.
    """

    kind: str
    width: int
    aside: str
    threads: int
    scan_threads: int


def variant_for(kind: str, width: int, aside: str) -> Variant:
    """Return the variant with as many threads as the GPU, or the simulator, likes."""
    return Variant(kind, width, aside, *((4, 8) if SIMULATOR else (256, 1024)))


def read_types(variant: Variant) -> tuple[str, str]:
    """Return the types in which numbers, and codes or flags, are read and written."""
    wide = variant.width > 1
    return "uint64" if wide else storage_type(variant.kind).name, _WORDS[variant.width]


def signatures(variant: Variant) -> dict[str, Any]:
    """Return the argument types of each kernel."""

    def array(dtype: str, ndim: int) -> Any:
        return types.Array(getattr(types, dtype), ndim, "A")

    numbers, codes = read_types(variant)
    return {
        "flag": types.void(array(numbers, 2), array(codes, 2), types.uint64),
        "gather": types.void(array("uint8", 2), array("uint8", 1), array("int64", 1), array("int64", 1)),
        "quantize": types.void(
            array(numbers, 2), array(codes, 1), array(codes, 2), array("float32", 1), types.uint64
        ),
    }


@functools.cache
def build(variant: Variant, name: str) -> Any:
    """Return one of the compiled kernels: "flag", "gather" or "quantize"."""
    return kernel(signatures(variant)[name])(sources(variant)[name])


def sources(variant: Variant) -> dict[str, Callable[..., None]]:
    """Return the kernels as Python functions; the constants of their closures shape the code."""
    WIDTH, THREADS, SCAN = variant.width, variant.threads, variant.scan_threads
    CELLS, COLUMNS = variant.aside == "cells", variant.aside == "columns"
    ASIDE = CELLS or COLUMNS
    number = _number(variant.kind, variant.width)
    Word = getattr(np, read_types(variant)[1])

    def flag(x: Any, flags: Any, limit: Any) -> None:
        """Say which columns of a strip of rows hold an outlier; a block looks at THREADS words of each."""
        blocks = (x.shape[1] + THREADS - 1) // THREADS
        strip = (cuda.blockIdx.x & _INDEX) // blocks
        column = (cuda.blockIdx.x & _INDEX) % blocks * THREADS + (cuda.threadIdx.x & (THREADS - 1))
        rows = (x.shape[0] + flags.shape[0] - 1) // flags.shape[0]
        if column < x.shape[1]:
            found = np.uint32(0)
            for r in range(strip * rows, min((strip + 1) * rows, x.shape[0])):
                item = x[r & _INDEX, column & _INDEX]
                for i in range(WIDTH):
                    if magnitude(number(item, i)) >= np.uint32(limit):
                        found = np.uint32(found | np.uint32(1 << (8 * i)))
            flags[strip, column & _INDEX] = Word(found)

    def gather(flags: Any, aside: Any, indices: Any, count: Any) -> None:
        """Write the mask of all strips, and its columns in order; one block, a prefix sum a round."""
        places = cuda.shared.array(0, types.int32)
        thread = cuda.threadIdx.x & (SCAN - 1)
        base = 0
        for start in range(0, flags.shape[1], SCAN):
            column = (start + thread) & _INDEX
            found = 0
            if column < flags.shape[1]:
                for strip in range(flags.shape[0]):
                    found |= int(flags[strip & _INDEX, column])
                aside[column] = np.uint8(found)
            places[thread] = found
            cuda.syncthreads()
            step = 1
            while step < SCAN:
                before = 0
                if thread >= step:
                    before = places[thread - step]
                cuda.syncthreads()
                places[thread] += before
                cuda.syncthreads()
                step *= 2
            if found != 0:
                indices[(base + places[thread] - 1) & _INDEX] = column
            base += places[SCAN - 1]
            cuda.syncthreads()
        if thread == 0:
            count[0] = base

    def quantize(x: Any, aside: Any, codes: Any, absmax: Any, limit: Any) -> None:
        """Quantise a row: its absmax by a tree over the threads, then a code for every number."""
        largest = cuda.shared.array(0, types.uint32)
        thread = cuda.threadIdx.x & (THREADS - 1)
        row = cuda.blockIdx.x & _INDEX
        top = _NONE
        for e in range(thread, x.shape[1], THREADS):
            item = x[row, e & _INDEX]
            flagged = np.uint32(0)
            if COLUMNS:
                flagged = np.uint32(aside[e & _INDEX])
            for i in range(WIDTH):
                bits = magnitude(number(item, i))
                counted = True
                if CELLS:
                    counted = bits < np.uint32(limit)
                if COLUMNS:
                    counted = (flagged >> np.uint32(8 * i)) & np.uint32(0xFF) == _NONE
                if counted and bits > top:
                    top = bits
        largest[thread] = top
        cuda.syncthreads()
        step = THREADS // 2
        while step > 0:
            if thread < step and largest[thread + step] > largest[thread]:
                largest[thread] = largest[thread + step]
            cuda.syncthreads()
            step //= 2
        top = np.uint32(largest[0])
        scale = _LIMIT / top.view(np.float32)  # infinite for a row of zeros: 0 * inf is NaN, and no code
        for e in range(thread, x.shape[1], THREADS):
            item = x[row, e & _INDEX]
            flagged = np.uint32(0)
            if ASIDE:
                flagged = np.uint32(aside[e & _INDEX])
            word = np.uint32(0)
            for i in range(WIDTH):
                if (flagged >> np.uint32(8 * i)) & np.uint32(0xFF) == _NONE:
                    code = np.uint32(nearest_code(number(item, i), scale) & 0xFF)
                    word = np.uint32(word | np.uint32(code << np.uint32(8 * i)))
            codes[row, e & _INDEX] = Word(word)
        if thread == 0:
            absmax[row] = top.view(np.float32)

    return {"flag": flag, "gather": gather, "quantize": quantize}


def _number(kind: str, width: int) -> Callable[..., Any]:
    """Return the device function from what is read at once, and i, to its number i as float32."""
    load = reader(kind)
    if width == 1:

        @device_function
        def only(item: Any, i: Any) -> Any:  # noqa: ARG001
            return load(item)

        return only
    if kind == "float32":

        @device_function
        def of_two(item: Any, i: Any) -> Any:
            return np.uint32((item >> np.uint64(32 * i)) & np.uint64(0xFFFFFFFF)).view(np.float32)

        return of_two

    @device_function
    def of_four(item: Any, i: Any) -> Any:
        return load(np.uint16((item >> np.uint64(16 * i)) & np.uint64(0xFFFF)))

    return of_four
