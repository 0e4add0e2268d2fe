"""Codes of queries and keys for attention in int8 on Hopper: what is read once stays in registers.

Two kernels, whose grids start early and wait before they read.  The first adds the keys of each head, 256
tokens a block.  The second gives a block the tokens that share a scale: it loads them, adds up the sums of
its head meanwhile, takes the mean off, finds the largest magnitude, and writes codes.  A thread holds eight
numbers of every 16th token.

A code is the low byte of ``x * scale + 1.5 * 2**23``, whose addition rounds to the nearest integer, halves to
even; a block that holds an infinity or NaN is treated number by number.

Sources: Zhang et al. 2024, arXiv:2410.02367, section 4.2; `refimpl.attention.quantize_token_blocks` is the
definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.int8.arithmetic import nearest_code, product
from cuda_backend.ptx.assembly import types
from cuda_backend.weight_only import machine
from refimpl.quant.absmax import LIMIT

__all__ = [
    "CODES_SIGNATURE",
    "PART",
    "SUMS_SIGNATURE",
    "THREADS",
    "WIDTH",
    "Codes",
    "build_codes",
    "build_sums",
]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

PART = 256  # tokens whose sum a block makes
WIDTH = 128  # numbers of a head with its padding
LANES, ROWS = 16, 16  # threads of a token, tokens at once
THREADS, WARPS = LANES * ROWS, LANES * ROWS // 32
ROUND = 1.5 * 2**23
INFINITE = 0x7F800000

SUMS_SIGNATURE = types.void(
    *[uint64] * 2,  # x [B, T, H, D], sums [B, H, parts, WIDTH]
    *[int32] * 4,  # heads, tokens, parts, vectors of 16 bytes in a head
    *[int32] * 3,  # from a batch, a token, a head to the next, in 16 bytes
)
CODES_SIGNATURE = types.void(
    *[uint64] * 4,  # x, sums, codes [B, T, H, WIDTH], scales [B, H, blocks]
    *[int32] * 5,  # heads, tokens, parts, vectors of 16 bytes in a head, blocks of a head
    *[int32] * 3,  # as above
)


class Codes(NamedTuple):
    """One compiled kernel: ``"f16"`` or ``"bf16"``, tokens that share a scale, whether a mean goes off."""

    kind: str
    tokens: int
    smooth: bool


def build_sums(kind: str) -> Callable[..., None]:
    """Return the kernel that adds keys, a block for each head and part, heads fastest."""
    unpack, unpack_high = machine.unpack_low(kind), machine.unpack_high(kind)
    BATCH = 8
    WORDS = 4 * BATCH
    CELLS = ROWS * WIDTH

    def add(
        x: Any,
        sums: Any,
        heads: Any,
        tokens: Any,
        parts: Any,
        columns: Any,
        step_b: Any,
        step_t: Any,
        step_h: Any,
    ) -> None:
        machine.let_next_grid_start()
        machine.wait_for_earlier_grids()
        cells = cuda.shared.array(CELLS, float32)
        words = cuda.local.array(WORDS, uint32)
        total = cuda.local.array(8, float32)
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        column, row = int32(thread & (LANES - 1)), int32(thread // LANES)
        rest = machine.quotient(block, heads)
        h = int32(block - rest * heads)
        b = machine.quotient(rest, parts)
        part = int32(rest - b * parts)
        source = x + uint64(16) * (uint64(b) * uint64(step_b) + uint64(h) * uint64(step_h) + uint64(column))
        for j in range(8):
            total[j] = float32(0.0)
        for start in range(0, PART, ROWS * BATCH):
            for i in range(BATCH):
                t = int32(part * PART + start + ROWS * i + row)
                for j in range(4):
                    words[4 * i + j] = uint32(0)
                if column < columns and t < tokens:
                    machine.load_16(words, int32(4 * i), source + uint64(16) * uint64(t) * uint64(step_t))
            for i in range(BATCH):
                for j in range(4):
                    total[2 * j] += unpack(words[4 * i + j])
                    total[2 * j + 1] += unpack_high(words[4 * i + j])
        for j in range(8):
            cells[row * WIDTH + 8 * column + j] = total[j]
        cuda.syncthreads()
        if thread < WIDTH:
            y = float32(0.0)
            for i in range(ROWS):
                y += cells[i * WIDTH + thread]
            place = (uint64(b) * uint64(heads) + uint64(h)) * uint64(parts) + uint64(part)
            machine.store_float(sums + uint64(4) * (place * uint64(WIDTH) + uint64(thread)), y)

    return add


def build_codes(variant: Codes) -> Callable[..., None]:
    """Return the kernel that writes codes, a block for each head and block of tokens, heads fastest."""
    unpack, unpack_high = machine.unpack_low(variant.kind), machine.unpack_high(variant.kind)
    VECTORS, SMOOTH, TOKENS = variant.tokens // ROWS, variant.smooth, variant.tokens
    WORDS, GROUPS, BATCH = 4 * VECTORS, THREADS // WIDTH, 8
    CELLS = GROUPS * WIDTH

    def quantize(
        x: Any, sums: Any, codes: Any, scale: Any, heads: Any, tokens: Any, parts: Any, columns: Any,
        blocks: Any, step_b: Any, step_t: Any, step_h: Any,
    ) -> None:  # fmt: skip
        machine.let_next_grid_start()
        machine.wait_for_earlier_grids()
        cells = cuda.shared.array(CELLS, float32)
        tops = cuda.shared.array(32, uint32)
        words = cuda.local.array(WORDS, uint32)
        mean = cuda.local.array(8, float32)
        code = cuda.local.array(8, uint32)
        sum_of = cuda.local.array(BATCH, float32)
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        column, row = int32(thread & (LANES - 1)), int32(thread // LANES)
        rest = machine.quotient(block, heads)
        h = int32(block - rest * heads)
        b = machine.quotient(rest, blocks)
        index = int32(rest - b * blocks)
        source = x + uint64(16) * (uint64(b) * uint64(step_b) + uint64(h) * uint64(step_h) + uint64(column))
        for i in range(VECTORS):
            t = int32(index * TOKENS + ROWS * i + row)
            for j in range(4):
                words[4 * i + j] = uint32(0)
            if column < columns and t < tokens:
                machine.load_16(words, int32(4 * i), source + uint64(16) * uint64(t) * uint64(step_t))
        for j in range(8):
            mean[j] = float32(0.0)
        if SMOOTH:
            d, group = int32(thread & (WIDTH - 1)), int32(thread // WIDTH)
            place = (uint64(b) * uint64(heads) + uint64(h)) * uint64(parts) * uint64(WIDTH) + uint64(d)
            total = float32(0.0)
            for start in range(0, parts, GROUPS * BATCH):
                for i in range(BATCH):
                    part = int32(start + GROUPS * i + group)
                    sum_of[i] = float32(0.0)
                    if part < parts:
                        sum_of[i] = machine.load_float(
                            sums + uint64(4) * (place + uint64(part) * uint64(WIDTH))
                        )
                for i in range(BATCH):
                    total += sum_of[i]
            cells[thread] = total
            cuda.syncthreads()
            for j in range(8):
                total = float32(0.0)
                for i in range(GROUPS):
                    total += cells[i * WIDTH + 8 * column + j]
                mean[j] = total / float32(tokens)
        top = uint32(0)
        for i in range(VECTORS):
            if index * TOKENS + ROWS * i + row < tokens:
                for j in range(4):
                    low = float32(unpack(words[4 * i + j]) - mean[2 * j])
                    high = float32(unpack_high(words[4 * i + j]) - mean[2 * j + 1])
                    top = max(top, uint32(low.view(np.uint32) & uint32(0x7FFFFFFF)))
                    top = max(top, uint32(high.view(np.uint32) & uint32(0x7FFFFFFF)))
        top = machine.largest_word(uint32(top))
        if thread & 31 == 0:
            tops[thread >> 5] = top
        cuda.syncthreads()
        top = uint32(0)
        for i in range(WARPS):
            top = max(top, uint32(tops[i]))
        largest = uint32(top).view(np.float32)
        factor = float32(LIMIT) / largest if largest > float32(0.0) else float32(0.0)
        usual = top < uint32(INFINITE)
        target = codes + uint64(WIDTH) * (uint64(b) * uint64(tokens) * uint64(heads) + uint64(h))
        target += uint64(8 * column)
        for i in range(VECTORS):
            t = int32(index * TOKENS + ROWS * i + row)
            for j in range(4):
                low = float32(unpack(words[4 * i + j]) - mean[2 * j])
                high = float32(unpack_high(words[4 * i + j]) - mean[2 * j + 1])
                if usual:
                    code[2 * j] = uint32((product(low, factor) + float32(ROUND)).view(np.uint32))
                    code[2 * j + 1] = uint32((product(high, factor) + float32(ROUND)).view(np.uint32))
                else:
                    code[2 * j] = uint32(nearest_code(low, factor))
                    code[2 * j + 1] = uint32(nearest_code(high, factor))
            if t < tokens:
                place = target + uint64(WIDTH) * (uint64(t) * uint64(heads))
                if column < columns:
                    first = machine.low_bytes(code[0], code[1], code[2], code[3])
                    second = machine.low_bytes(code[4], code[5], code[6], code[7])
                    machine.store_8(place, first, second)
                else:
                    machine.store_8(place, uint32(0), uint32(0))
        if thread == 0:
            found = largest / float32(LIMIT) if largest > float32(0.0) else float32(1.0)
            place = (uint64(b) * uint64(heads) + uint64(h)) * uint64(blocks) + uint64(index)
            machine.store_float(scale + uint64(4) * place, found)

    return quantize
