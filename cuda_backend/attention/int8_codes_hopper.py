"""Codes of queries and keys for attention in int8 on Hopper, in one launch.

A block takes 128 tokens of a head and holds them in registers, eight numbers of every eighth token of a half
a thread.  There are three kinds: the first adds up keys, and the last of these of a head makes the mean; the
second writes codes of keys and waits for their mean; the third writes codes of queries.

Blocks lie in phases: a few heads are added up, those of the phase before get their codes, then come some
queries.  So keys are in the L2 cache when they are read again, and their mean is there before it is asked
for.  A block waits for blocks of smaller indices only, and those have been started before it.

What is subtracted and rounded rises with what it is made of: the largest magnitude of ``x - mean`` is that
of the largest or of the least x of a channel.  A code is the low byte of ``x * scale + 1.5 * 2**23``, whose
addition rounds to the nearest integer, halves to even.

Sources: Zhang et al. 2024, arXiv:2410.02367, section 4.2; `refimpl.attention.quantize_token_blocks` is the
definition.  Merrill and Garland 2016, "Single-pass parallel prefix scan with decoupled look-back", has blocks
that wait for earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.arithmetic import product
from cuda_backend.ptx.assembly import types
from cuda_backend.weight_only import machine
from refimpl.quant.absmax import LIMIT

__all__ = ["HALF", "PART", "RESIDENT", "SIGNATURE", "THREADS", "WIDTH", "Variant", "build"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

PART, HALF = 128, 64  # tokens of a block: of keys, they share a scale; of queries, each half does
WIDTH = 128  # numbers of a head with its padding
LANES = 16  # threads of a token
THREADS, WARPS = 256, 8  # 128 threads have a half
STRIDE = 8  # from a token of a thread to its next
VECTORS = HALF // STRIDE  # of 16 bytes
RESIDENT = 4  # blocks of a multiprocessor
ROUND = 1.5 * 2**23
MAGNITUDE, INFINITY = 0x7FFFFFFF, np.float32(np.inf)

SIGNATURE = types.void(
    *[uint64] * 4,  # q, k; sums and mean of keys [B * Hkv, parts + 1, WIDTH]; a counter a head of keys
    *[uint64] * 4,  # codes [B, T, H, WIDTH] and scales [B, H, blocks] of queries, of keys
    *[int32]
    * 5,  # blocks of a phase; heads of keys, their blocks, blocks of queries in it; vectors in a head
    *[int32] * 7,  # queries: heads, tokens, parts, B * Hq * parts; from batch, token, head on, in 16 bytes
    *[int32] * 7,  # keys: the same, but B * Hkv
)


class Variant(NamedTuple):
    """One compiled kernel: ``"f16"`` or ``"bf16"``, and whether the mean of the keys goes off."""

    kind: str
    smooth: bool


def build(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`."""
    SMOOTH, WORDS, CELLS = variant.smooth, 4 * VECTORS, THREADS // LANES * WIDTH
    add = _build_sums(variant.kind)
    encode_keys = _build_codes(variant.kind, keys=True, smooth=SMOOTH)
    encode_queries = _build_codes(variant.kind, keys=False, smooth=False)

    def codes(
        q: Any, k: Any, sums: Any, counters: Any, q_codes: Any, q_scales: Any, k_codes: Any, k_scales: Any,
        phase: Any, group: Any, of_keys: Any, share: Any, columns: Any,
        q_heads: Any, q_tokens: Any, q_parts: Any, q_items: Any, q_step_b: Any, q_step_t: Any, q_step_h: Any,
        k_heads: Any, k_tokens: Any, k_parts: Any, k_lines: Any, k_step_b: Any, k_step_t: Any, k_step_h: Any,
    ) -> None:  # fmt: skip
        machine.let_next_grid_start()
        machine.wait_for_earlier_grids()
        cells = cuda.shared.array(CELLS, float32)
        told = cuda.shared.array(WARPS, uint32)
        words = cuda.local.array(WORDS, uint32)
        block = int32(cuda.blockIdx.x)
        number = machine.quotient(block, phase)
        rest = int32(block - number * phase)
        added = of_keys if SMOOTH else int32(0)
        if rest < added + of_keys:
            adding = rest < added
            if not adding:  # those of the phase before
                rest, number = int32(rest - added), int32(number - 1)
            part = machine.quotient(rest, group)
            line = int32(number * group + rest - part * group)
            if number < 0 or line >= k_lines:
                return
            b = machine.quotient(line, k_heads)
            h = int32(line - b * k_heads)
            source = uint64(b) * uint64(k_step_b) + uint64(h) * uint64(k_step_h)
            load(words, k, source, part, k_tokens, k_step_t, columns)
            own = sums + uint64(4 * WIDTH) * (uint64(line) * uint64(k_parts + 1))
            counter = counters + uint64(4) * uint64(line)
            if adding:
                add(cells, told, words, own, counter, part, k_parts, k_tokens)
            else:
                encode_keys(told, words, k_codes, k_scales, own, counter, b, h, part, k_heads, k_tokens,
                            k_parts, columns)  # fmt: skip
        else:
            item = int32(number * share + rest - added - of_keys)
            if item >= q_items:
                return
            place = machine.quotient(item, q_heads)
            h = int32(item - place * q_heads)
            b = machine.quotient(place, q_parts)
            part = int32(place - b * q_parts)
            source = uint64(b) * uint64(q_step_b) + uint64(h) * uint64(q_step_h)
            load(words, q, source, part, q_tokens, q_step_t, columns)
            encode_queries(told, words, q_codes, q_scales, sums, counters, b, h, part, q_heads, q_tokens,
                           q_parts, columns)  # fmt: skip

    return codes


