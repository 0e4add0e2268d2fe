"""Row-wise quantisation of 16-bit numbers for Hopper: each number read once, its row held in registers.

``quantize`` gives a block a row.  A thread loads eight numbers at a time, finds the largest magnitude by
integer maxima of two halves (the bits of float16 and bfloat16 without their sign are ordered as the numbers
are, with infinity and then NaN above them), and writes eight codes.  A code is the low byte of
``x * scale + 1.5 * 2**23``, whose addition rounds to the nearest integer, halves to even.

Under the released convention a row's absmax skips outlier *cells*, so no row needs to know what others hold:
one pass over x marks the columns that hold an outlier and writes codes; those of marked columns, as few as
they are, are taken out afterwards.  The paper's absmax skips whole columns: there x is marked first, and read
again, with 0 in the place of outliers.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3; `refimpl.quant.quantize_rows` is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.arithmetic import nearest_code, product
from cuda_backend.int8.epilogue_hopper import kind_of
from cuda_backend.ptx import copy, grid, registers
from cuda_backend.ptx.assembly import types
from refimpl.quant.absmax import LIMIT

__all__ = [
    "SIGNATURE",
    "Variant",
    "build",
    "build_coder",
    "choose",
    "is_usual",
    "largest_magnitude",
]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    *[uint64] * 5,  # x, bytes from a row to the next; codes, bytes from a row to the next; absmax
    uint64,  # a byte for each column: 1 if it holds an outlier
    *[int32] * 2,  # K; bits from which a magnitude is an outlier's
)
MAGNITUDES = 0x7FFF7FFF
ROUND = 1.5 * 2**23
INFINITE = 0x7F800000
WIDTH = 8  # numbers of 16 bits in 16 bytes
LARGEST = 8  # vectors of a thread that are held in registers


class Variant(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    kind
        ``"float16"`` or ``"bfloat16"``.
    aside
        What is done about outliers: "" nothing; "cells" they are marked and a row's absmax skips them;
        "mark" they are marked and nothing else is done; "columns" absmax skips marked columns.
    aligned
        Whether every row begins at a multiple of 16 bytes and is a multiple of them long.
    threads
        Of a block, whole warps.
    vectors
        Of eight numbers that a thread holds; 0 if the row is too long, which is then read twice.
    """

    kind: str
    aside: str
    aligned: bool
    threads: int
    vectors: int


