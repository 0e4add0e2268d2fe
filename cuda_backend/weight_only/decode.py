"""Decoding: a few tokens times a weight in int8 or NF4, which is widened in registers as it arrives.

A tile is 16 output features.  The warps of a block share its input features, chunk by chunk, and add their
sums at the end, in one order; a block works on one tile after the other.  A lane asks for the codes of two
chunks ahead, in vectors of 16 bytes that lie side by side in memory, so that the stream never stops.

Products run on tensor cores, the weight as the matrix of 16 rows and the tokens as its 8 or 16 columns: a
weight costs an eighth of an instruction there, and what counts is how it gets there.

- int8: a byte becomes the fp16 number 1024 + code + 128 by placing it behind 0x64, and one subtraction of
  two numbers gives two codes.  In bf16, 128 + (code + 128) % 128 less 128 or 256.
- NF4: one look-up gives two levels for a byte of two codes.  Each bank of shared memory has the table to
  itself, so 32 lanes look up 32 bytes at once, whichever they are.

Scales multiply sums, not weights: one multiply-add for 64 (NF4) or 128 (int8) weights of a row.  The absmax
of NF4 come as codes of their own and are restored on the way.

On Hopper the grid may start before the one ahead of it has ended.  It asks for weights and tables, which
nothing writes (`cuda_backend.weight_only.prepared` says why), and then waits; x, bias and out are touched
behind that.

Sources: Dettmers et al. 2023, arXiv:2305.14314, eq. 5 and 6; PTX ISA 8.7, "mma"; bytes are placed behind an
exponent as by Kim et al. 2022, arXiv:2211.10017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function, types
from cuda_backend.weight_only import machine
from cuda_backend.weight_only.nf4_pieces import filled, level_of, widened
from cuda_backend.weight_only.variant import BLOCK, CHUNK_BYTES, ROWS, Variant

__all__ = ["SIGNATURE", "build"]

BATCH = 8  # loads of activations that a thread has under way while the tables are made

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    uint64,  # codes, in the order of `cuda_backend.weight_only.pack`
    uint64,  # int8: scales [tile, group, 16]; nf4: codes of absmax, words of four [tile, chunk, 16]
    *[uint64] * 2,  # nf4: scales of the absmax, and their one offset
    *[uint64] * 2,  # nf4: pairs of levels by byte, levels of absmax codes
    *[uint64] * 3,  # x; bias, or 0; out [M, N]
    *[int32] * 4,  # M, N, chunks of a row, tiles
    int32,  # bytes from a token of x to the next
    int32,  # int8: groups of a row
    int32,  # int8: chunks of a group; nf4: binary logarithm of the absmax that share a scale
)


def build(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads and ``variant.shared_bytes(M, K)`` of dynamic shared memory.
    """
    NF4, RESIDENT, WIDE, EARLY = variant.weight == "nf4", variant.resident, variant.wide, variant.early
    WARPS, THREADS, DEPTH, SUMS = variant.warps, variant.threads, variant.depth, variant.sums
    CHUNK, TABLE, X_AT = variant.chunk, variant.table_at, variant.x_at
    WORDS, EXTRA, GIVEN = 16 * DEPTH, 4 * DEPTH, 2 * BATCH
    asked, kept, ENTRIES, LEVELS = filled(THREADS)
    FLUSHES, STEPS = (4, 4) if NF4 else (1, 8)  # sums that a scale multiplies, products of each
    multiply = machine.product(variant.kind)
    pack, unpack = machine.pack_pair(variant.kind), machine.unpack_low(variant.kind)
    widen = _widening(variant)

    @device_function
    def ask(
        words: Any, extra: Any, slot: Any, place: Any, tile: Any, chunk: Any,
        codes: Any, scales: Any, outer: Any, chunks: Any, N: Any, groups: Any, shared_by: Any,
    ) -> None:  # fmt: skip
        """Load a chunk of a tile, 16 words a lane, and what its scales are made of."""
        lane, row = place
        index = uint64(tile) * uint64(chunks) + uint64(chunk)
        address = codes + index * uint64(CHUNK_BYTES) + uint64(16 * lane)
        for i in range(4):
            machine.load_16(words, int32(16 * slot + 4 * i), address + uint64(512 * i))
        if NF4:
            address = scales + index * uint64(4 * ROWS) + uint64(4 * row)
            for i in range(2):
                extra[4 * slot + i] = machine.load_word(address + uint64(32 * i))
                feature = min(int32(tile * ROWS + row + 8 * i), int32(N - 1))
                block = (uint64(feature) * uint64(chunks) + uint64(chunk)) * uint64(CHUNK // BLOCK)
                inner = block >> uint64(shared_by)
                extra[4 * slot + 2 + i] = machine.load_word(outer + uint64(4) * inner)
        else:
            group = machine.quotient(int32(chunk), int32(shared_by))
            line = uint64(tile) * uint64(groups) + uint64(group)
            address = scales + line * uint64(4 * ROWS) + uint64(4 * row)
            for i in range(2):
                extra[4 * slot + i] = machine.load_word(address + uint64(32 * i))

    @device_function
    def activations(pairs: Any, first: Any, address: Any, token: Any) -> None:
        """Load what a lane holds of a token for two products: eight numbers."""
        if RESIDENT:
            machine.load_shared_16(pairs, int32(first), uint32(address))
        else:
            machine.load_8(pairs, int32(first), token + uint64(address))
            machine.load_8(pairs, int32(first + 2), token + uint64(address) + uint64(32))

    @device_function
    def add_chunk(
        total: Any, words: Any, extra: Any, slot: Any, base: Any, bank: Any, x_low: Any, x_high: Any,
        token_low: Any, token_high: Any, offset: Any,
    ) -> None:  # fmt: skip
        """Add the products of a chunk to the sums of this thread."""
        part = cuda.local.array(SUMS, float32)
        pairs = cuda.local.array(8, uint32)
        for flush in range(FLUSHES):
            for i in range(SUMS):
                part[i] = float32(0.0)
            for s in range(STEPS):
                step = flush * STEPS + s
                if s % 2 == 0:
                    activations(pairs, 0, x_low + 32 * step, token_low)
                    if WIDE:
                        activations(pairs, 4, x_high + 32 * step, token_high)
                at = (
                    16 * slot + step // 8 * 8 + step % 8 // 2 if NF4 else 16 * slot + step // 4 * 8 + step % 4
                )
                low, high = uint32(words[at]), uint32(words[at + 4])
                half = step % 2
                a0, a2 = widen(base, bank, low, half)
                a1, a3 = widen(base, bank, high, half)
                multiply(part, int32(0), a0, a1, a2, a3, pairs[2 * half], pairs[2 * half + 1])
                if WIDE:
                    multiply(part, int32(4), a0, a1, a2, a3, pairs[4 + 2 * half], pairs[5 + 2 * half])
            for i in range(2):
                if NF4:
                    level = level_of(uint32(base + TABLE), extra[4 * slot + i], 8 * flush)
                    scale = level * uint32(extra[4 * slot + 2 + i]).view(np.float32) + offset
                else:
                    scale = uint32(extra[4 * slot + i]).view(np.float32)
                for e in range(2):
                    total[2 * i + e] += part[2 * i + e] * scale
                    if WIDE:
                        total[4 + 2 * i + e] += part[4 + 2 * i + e] * scale

    def decode(
        codes: Any, scales: Any, outer: Any, offset_at: Any, pairs_at: Any, levels_at: Any,
        x: Any, bias: Any, out: Any, M: Any, N: Any, chunks: Any, tiles: Any, pitch: Any, groups: Any,
        shared_by: Any,
    ) -> None:  # fmt: skip
        if EARLY:
            machine.let_next_grid_start()
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((machine.shared_address(shared) + uint32(255)) & uint32(0xFFFFFF00))
        words = cuda.local.array(WORDS, uint32)
        extra = cuda.local.array(EXTRA, uint32)
        total = cuda.local.array(SUMS, float32)
        given = cuda.local.array(GIVEN, uint32)
        entries = cuda.local.array(ENTRIES, uint32)
        levels = cuda.local.array(LEVELS, float32)

        thread = int32(cuda.threadIdx.x)
        warp, lane = machine.uniform(int32(thread >> 5)), int32(thread & 31)
        row, quad = int32(lane >> 2), int32(lane & 3)
        blocks, first = int32(cuda.gridDim.x), int32(cuda.blockIdx.x)
        place = lane, row
        # All warps count the same chunks of a tile, so that they meet at its end; what is beyond is skipped.
        rounds = int32((chunks + (WARPS - 1)) // WARPS)
        count = int32((tiles - first + (blocks - 1)) // blocks) * rounds

        tile_ahead, round_ahead = first, int32(0)
        for slot in range(DEPTH):
            chunk = int32(warp + WARPS * round_ahead)
            if slot < count and chunk < chunks:
                ask(
                    words, extra, slot, place, tile_ahead, chunk,
                    codes, scales, outer, chunks, N, groups, shared_by,
                )  # fmt: skip
            round_ahead += int32(1)
            if round_ahead == rounds:
                tile_ahead, round_ahead = int32(tile_ahead + blocks), int32(0)

        # While the first codes are on their way: the tables, and the activations in the order of products.
        offset = float32(0.0)
        if NF4:
            offset = machine.load_float(offset_at)
            asked(entries, levels, pairs_at, levels_at, thread)
        if EARLY:
            machine.wait_for_earlier_grids()
        K = int32(chunks * CHUNK)
        if RESIDENT:
            quarters = int32(K >> 2)
            for start in range(0, M * quarters, BATCH * THREADS):
                for i in range(BATCH):
                    e = int32(start + THREADS * i + thread)
                    if e < M * quarters:
                        token = machine.quotient(e, quarters)
                        source = x + uint64(token) * uint64(pitch)
                        machine.load_8(given, int32(2 * i), source + uint64(8) * uint64(e - token * quarters))
                for i in range(BATCH):
                    e = int32(start + THREADS * i + thread)
                    if e < M * quarters:
                        token = machine.quotient(e, quarters)
                        q = int32(e - token * quarters)
                        unit = (q >> 3 << 3) + ((q & 3) << 1) + ((q >> 2) & 1)
                        target = uint32(X_AT + token * (2 * K + 64) + 8 * unit)
                        machine.store_shared_8(base + target, given[2 * i], given[2 * i + 1])
        if NF4:
            kept(base + uint32(TABLE), entries, levels, thread)
        cuda.syncthreads()

        # Columns beyond the last token repeat it, and are never stored.
        token_low, token_high = int32(min(row, M - 1)), int32(min(row + 8, M - 1))
        if RESIDENT:
            x_low = int32(int32(base) + X_AT + token_low * (2 * K + 64) + 16 * quad)
            x_high = int32(int32(base) + X_AT + token_high * (2 * K + 64) + 16 * quad)
        else:
            x_low, x_high = int32(8 * quad), int32(8 * quad)
        from_low, from_high = x + uint64(token_low) * uint64(pitch), x + uint64(token_high) * uint64(pitch)
        bank = uint32(4 * lane)
        for i in range(SUMS):
            total[i] = float32(0.0)

        tile, turn, parity, done = first, int32(0), int32(0), int32(0)
        while done < count:
            for slot in range(DEPTH):
                if done < count:
                    chunk = int32(warp + WARPS * turn)
                    if chunk < chunks:
                        ahead = int32(2 * CHUNK * chunk)
                        add_chunk(
                            total, words, extra, slot, base, bank, x_low + ahead, x_high + ahead,
                            from_low, from_high, offset,
                        )  # fmt: skip
                    next_chunk = int32(warp + WARPS * round_ahead)
                    if done + DEPTH < count and next_chunk < chunks:
                        ask(
                            words, extra, slot, place, tile_ahead, next_chunk,
                            codes, scales, outer, chunks, N, groups, shared_by,
                        )  # fmt: skip
                    round_ahead += int32(1)
                    if round_ahead == rounds:
                        tile_ahead, round_ahead = int32(tile_ahead + blocks), int32(0)
                    turn += int32(1)
                    done += int32(1)
                    if turn == rounds:
                        sums = base + uint32(parity * (4 * SUMS * THREADS))
                        for i in range(SUMS):
                            at = uint32(4 * (32 * (SUMS * warp + i) + lane))
                            machine.store_shared_float(sums + at, total[i])
                            total[i] = float32(0.0)
                        cuda.syncthreads()
                        for part in range(0, 32 * SUMS, THREADS):
                            e = int32(thread + part)
                            if e < 32 * SUMS:
                                y = float32(0.0)
                                for w in range(WARPS):
                                    y += machine.load_shared_float(sums + uint32(4 * (32 * SUMS * w + e)))
                                i, owner = int32(e >> 5), int32(e & 31)
                                feature = int32(tile * ROWS + (owner >> 2) + 8 * ((i >> 1) & 1))
                                token = int32(2 * (owner & 3) + (i & 1) + 8 * (i >> 2))
                                if feature < N and token < M:
                                    if bias != uint64(0):
                                        y += unpack(machine.load_half(bias + uint64(2) * uint64(feature)))
                                    cell = uint64(token) * uint64(N) + uint64(feature)
                                    machine.store_half(out + uint64(2) * cell, pack(y, y))
                        tile, turn, parity = int32(tile + blocks), int32(0), int32(1 - parity)

    return decode


def _widening(variant: Variant) -> Callable[..., Any]:
    """Return ``widen(base, bank, word, half)``: four weights of a row as two pairs, for one product.

    A word holds four codes of int8, or eight of NF4, of which `half` says the first or the last four.
    """
    if variant.weight == "nf4":
        table = variant.table_at

        @device_function
        def levels(base: Any, bank: Any, word: Any, half: Any) -> Any:
            return widened(uint32(base + table), bank, word, half)

        return levels
    subtract = machine.subtract_pair(variant.kind)
    if variant.kind == "f16":

        @device_function
        def halves(base: Any, bank: Any, word: Any, half: Any) -> Any:  # noqa: ARG001
            exponents, least = uint32(0x64646464), uint32(0x64806480)
            first = subtract(machine.permute(word, exponents, uint32(0x4140)), least)
            second = subtract(machine.permute(word, exponents, uint32(0x4342)), least)
            return first, second

        return halves

    @device_function
    def brains(base: Any, bank: Any, word: Any, half: Any) -> Any:  # noqa: ARG001
        exponents, low, top, sign = (
            uint32(0x43434343),
            uint32(0xFF7FFF7F),
            uint32(0x800080),
            uint32(0x43804380),
        )
        q = machine.permute(word, exponents, uint32(0x4140))
        first = subtract(q & low, (q & top) ^ sign)
        q = machine.permute(word, exponents, uint32(0x4342))
        second = subtract(q & low, (q & top) ^ sign)
        return first, second

    return brains