@device_function
def load(words: Any, x: Any, head: Any, part: Any, tokens: Any, step: Any, columns: Any) -> None:
    """Load what a thread has of a part of a head, `head` from `x`; the last token stands in for more."""
    thread = int32(cuda.threadIdx.x)
    column, first = int32(thread & (LANES - 1)), first_token(thread)
    source = x + uint64(16) * (head + uint64(part * PART) * uint64(step))
    last = int32(tokens - part * PART - 1)
    if column < columns:
        for i in range(VECTORS):
            t = min(int32(first + STRIDE * i), last)
            place = uint32(uint32(16) * uint32(uint32(t) * uint32(step) + uint32(column)))
            machine.load_16(words, int32(4 * i), source + uint64(place))
    else:
        for i in range(4 * VECTORS):
            words[i] = uint32(0)


@device_function
def first_token(thread: Any) -> Any:
    """Return which token of a block is the first of a thread: 128 threads have a half."""
    return int32((thread >> 7) * HALF + ((thread >> 4) & (STRIDE - 1)))


def _build_sums(kind: str) -> Callable[..., None]:
    """Return ``add(cells, told, words, sums, counter, part, parts, tokens)``.

    The last block of a head makes its mean, from sums in an order that does not depend on which that is.
    """
    unpack, unpack_high = machine.unpack_low(kind), machine.unpack_high(kind)
    ROWS, QUADS = THREADS // LANES, WIDTH // 4
    GROUPS = THREADS // QUADS
    BATCH = 8
    FOUND = 4 * BATCH

    @device_function
    def add(
        cells: Any, told: Any, words: Any, sums: Any, counter: Any, part: Any, parts: Any, tokens: Any
    ) -> None:  # fmt: skip
        total = cuda.local.array(8, float32)
        found = cuda.local.array(FOUND, float32)
        thread = int32(cuda.threadIdx.x)
        column, first = int32(thread & (LANES - 1)), first_token(thread)
        for j in range(8):
            total[j] = float32(0.0)
        for i in range(VECTORS):
            if part * PART + first + STRIDE * i < tokens:
                for j in range(4):
                    total[2 * j] += unpack(words[4 * i + j])
                    total[2 * j + 1] += unpack_high(words[4 * i + j])
        for j in range(8):
            cells[(thread >> 4) * WIDTH + 8 * column + j] = total[j]
        cuda.syncthreads()
        if thread < WIDTH:
            y = float32(0.0)
            for i in range(ROWS):
                y += cells[i * WIDTH + thread]
            machine.store_float(sums + uint64(4) * uint64(uint32(part * WIDTH + thread)), y)
        cuda.syncthreads()
        most = int32(2 * parts)  # all sums, the mean, all blocks of codes: then the counter is 0 again
        if thread == 0:
            told[0] = uint32(machine.take_number(counter, most))
        cuda.syncthreads()
        if int32(told[0]) < parts - 1:
            return
        quad, own = int32(thread & (QUADS - 1)), int32(thread >> 5)
        for j in range(4):
            total[j] = float32(0.0)
        for start in range(0, parts, GROUPS * BATCH):
            for i in range(BATCH):
                index = int32(start + GROUPS * i + own)
                for j in range(4):
                    found[4 * i + j] = float32(0.0)
                if index < parts:
                    place = uint64(uint32(index * WIDTH + 4 * quad))
                    machine.load_16(found, int32(4 * i), sums + uint64(4) * place)
            for i in range(BATCH):
                for j in range(4):
                    total[j] += found[4 * i + j]
        for j in range(4):
            cells[own * WIDTH + 4 * quad + j] = total[j]
        cuda.syncthreads()
        if thread < WIDTH:
            y = float32(0.0)
            for i in range(GROUPS):
                y += cells[i * WIDTH + thread]
            place = uint64(uint32(parts * WIDTH + thread))
            machine.store_float(sums + uint64(4) * place, y / float32(tokens))
        cuda.syncthreads()
        if thread == 0:
            machine.take_number(counter, most)

    return add