def choose(kind: str, aside: str, aligned: bool, width: int) -> Variant:
    """Return the variant for rows of `width` numbers: about four vectors a thread.

    >>> choose("float16", "", True, 8192)[3:], choose("float16", "", True, 5)[3:]
    ((256, 4), (64, 1))
    """
    vectors = -(-width // WIDTH)
    threads = 64
    while threads < 1024 and threads * 4 < vectors:
        threads *= 2
    held = 1
    while held * threads < vectors:
        held *= 2
    return Variant(kind, aside, aligned, threads, held if held <= LARGEST else 0)


def build(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`: a block of ``threads`` for a row."""
    THREADS, VECTORS = variant.threads, variant.vectors
    WARPS, WORDS = THREADS // 32, 4 * max(1, VECTORS)
    MARK, COLUMNS, ONLY = (
        variant.aside in ("cells", "mark"),
        variant.aside == "columns",
        variant.aside == "mark",
    )
    unpack, coded = registers.unpack_low(kind_of(variant.kind)), build_coder(variant.kind)
    load = _loader(variant.aligned)
    held = VECTORS > 0

    @device_function
    def one_by_one(words: Any, first: Any, column: Any, mask: Any, K: Any, limit: Any) -> Any:
        """Return the largest magnitude of a vector that holds outliers, and mark their columns."""
        top = uint32(0)
        for i in range(WIDTH):
            bits = uint32((words[first + i // 2] >> uint32(16 * (i % 2))) & uint32(0x7FFF))
            if bits < uint32(limit) or column + i >= K:
                top = max(top, bits)
            # Outliers lie in the same columns in all rows: most are marked already.
            elif copy.load_byte(mask + uint64(column + i)) == 0:
                copy.store_global_byte(mask + uint64(column + i), uint32(1))
        return uint32(top)

    @device_function
    def drop_marked(words: Any, first: Any, column: Any, mask: Any, K: Any) -> None:
        """Make the numbers of a vector 0 that lie in marked columns."""
        if column < K:
            flags = cuda.local.array(2, uint32)
            copy.load_8(flags, 0, mask + uint64(column))
            for i in range(WIDTH):
                marked = uint32((flags[i // 4] >> uint32(8 * (i % 4))) & uint32(1))
                words[first + i // 2] &= ~uint32(uint32(marked * uint32(0xFFFF)) << uint32(16 * (i % 2)))

    @device_function
    def largest_of(words: Any, first: Any, column: Any, mask: Any, K: Any, limit: Any) -> Any:
        """Return the largest magnitude of a vector, as bits."""
        top = largest_magnitude(words, first)
        if MARK and top >= uint32(limit):
            top = one_by_one(words, first, column, mask, K, limit)
        return uint32(top)

    @device_function
    def write(words: Any, first: Any, scale: Any, usual: Any, target: Any) -> None:
        low, high = coded(words, first, scale, usual)
        copy.store_global_8(target, low, high)

    @device_function
    def write_held(words: Any, thread: Any, scale: Any, usual: Any, target: Any, K: Any) -> None:
        for v in range(VECTORS):
            column = int32(WIDTH * (thread + v * THREADS))
            if column < K:
                write(words, 4 * v, scale, usual, target + uint64(column))

    def quantize(
        x: Any, x_row: Any, codes: Any, codes_row: Any, absmax: Any, mask: Any, K: Any, limit: Any
    ) -> None:
        grid.let_next_grid_start()
        tops = cuda.shared.array(WARPS, uint32)
        words = cuda.local.array(WORDS, uint32)
        thread = int32(cuda.threadIdx.x)
        row = uint64(cuda.blockIdx.x)
        source, target = x + row * x_row, codes + row * codes_row
        top = uint32(0)
        if held:
            for v in range(VECTORS):
                load(words, 4 * v, source, int32(WIDTH * (thread + v * THREADS)), K)
            for v in range(VECTORS):
                column = int32(WIDTH * (thread + v * THREADS))
                if COLUMNS:
                    drop_marked(words, 4 * v, column, mask, K)
                if column < K:
                    top = max(top, largest_of(words, 4 * v, column, mask, K, limit))
        else:
            column = int32(WIDTH * thread)
            while column < K:
                load(words, 0, source, column, K)
                if COLUMNS:
                    drop_marked(words, 0, column, mask, K)
                top = max(top, largest_of(words, 0, column, mask, K, limit))
                column = int32(column + WIDTH * THREADS)
        if ONLY:
            return
        top = registers.largest_word(uint32(top))
        if thread & 31 == 0:
            tops[thread >> 5] = top
        cuda.syncthreads()
        lane = thread & 31
        top = registers.largest_word(tops[lane] if lane < WARPS else uint32(0))
        largest = unpack(top)
        scale = float32(LIMIT) / largest  # infinite for a row of zeros
        if thread == 0:
            copy.store_global_float(absmax + uint64(4) * row, largest)
        usual = is_usual(largest, scale)
        if held:
            if usual:  # asked once, so that a usual row's codes are one stretch of instructions
                write_held(words, thread, scale, True, target, K)
            else:
                write_held(words, thread, scale, False, target, K)
        else:
            column = int32(WIDTH * thread)
            while column < K:
                load(words, 0, source, column, K)
                if COLUMNS:
                    drop_marked(words, 0, column, mask, K)
                write(words, 0, scale, usual, target + uint64(column))
                column = int32(column + WIDTH * THREADS)

    return quantize


@device_function
def largest_magnitude(words: Any, first: Any) -> Any:
    """Return the largest magnitude of a vector of eight numbers, as bits."""
    both = uint32(0)
    for i in range(4):
        both = registers.maximum_halves(both, uint32(words[first + i] & uint32(MAGNITUDES)))
    return max(uint32(both & uint32(0xFFFF)), uint32(both >> uint32(16)))


@device_function
def is_usual(largest: Any, scale: Any) -> Any:
    """Return whether a row's absmax and scale are finite: then so are all products."""
    return uint32(scale.view(np.uint32)) < uint32(INFINITE) and uint32(largest.view(np.uint32)) < uint32(
        INFINITE
    )


def build_coder(kind: str) -> Callable[..., Any]:
    """Return ``coded(words, first, scale, usual)``: the codes of a vector of eight numbers, two words."""
    unpack = registers.unpack_low(kind_of(kind))

    @device_function
    def number(word: Any, half: Any) -> Any:
        return unpack(uint32(word >> uint32(16 * half)))

    @device_function
    def plain(word: Any, scale: Any, half: Any) -> Any:
        return uint32((product(number(word, half), scale) + float32(ROUND)).view(np.uint32))

    @device_function
    def careful(word: Any, scale: Any, half: Any) -> Any:
        return uint32(nearest_code(number(word, half), scale))

    @device_function
    def coded(words: Any, first: Any, scale: Any, usual: Any) -> Any:
        out = cuda.local.array(2, uint32)
        for i in range(2):
            low, high = words[first + 2 * i], words[first + 2 * i + 1]
            if usual:
                out[i] = registers.low_bytes(
                    plain(low, scale, 0), plain(low, scale, 1), plain(high, scale, 0), plain(high, scale, 1)
                )
            else:
                out[i] = registers.low_bytes(
                    careful(low, scale, 0), careful(low, scale, 1),
                    careful(high, scale, 0), careful(high, scale, 1),
                )  # fmt: skip
        return out[0], out[1]

    return coded


def _loader(aligned: bool) -> Callable[..., Any]:
    """Return ``load(words, first, source, column, K)``: eight numbers of a row as four words, 0 beyond it."""
    if aligned:

        @device_function
        def load(words: Any, first: Any, source: Any, column: Any, K: Any) -> None:
            if column < K:
                copy.load_16(words, first, source + uint64(2) * uint64(column))

        return load

    @device_function
    def load_each(words: Any, first: Any, source: Any, column: Any, K: Any) -> None:
        for i in range(4):
            word = uint32(0)
            for half in range(2):
                own = int32(column + 2 * i + half)
                if own < K:
                    bits = copy.load_half(source + uint64(2) * uint64(own))
                    word = uint32(word | uint32(bits << uint32(16 * half)))
            words[first + i] = word

    return load_each
