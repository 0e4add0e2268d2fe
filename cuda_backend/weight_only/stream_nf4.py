"""Decoding with NF4 for up to 8 tokens on Hopper: a weight streams through registers, without a stop.

A warp asks for a unit, 16 features by 256 input features, two ahead; `cuda_backend.weight_only.nf4_pieces`
says which.  What limits a kernel that looks up a level for every weight is shared memory: a look-up of 32
bytes of two codes takes it a cycle.  So what else passes through it is kept small.  A product of tensor cores
has 8 columns; where there are only one or two tokens, the columns are blocks of 64 input features with an
absmax of their own: column c has the activations of block c, and zeros for those of other blocks.  Sums of a
block then come apart by themselves, and a lane loads the activations of its own column only.

The grid may start before the one ahead of it has ended.  It asks for weights and tables, which nothing writes
(`cuda_backend.weight_only.prepared` says why), and then waits; x, bias and out are touched behind that.

Sources: Dettmers et al. 2023, arXiv:2305.14314, eq. 5 and 6; PTX ISA 8.7, "mma", "griddepcontrol".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function, types
from cuda_backend.weight_only import machine
from cuda_backend.weight_only.nf4_pieces import RESIDENT_BYTES, SIGNATURE, filled, level_of, share, widened
from cuda_backend.weight_only.variant import CHUNK_BYTES, ROWS, Stream, deep

__all__ = ["SIGNATURE", "build"]

CHUNK, ABSMAX_BYTES, PIECE = deep("nf4"), 64, 128
DEPTH = 2  # units under way
BATCH = 8  # loads of activations that a thread has under way
GIVEN = 2 * BATCH

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


def build(variant: Stream) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads and ``variant.shared_bytes(M, K, parts)`` of dynamic shared memory.
    """
    WARPS, THREADS, TOKENS, COLUMNS = variant.warps, variant.threads, variant.tokens, variant.columns
    GROUPS = 4 // COLUMNS
    SUMS = 4 if COLUMNS == 1 else 2  # of a tile, that a lane holds
    WORDS, EXTRA = 16 * DEPTH, 4 * DEPTH
    PART_BYTES = 4 * ROWS * TOKENS
    asked, kept, ENTRIES, LEVELS = filled(THREADS)
    multiply = machine.product(variant.kind)
    pack, unpack = machine.pack_pair(variant.kind), machine.unpack_low(variant.kind)

    @device_function
    def ask(
        words: Any, extra: Any, slot: Any, row: Any, codes: Any, scales: Any, outer: Any, tile: Any,
        chunk: Any, chunks: Any, N: Any, shared_by: Any,
    ) -> None:  # fmt: skip
        """Load a unit, 16 words a lane, and what its absmax are made of."""
        for i in range(4):
            machine.load_16(words, int32(16 * slot + 4 * i), codes + uint64(512 * i))
        for i in range(2):
            extra[4 * slot + i] = machine.load_word(scales + uint64(4 * row + 32 * i))
            feature = min(int32(tile * ROWS + row + 8 * i), int32(N - 1))
            inner = uint32(feature * chunks + chunk) >> uint32(shared_by)
            extra[4 * slot + 2 + i] = machine.load_word(outer + uint64(4) * uint64(inner))

    @device_function
    def add_unit(
        total: Any, words: Any, extra: Any, slot: Any, base: Any, lane: Any, x_one: Any, x_other: Any,
        masks: Any, offset: Any,
    ) -> None:  # fmt: skip
        part = cuda.local.array(4, float32)
        pairs = cuda.local.array(8, uint32)
        bank, shift = uint32(4 * lane), int32(16 * (lane & 1))
        for group in range(GROUPS):
            for i in range(4):
                part[i] = float32(0.0)
            here = 4 * PIECE // GROUPS * group
            odd = group % 2 if COLUMNS == 1 else 0
            machine.load_shared_16(pairs, int32(0), uint32((x_other if odd else x_one) + here))
            machine.load_shared_16(pairs, int32(4), uint32((x_one if odd else x_other) + here))
            for column in range(COLUMNS):
                for s in range(4):
                    step = 4 * (group * COLUMNS + column) + s
                    at = 16 * slot + step // 8 * 8 + step % 8 // 2
                    a0, a2 = widened(base, bank, uint32(words[at]), step % 2)
                    a1, a3 = widened(base, bank, uint32(words[at + 4]), step % 2)
                    b0, b1 = pairs[2 * s], pairs[2 * s + 1]
                    if COLUMNS > 1:
                        b0, b1 = b0 & masks[column], b1 & masks[column]
                    multiply(part, int32(0), a0, a1, a2, a3, b0, b1)
            for i in range(2):
                codes, outer = extra[4 * slot + i], uint32(extra[4 * slot + 2 + i]).view(np.float32)
                if COLUMNS == 1:
                    scale = level_of(base, codes, 8 * group) * outer + offset
                    for e in range(2):
                        total[2 * i + e] += part[2 * i + e] * scale
                else:
                    for e in range(2):
                        place = 8 * e + 16 * group + (shift if COLUMNS == 4 else 0)
                        total[i] += part[2 * i + e] * (level_of(base, codes, place) * outer + offset)

    @device_function
    def keep(total: Any, target: Any, row: Any, quad: Any) -> None:
        """Put the sums of a part of a tile into shared memory, [token, 16 features]."""
        if COLUMNS == 4:
            one = total[0] + machine.exchange_float(total[0], int32(1))
            other = total[1] + machine.exchange_float(total[1], int32(1))
            odd = int32(quad & 1)
            value = other if odd else one
            machine.store_shared_float(target + uint32(4 * (16 * (quad >> 1) + row + 8 * odd)), value)
        elif COLUMNS == 2:
            for i in range(2):
                machine.store_shared_float(target + uint32(4 * (16 * quad + row + 8 * i)), total[i])
        else:
            for i in range(4):
                place = uint32(4 * (16 * (2 * quad + (i & 1)) + row + 8 * (i >> 1)))
                machine.store_shared_float(target + place, total[i])
        for i in range(SUMS):
            total[i] = float32(0.0)

    @device_function
    def keep_activations(base: Any, x: Any, M: Any, pitch: Any, quarters: Any, thread: Any) -> None:
        """Put the tokens into shared memory in the order of products, pieces of 64 features."""
        given = cuda.local.array(GIVEN, uint32)
        for begin in range(0, M * quarters, BATCH * THREADS):
            for i in range(BATCH):
                e = int32(begin + THREADS * i + thread)
                if e < M * quarters:
                    token = machine.quotient(e, quarters)
                    source = x + uint64(token) * uint64(pitch) + uint64(8) * uint64(e - token * quarters)
                    machine.load_8(given, int32(2 * i), source)
            for i in range(BATCH):
                e = int32(begin + THREADS * i + thread)
                if e < M * quarters:
                    token = machine.quotient(e, quarters)
                    q = int32(e - token * quarters)
                    # Halves of 64 bytes change places in every second piece, so that lanes hit other banks.
                    half = int32(((q >> 3) ^ (q >> 4) ^ token) & 1)
                    piece = int32((token * quarters + q) >> 4)
                    target = int32(
                        RESIDENT_BYTES + PIECE * piece + 64 * half + 16 * (q & 3) + 8 * ((q >> 2) & 1)
                    )
                    machine.store_shared_8(base + uint32(target), given[2 * i], given[2 * i + 1])

    def decode(
        codes: Any, scales: Any, outer: Any, offset_at: Any, pairs_at: Any, levels_at: Any,
        x: Any, bias: Any, out: Any, M: Any, N: Any, chunks: Any, tiles: Any, pitch: Any, parts: Any,
        shared_by: Any,
    ) -> None:  # fmt: skip
        machine.let_next_grid_start()
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((machine.shared_address(shared) + uint32(255)) & uint32(0xFFFFFF00))
        words = cuda.local.array(WORDS, uint32)
        extra = cuda.local.array(EXTRA, uint32)
        total = cuda.local.array(SUMS, float32)
        masks = cuda.local.array(4, uint32)
        entries = cuda.local.array(ENTRIES, uint32)
        levels = cuda.local.array(LEVELS, float32)

        thread = int32(cuda.threadIdx.x)
        warp, lane = machine.uniform(int32(thread >> 5)), int32(thread & 31)
        row, quad = int32(lane >> 2), int32(lane & 3)
        first, count, per, begin, end = share(tiles, chunks, int32(WARPS), warp)
        start = machine.quotient(begin, chunks)
        chunk = int32(begin - start * chunks)
        shared_by = int32(shared_by - 2)  # of chunks, which have four absmax

        tile_ahead, chunk_ahead = int32(first + start), chunk
        index = uint64(first) * uint64(chunks) + uint64(begin)
        codes_ahead = codes + index * uint64(CHUNK_BYTES) + uint64(16 * lane)
        scales_ahead = scales + index * uint64(ABSMAX_BYTES)
        for slot in range(DEPTH):
            if begin + slot < end:
                ask(
                    words, extra, slot, row, codes_ahead, scales_ahead, outer, tile_ahead, chunk_ahead,
                    chunks, N, shared_by,
                )  # fmt: skip
            codes_ahead += uint64(CHUNK_BYTES)
            scales_ahead += uint64(ABSMAX_BYTES)
            chunk_ahead += int32(1)
            if chunk_ahead == chunks:
                chunk_ahead = int32(0)
                tile_ahead += int32(1)

        # While the first codes are on their way.
        offset = machine.load_float(offset_at)
        asked(entries, levels, pairs_at, levels_at, thread)
        machine.wait_for_earlier_grids()
        quarters = int32(chunks * (CHUNK // 4))
        keep_activations(base, x, M, pitch, quarters, thread)
        kept(base, entries, levels, thread)
        cuda.syncthreads()

        # Columns beyond the last token repeat it, and are never stored.
        token, column = int32(min(row // COLUMNS, M - 1)), int32(row % COLUMNS)
        x_at = int32(base) + RESIDENT_BYTES + PIECE * (token * (quarters >> 4) + column) + 16 * quad
        parity = int32((token ^ column) & 1)
        x_one, x_other = int32(x_at + 64 * parity), int32(x_at + 64 - 64 * parity)
        for i in range(4):
            masks[i] = uint32(0xFFFFFFFF) if column == i else uint32(0)
        slots = base + uint32(RESIDENT_BYTES + 2 * CHUNK * M * chunks)
        target = slots + uint32(PART_BYTES) * uint32(warp * parts)
        for i in range(SUMS):
            total[i] = float32(0.0)

        unit = begin
        while unit < end:
            for slot in range(DEPTH):
                if unit < end:
                    ahead = int32(4 * PIECE * chunk)
                    add_unit(
                        total, words, extra, slot, base, lane, x_one + ahead, x_other + ahead, masks, offset
                    )
                    if unit + DEPTH < end:
                        ask(
                            words, extra, slot, row, codes_ahead, scales_ahead, outer, tile_ahead,
                            chunk_ahead, chunks, N, shared_by,
                        )  # fmt: skip
                    codes_ahead += uint64(CHUNK_BYTES)
                    scales_ahead += uint64(ABSMAX_BYTES)
                    chunk_ahead += int32(1)
                    if chunk_ahead == chunks:
                        chunk_ahead = int32(0)
                        tile_ahead += int32(1)
                    unit += int32(1)
                    chunk += int32(1)
                    if chunk == chunks or unit == end:
                        keep(total, target, row, quad)
                        target += uint32(PART_BYTES)
                        chunk = int32(0)
        cuda.syncthreads()

        for e in range(thread, count * (ROWS * M), THREADS):
            feature = int32(e & 15)
            tile = machine.quotient(int32(e >> 4), M)
            token = int32((e >> 4) - tile * M)
            y = float32(0.0)
            # A warp's parts are counted from the first tile that it has a part of.
            source = machine.quotient(int32(tile * chunks), per)
            last = machine.quotient(int32((tile + 1) * chunks - 1), per)
            for w in range(source, last + 1):
                place = int32(w * parts + tile - machine.quotient(int32(w * per), chunks))
                y += machine.load_shared_float(
                    slots + uint32(PART_BYTES * place + 4 * (16 * token + feature))
                )
            feature = int32((first + tile) * ROWS + feature)
            if feature < N:
                if bias != uint64(0):
                    y += unpack(machine.load_half(bias + uint64(2) * uint64(feature)))
                cell = uint64(token) * uint64(N) + uint64(feature)
                machine.store_half(out + uint64(2) * cell, pack(y, y))

    return decode