def _build_codes(kind: str, *, keys: bool, smooth: bool) -> Callable[..., None]:
    """Return ``encode(told, words, target, scales, sums, counter, b, h, part, ...)``, of a block."""
    unpack, unpack_high = machine.unpack_low(kind), machine.unpack_high(kind)
    largest_pair, least_pair = machine.largest_pair(kind), machine.least_pair(kind)
    SMOOTH, OWN = smooth, WARPS if keys else WARPS // 2  # warps whose tokens share a scale
    SHIFT, SCALES = (32 * OWN).bit_length() - 1, WARPS // OWN  # of a block
    TOKENS = PART // SCALES
    TOKENS_SHIFT = TOKENS.bit_length() - 1

    @device_function
    def size(x: Any) -> Any:
        """Return the bits of |x|: ordered as magnitudes are, then infinity, then NaN."""
        return uint32(x.view(np.uint32) & uint32(MAGNITUDE))

    @device_function
    def encode(
        told: Any, words: Any, target: Any, scales: Any, sums: Any, counter: Any, b: Any, h: Any, part: Any,
        heads: Any, tokens: Any, parts: Any, columns: Any,
    ) -> None:  # fmt: skip
        most, least = cuda.local.array(4, uint32), cuda.local.array(4, uint32)
        mean, code = cuda.local.array(8, float32), cuda.local.array(8, uint32)
        thread = int32(cuda.threadIdx.x)
        column, first = int32(thread & (LANES - 1)), first_token(thread)
        for j in range(4):
            most[j], least[j] = words[j], words[j]
        for i in range(1, VECTORS):
            for j in range(4):
                most[j] = largest_pair(most[j], words[4 * i + j])
                least[j] = least_pair(least[j], words[4 * i + j])
        for j in range(8):
            mean[j] = float32(0.0)
        if SMOOTH:
            machine.wait_for_turn(counter, int32(parts + 1))
            place = sums + uint64(4) * uint64(uint32(parts * WIDTH + 8 * column))
            machine.load_16(mean, int32(0), place)
            machine.load_16(mean, int32(4), place + uint64(16))
        top = uint32(0)
        for j in range(4):
            for pair in (most[j], least[j]):
                top = max(top, size(float32(unpack(pair) - mean[2 * j])))
                top = max(top, size(float32(unpack_high(pair) - mean[2 * j + 1])))
        top = machine.largest_word(uint32(top))
        if thread & 31 == 0:
            told[uint32(thread) >> uint32(5)] = top
        cuda.syncthreads()
        if SMOOTH and thread == 0:  # all warps have seen the mean
            machine.fetch_increment(counter, int32(2 * parts))
        own = int32(thread >> SHIFT)
        top = uint32(0)
        for i in range(OWN):
            top = max(top, uint32(told[OWN * own + i]))
        largest = uint32(top).view(np.float32)
        factor = float32(LIMIT) / largest if largest > float32(0.0) else float32(0.0)
        usual = factor > float32(0.0) and factor < float32(INFINITY)
        start, step = int32(part * PART), uint32(WIDTH * heads)
        last = int32(tokens - start - 1)  # comes again where there is no more: to its place, the same
        target += uint64(WIDTH) * ((uint64(b) * uint64(tokens) + uint64(start)) * uint64(heads) + uint64(h))
        target += uint64(8 * column)
        if TOKENS * own > last:  # a half without queries
            return
        if usual and column < columns:
            for i in range(VECTORS):
                for j in range(4):
                    low = float32(unpack(words[4 * i + j]) - mean[2 * j])
                    high = float32(unpack_high(words[4 * i + j]) - mean[2 * j + 1])
                    code[2 * j] = uint32((product(low, factor) + float32(ROUND)).view(np.uint32))
                    code[2 * j + 1] = uint32((product(high, factor) + float32(ROUND)).view(np.uint32))
                place = target + uint64(uint32(uint32(min(int32(first + STRIDE * i), last)) * step))
                low_word = machine.low_bytes(code[0], code[1], code[2], code[3])
                machine.store_8(place, low_word, machine.low_bytes(code[4], code[5], code[6], code[7]))
        else:  # of zeros, of what infinity or NaN is among, of the width beyond the head
            for i in range(VECTORS):
                place = target + uint64(uint32(uint32(min(int32(first + STRIDE * i), last)) * step))
                machine.store_8(place, uint32(0), uint32(0))
        if thread & (32 * OWN - 1) == 0:
            found = largest / float32(LIMIT) if largest > float32(0.0) else float32(1.0)
            count = int32((tokens + (TOKENS - 1)) >> TOKENS_SHIFT)
            place = (uint64(b) * uint64(heads) + uint64(h)) * uint64(count) + uint64(SCALES * part + own)
            machine.store_float(scales + uint64(4) * place, found)

    return encode
