"""Decoding with NF4: a weight streams through a multiprocessor once, and its warps meet once, at the end.

A block works on whole tiles of 16 output features, one after the other in memory; its warps divide the units of
those tiles, 16 features by 256 input features, evenly and in order.  A warp keeps the sums of a tile in
registers until it is through with its part of it, and puts them into shared memory; behind the only barrier the
parts are added, in the order of input features.

What limits a kernel that looks up a level for every weight is shared memory: a look-up of 32 bytes of two codes
takes it a cycle.  So what else passes through it is kept small.  A product of tensor cores has 8 columns; where
there are only one or two tokens, the columns are blocks of 64 input features with an absmax of their own: column
c has the activations of block c, and zeros for those of other blocks.  Sums of a block then come apart by
themselves, and a lane loads the activations of its own column only.

Sources: Dettmers et al. 2023, arXiv:2305.14314, eq. 5 and 6; PTX ISA 8.7, "mma", "cp.async.bulk".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, device_function, types
from cuda_backend.weight_only import machine

__all__ = ["SIGNATURE", "Stream", "build"]

ROWS, BLOCK, CHUNK, UNIT_BYTES, ABSMAX_BYTES = 16, 64, 256, 2048, 64
TABLE_BYTES, MAP_BYTES = 1 << 16, 1024
BATCH = 8  # loads of activations that a thread has under way while the tables are made

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    uint64,  # codes, in the order of `cuda_backend.weight_only.pack`
    uint64,  # codes of absmax, words of four [tile, chunk, 16]
    *[uint64] * 2,  # scales of the absmax, and their one offset
    *[uint64] * 2,  # pairs of levels by byte, levels of absmax codes
    *[uint64] * 3,  # x; bias, or 0; out [M, N]
    *[int32] * 4,  # M, N, chunks of a row, tiles
    int32,  # bytes from a token of x to the next
    int32,  # parts of tiles that a warp may have
    int32,  # binary logarithm of the absmax that share a scale
)


class Stream(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    kind
        ``"f16"`` or ``"bf16"``.
    tokens
        2, 4, 8 or 16: up to so many.
    warps
        Of a block, of which a multiprocessor holds `blocks`.
    depth
        Units that a warp has under way: in registers, or in stages of shared memory.
    bulk
        Whether the copy engine brings them to shared memory.
    inside
        Whether activations lie between the rows of the table, or behind it.
    early
        Whether the kernel may start before the one ahead of it has ended.
    permuted
        Of the 16 steps of a unit, those whose levels come from tables in registers.
    parts
        What a unit is taken apart to, each with its own sums of products.
    """

    kind: str
    tokens: int
    warps: int = 16
    depth: int = 2
    bulk: bool = False
    inside: bool = False
    early: bool = False
    permuted: int = 0
    blocks: int = 1
    chains: int = 1
    cluster: int = 1
    probe: str = ""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def x_at(self) -> int:
        """Where activations lie."""
        return 128 if self.inside else TABLE_BYTES + MAP_BYTES

    def slots_at(self, tokens: int, K: int) -> int:
        """Where sums of parts of tiles lie."""
        return TABLE_BYTES + MAP_BYTES + (0 if self.inside else 2 * tokens * K)

    def stages_at(self, tokens: int, K: int, parts: int) -> int:
        """Where units arrive."""
        return self.slots_at(tokens, K) + 4 * ROWS * self.tokens * self.warps * parts

    def shared_bytes(self, tokens: int, K: int, parts: int) -> int:
        """Dynamic shared memory, with slack for alignment."""
        stages = self.warps * self.depth * (UNIT_BYTES + ABSMAX_BYTES + 8) if self.bulk else 0
        return 256 + self.stages_at(tokens, K, parts) + stages


def parts_of(tiles: int, chunks: int, clusters: int, warps: int) -> int:
    """Return the most parts of tiles that one of the `warps` of a cluster may have."""
    per = -(-(-(-tiles // clusters) * chunks) // warps)
    return (per - 2) // chunks + 2 if per > 1 else 1


def build(variant: Stream) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`."""
    WARPS, THREADS, DEPTH, TOKENS = variant.warps, variant.threads, variant.depth, variant.tokens
    CLUSTER, STREAM, COMPUTE = variant.cluster, variant.probe == "stream", variant.probe == "compute"
    STEP = 0 if COMPUTE else 1
    BULK, EARLY, PERMUTED, CHAINS = variant.bulk, variant.early, variant.permuted, variant.chains
    COLUMNS = max(1, min(4, 8 // TOKENS))  # blocks of 64 that share a product
    GROUPS = 4 // COLUMNS
    WIDE = TOKENS > 8
    PART = 8 if WIDE else 4  # sums of a product
    SUMS = PART if COLUMNS == 1 else 2  # sums of a tile that a lane holds
    X_AT, PIECE = variant.x_at, 256 if variant.inside else 128
    PARTIAL = PART * CHAINS
    HELD = 1 if BULK else DEPTH
    WORDS, EXTRA, GIVEN = 16 * HELD, 4 * HELD, 2 * BATCH
    ENTRIES = 256 // WARPS
    AT_ONCE = min(32, ENTRIES)
    PARTS, LEVELS = ENTRIES // AT_ONCE, max(1, 256 // THREADS)
    multiply = machine.product(variant.kind)
    pack, unpack = machine.pack_pair(variant.kind), machine.unpack_low(variant.kind)
    TA0, TA1, TB0, TB1, HA0, HA1, HB0, HB1 = register_tables(variant.kind) if PERMUTED else [0] * 8

    @device_function
    def widen(base: Any, bank: Any, word: Any, half: Any) -> Any:
        first = machine.look_up(base, bank, word, uint32(0x1140 + 0x20 * half))
        second = machine.look_up(base, bank, word, uint32(0x1150 + 0x20 * half))
        return first, second

    @device_function
    def select(word: Any, half: Any) -> Any:
        """Return levels of four codes without shared memory: of two tables of 8, the top bit names one."""
        one = uint32(word >> uint32(16 * half))
        other = one ^ uint32(0x8888)
        low = machine.permute(uint32(TA0), uint32(TA1), one) ^ machine.permute(
            uint32(TB0), uint32(TB1), other
        )
        high = machine.permute(uint32(HA0), uint32(HA1), one) ^ machine.permute(
            uint32(HB0), uint32(HB1), other
        )
        return machine.permute(low, high, uint32(0x4051)), machine.permute(low, high, uint32(0x6273))

    @device_function
    def ask_scales(extra: Any, slot: Any, row: Any, scales: Any, outer: Any, line: Any, chunks: Any,
                   chunk: Any, N: Any, tile: Any, shared_by: Any, own: Any) -> None:  # fmt: skip
        for i in range(2):
            if own:
                extra[4 * slot + i] = machine.load_word(scales + uint64(4 * row + 32 * i))
            feature = min(int32(tile * ROWS + row + 8 * i), int32(N - 1))
            inner = uint32(feature * chunks + chunk) >> uint32(shared_by)
            extra[4 * slot + 2 + i] = machine.load_word(outer + uint64(4) * uint64(inner))

    @device_function
    def ask(words: Any, slot: Any, address: Any) -> None:
        for i in range(4):
            machine.load_16(words, int32(16 * slot + 4 * i), address + uint64(512 * i))

    @device_function
    def add_unit(
        total: Any, words: Any, extra: Any, slot: Any, base: Any, bank: Any, x_one: Any, x_other: Any,
        x_high_one: Any, x_high_other: Any, masks: Any, offset: Any, shift: Any,
    ) -> None:  # fmt: skip
        part = cuda.local.array(PARTIAL, float32)
        pairs = cuda.local.array(16, uint32)
        for group in range(GROUPS):
            for i in range(PART * CHAINS):
                part[i] = float32(0.0)
            here = 4 * PIECE // GROUPS * group
            odd = (group * COLUMNS) % 2 if COLUMNS == 1 else 0
            machine.load_shared_16(pairs, int32(0), uint32((x_other if odd else x_one) + here))
            machine.load_shared_16(pairs, int32(4), uint32((x_one if odd else x_other) + here))
            if WIDE:
                machine.load_shared_16(pairs, int32(8), uint32((x_high_other if odd else x_high_one) + here))
                machine.load_shared_16(pairs, int32(12), uint32((x_high_one if odd else x_high_other) + here))
            for column in range(COLUMNS):
                for s in range(4):
                    step = 4 * (group * COLUMNS + column) + s
                    at = 16 * slot + step // 8 * 8 + step % 8 // 2
                    half = step % 2
                    low, high = uint32(words[at]), uint32(words[at + 4])
                    if PERMUTED and step % (16 // max(1, PERMUTED)) == 0:
                        a0, a2 = select(low, half)
                        a1, a3 = select(high, half)
                    else:
                        a0, a2 = widen(base, bank, low, half)
                        a1, a3 = widen(base, bank, high, half)
                    b0, b1 = pairs[2 * s], pairs[2 * s + 1]
                    if COLUMNS > 1:
                        b0, b1 = b0 & masks[column], b1 & masks[column]
                    chain = PART * (s % CHAINS)
                    multiply(part, int32(chain), a0, a1, a2, a3, b0, b1)
                    if WIDE:
                        multiply(part, int32(chain + 4), a0, a1, a2, a3, pairs[8 + 2 * s], pairs[9 + 2 * s])
            if CHAINS == 2:
                for i in range(PART):
                    part[i] += part[PART + i]
            for i in range(2):
                outer = uint32(extra[4 * slot + 2 + i]).view(np.float32)
                if COLUMNS == 1:
                    code = (uint32(extra[4 * slot + i]) >> uint32(8 * group)) & uint32(0xFF)
                    level = machine.load_shared_float(uint32(base + TABLE_BYTES) + (code << uint32(2)))
                    scale = level * outer + offset
                    for e in range(2):
                        total[2 * i + e] += part[2 * i + e] * scale
                        if WIDE:
                            total[4 + 2 * i + e] += part[4 + 2 * i + e] * scale
                else:
                    codes = uint32(extra[4 * slot + i]) >> uint32(shift + 16 * group)
                    for e in range(2):
                        code = (codes >> uint32(8 * e)) & uint32(0xFF)
                        level = machine.load_shared_float(uint32(base + TABLE_BYTES) + (code << uint32(2)))
                        total[i] += part[2 * i + e] * (level * outer + offset)

    if STREAM:

        @device_function
        def take(
            total: Any, words: Any, extra: Any, slot: Any, base: Any, bank: Any, x_one: Any, x_other: Any,
            x_high_one: Any, x_high_other: Any, masks: Any, offset: Any, shift: Any,
        ) -> None:  # fmt: skip
            found = uint32(0)
            for i in range(16):
                found ^= uint32(words[16 * slot + i])
            for i in range(4):
                found ^= uint32(extra[4 * slot + i])
            total[0] += float32(found)

    else:
        take = add_unit

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
            for i in range(SUMS):
                token = int32(2 * quad + (i & 1) + 8 * (i >> 2))
                place = uint32(4 * (16 * token + row + 8 * ((i >> 1) & 1)))
                machine.store_shared_float(target + place, total[i])
        for i in range(SUMS):
            total[i] = float32(0.0)

    def decode(
        codes: Any, scales: Any, outer: Any, offset_at: Any, pairs_at: Any, levels_at: Any,
        x: Any, bias: Any, out: Any, M: Any, N: Any, chunks: Any, tiles: Any, pitch: Any, parts: Any,
        shared_by: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((machine.shared_address(shared) + uint32(255)) & uint32(0xFFFFFF00))
        words = cuda.local.array(WORDS, uint32)
        extra = cuda.local.array(EXTRA, uint32)
        total = cuda.local.array(SUMS, float32)
        masks = cuda.local.array(4, uint32)
        given = cuda.local.array(GIVEN, uint32)
        entries = cuda.local.array(PARTS, uint32)
        levels = cuda.local.array(LEVELS, float32)
        if EARLY:
            machine.let_next_grid_start()

        thread = int32(cuda.threadIdx.x)
        warp, lane = machine.uniform(int32(thread >> 5)), int32(thread & 31)
        row, quad = int32(lane >> 2), int32(lane & 3)
        blocks, block = int32(cuda.gridDim.x // CLUSTER), int32(cuda.blockIdx.x // CLUSTER)
        rank = int32(cuda.blockIdx.x % CLUSTER)
        each = machine.quotient(tiles, blocks)
        rest = int32(tiles - each * blocks)
        first = int32(block * each + min(block, rest))
        count = int32(each + (int32(1) if block < rest else int32(0)))
        units = int32(count * chunks)
        per = int32((units + (CLUSTER * WARPS - 1)) // (CLUSTER * WARPS))
        begin = int32(min((rank * WARPS + warp) * per, units))
        end = int32(min(begin + per, units))
        start = machine.quotient(begin, chunks)
        chunk = int32(begin - start * chunks)
        shared_by = int32(shared_by - 2)

        tile_ahead, chunk_ahead = int32(first + start), chunk
        index = uint64(first) * uint64(chunks) + uint64(begin)
        codes_ahead = codes + index * uint64(UNIT_BYTES)
        scales_ahead = scales + index * uint64(ABSMAX_BYTES)
        slots = base + uint32(variant_slots(M, chunks))
        stages = slots + uint32(4 * ROWS * TOKENS * WARPS * parts) + uint32(warp * (DEPTH * 2112))
        bars = (
            slots
            + uint32(4 * ROWS * TOKENS * WARPS * parts + WARPS * DEPTH * 2112)
            + uint32(warp * (DEPTH * 8))
        )
        if BULK:
            if lane == 0:
                for slot in range(DEPTH):
                    machine.initialise(bars + uint32(8 * slot), uint32(1))
                machine.publish_initialisation()
            machine.meet()
            if lane == 0:
                for slot in range(DEPTH):
                    if begin + slot < end:
                        machine.expect_bytes(bars + uint32(8 * slot), uint32(2112))
                        machine.bulk_load(
                            stages + uint32(2112 * slot), codes_ahead, uint32(2048), bars + uint32(8 * slot)
                        )
                        machine.bulk_load(
                            stages + uint32(2112 * slot + 2048),
                            scales_ahead,
                            uint32(64),
                            bars + uint32(8 * slot),
                        )
                    codes_ahead += uint64(STEP * UNIT_BYTES)
                    scales_ahead += uint64(STEP * ABSMAX_BYTES)
            else:
                codes_ahead += uint64(STEP * DEPTH * UNIT_BYTES)
                scales_ahead += uint64(STEP * DEPTH * ABSMAX_BYTES)
            if begin < end:
                ask_scales(
                    extra, 0, row, scales, outer, 0, chunks, chunk_ahead, N, tile_ahead, shared_by, False
                )
        else:
            codes_ahead += uint64(16 * lane)
            for slot in range(DEPTH):
                if begin + slot < end:
                    ask(words, slot, codes_ahead)
                    ask_scales(
                        extra,
                        slot,
                        row,
                        scales_ahead,
                        outer,
                        0,
                        chunks,
                        chunk_ahead,
                        N,
                        tile_ahead,
                        shared_by,
                        True,
                    )
                codes_ahead += uint64(STEP * UNIT_BYTES)
                scales_ahead += uint64(STEP * ABSMAX_BYTES)
                chunk_ahead += int32(1)
                if chunk_ahead == chunks:
                    chunk_ahead = int32(0)
                    tile_ahead += int32(1)

        # While the first codes are on their way: the tables, and the activations in the order of products.
        offset = machine.load_float(offset_at)
        for i in range(PARTS):
            entry = uint64(ENTRIES * warp + AT_ONCE * i + (lane & (AT_ONCE - 1)))
            entries[i] = machine.load_word(pairs_at + uint64(4) * entry)
        for i in range(LEVELS):
            code = int32(thread + THREADS * i)
            if code < 256:
                levels[i] = machine.load_float(levels_at + uint64(4) * uint64(code))
        if EARLY:
            machine.wait_for_earlier_grids()
        quarters = int32(chunks * (CHUNK // 4))
        for begin_x in range(0, M * quarters, BATCH * THREADS):
            for i in range(BATCH):
                e = int32(begin_x + THREADS * i + thread)
                if e < M * quarters:
                    token = machine.quotient(e, quarters)
                    source = x + uint64(token) * uint64(pitch)
                    machine.load_8(given, int32(2 * i), source + uint64(8) * uint64(e - token * quarters))
            for i in range(BATCH):
                e = int32(begin_x + THREADS * i + thread)
                if e < M * quarters:
                    token = machine.quotient(e, quarters)
                    q = int32(e - token * quarters)
                    # Halves of 64 bytes change places in every second block, so that lanes hit other banks.
                    half = int32(((q >> 3) ^ (q >> 4) ^ token) & 1)
                    piece = int32((token * quarters + q) >> 4)
                    target = int32(X_AT + piece * PIECE + 64 * half + 16 * (q & 3) + 8 * ((q >> 2) & 1))
                    machine.store_shared_8(base + uint32(target), given[2 * i], given[2 * i + 1])
        for i in range(PARTS):
            pair = uint32(entries[i])
            for j in range(AT_ONCE):
                entry_at = uint32(256 * (ENTRIES * warp + AT_ONCE * i + j) + 4 * lane)
                machine.store_shared_word(base + entry_at, machine.from_lane(pair, int32(j)))
        for i in range(LEVELS):
            code = int32(thread + THREADS * i)
            if code < 256:
                machine.store_shared_float(base + uint32(TABLE_BYTES + 4 * code), levels[i])
        cuda.syncthreads()

        # Columns beyond the last token repeat it, and are never stored.
        own, column = int32(row // COLUMNS), int32(row % COLUMNS)
        low = int32(min(own, M - 1))
        x_low = int32(int32(base) + X_AT + PIECE * (low * (quarters >> 4) + column) + 16 * quad)
        parity = int32((low ^ column) & 1)
        x_one, x_other = int32(x_low + 64 * parity), int32(x_low + 64 - 64 * parity)
        upper = int32(min(own + 8, M - 1))
        x_up = int32(int32(base) + X_AT + PIECE * (upper * (quarters >> 4) + column) + 16 * quad)
        parity = int32((upper ^ column) & 1)
        x_high_one, x_high_other = int32(x_up + 64 * parity), int32(x_up + 64 - 64 * parity)
        for i in range(4):
            masks[i] = uint32(0xFFFFFFFF) if column == i else uint32(0)
        shift = int32(16 * (quad & 1)) if COLUMNS == 4 else int32(0)
        bank = uint32(4 * lane)
        target = slots + uint32(4 * ROWS * TOKENS) * uint32(warp * parts)
        for i in range(SUMS):
            total[i] = float32(0.0)

        unit, phase = begin, uint32(0)
        while unit < end:
            for slot in range(DEPTH):
                if unit < end:
                    ahead = int32(4 * PIECE * chunk)
                    if BULK:
                        bar, stage = bars + uint32(8 * slot), stages + uint32(2112 * slot)
                        machine.wait(bar, phase)
                        for i in range(4):
                            machine.load_shared_16(words, int32(4 * i), stage + uint32(512 * i + 16 * lane))
                        for i in range(2):
                            at = stage + uint32(2048 + 4 * row + 32 * i)
                            extra[i] = uint32(machine.load_shared_word(at))
                        machine.meet()
                        if lane == 0 and unit + DEPTH < end:
                            machine.expect_bytes(bar, uint32(2112))
                            machine.bulk_load(stage, codes_ahead, uint32(2048), bar)
                            machine.bulk_load(stage + uint32(2048), scales_ahead, uint32(64), bar)
                        take(
                            total, words, extra, 0, base, bank, x_one + ahead, x_other + ahead,
                            x_high_one + ahead, x_high_other + ahead, masks, offset, shift,
                        )  # fmt: skip
                    else:
                        take(
                            total, words, extra, slot, base, bank, x_one + ahead, x_other + ahead,
                            x_high_one + ahead, x_high_other + ahead, masks, offset, shift,
                        )  # fmt: skip
                        if unit + DEPTH < end:
                            ask(words, slot, codes_ahead)
                            ask_scales(
                                extra,
                                slot,
                                row,
                                scales_ahead,
                                outer,
                                0,
                                chunks,
                                chunk_ahead,
                                N,
                                tile_ahead,
                                shared_by,
                                True,
                            )
                    codes_ahead += uint64(STEP * UNIT_BYTES)
                    scales_ahead += uint64(STEP * ABSMAX_BYTES)
                    chunk_ahead += int32(1)
                    if chunk_ahead == chunks:
                        chunk_ahead = int32(0)
                        tile_ahead += int32(1)
                    unit += int32(1)
                    if BULK and unit < end:
                        ask_scales(
                            extra,
                            0,
                            row,
                            scales,
                            outer,
                            0,
                            chunks,
                            chunk_ahead,
                            N,
                            tile_ahead,
                            shared_by,
                            False,
                        )
                    chunk += int32(1)
                    if chunk == chunks or unit == end:
                        keep(total, target, row, quad)
                        target += uint32(4 * ROWS * TOKENS)
                        chunk = int32(0)
            phase ^= uint32(1)
        if CLUSTER > 1:
            machine.synchronise_cluster()
        else:
            cuda.syncthreads()

        for e in range(rank * THREADS + thread, count * (ROWS * M), CLUSTER * THREADS):
            feature = int32(e & 15)
            tile = machine.quotient(int32(e >> 4), M)
            token = int32((e >> 4) - tile * M)
            y = float32(0.0)
            # A warp's parts are counted from the first tile that it has a part of.
            source = machine.quotient(int32(tile * chunks), per)
            last = machine.quotient(int32((tile + 1) * chunks - 1), per)
            for w in range(source, last + 1):
                place = int32(tile - machine.quotient(int32(w * per), chunks))
                if CLUSTER > 1:
                    place += int32(w % WARPS) * parts
                    at = slots + uint32(4 * (ROWS * TOKENS * place + 16 * token + feature))
                    y += uint32(machine.load_of_block(at, uint32(w // WARPS))).view(np.float32)
                else:
                    place += w * parts
                    at = slots + uint32(4 * (ROWS * TOKENS * place + 16 * token + feature))
                    y += machine.load_shared_float(at)
            feature = int32((first + tile) * ROWS + feature)
            if PERMUTED:
                y *= float32(1.0 / FACTOR)
            if feature < N:
                if bias != uint64(0):
                    y += unpack(machine.load_half(bias + uint64(2) * uint64(feature)))
                cell = uint64(token) * uint64(N) + uint64(feature)
                machine.store_half(out + uint64(2) * cell, pack(y, y))
        if CLUSTER > 1:
            machine.synchronise_cluster()  # until others have read what is here

    FACTOR = factor(variant.kind)
    SLOTS_AT = TABLE_BYTES + MAP_BYTES
    INSIDE = variant.inside

    @device_function
    def variant_slots(M: Any, chunks: Any) -> Any:
        return int32(SLOTS_AT) if INSIDE else int32(SLOTS_AT + 2 * CHUNK * M * chunks)

    return decode


def register_tables(kind: str) -> list[int]:
    """Return two tables of eight levels, low bytes then high bytes, as words for `permute`."""
    order, halves = code_order(kind)
    found = []
    for plane in (0, 8):
        bytes_ = [(int(h) >> plane) & 0xFF for h in halves[order]]
        a, b = bytes_[:8], bytes_[8:]
        a = [x ^ (0xFF if x & 0x80 else 0) for x in a]
        for eight in (a, b):
            found += [int.from_bytes(bytes(eight[i : i + 4]), "little") for i in (0, 4)]
    return found


def code_order(kind: str) -> tuple[list[int], Any]:
    """Return the levels in an order in which those 8 apart have the same top bits in both bytes."""
    from refimpl.quant.nf4 import LEVELS

    scaled = (LEVELS.astype(np.float64) * factor(kind)).astype(np.float32)
    if kind == "f16":
        halves = scaled.astype(np.float16).view(np.uint16).astype(np.int64)
    else:
        bits = scaled.view(np.uint32).astype(np.int64)
        halves = bits + 0x7FFF + ((bits >> 16) & 1) >> 16
    halves[7] = 0x8000  # minus zero
    classes: dict[int, list[int]] = {}
    for code, h in enumerate(halves):
        classes.setdefault(int(h) & 0x8080, []).append(code)
    first: list[int] = []
    second: list[int] = []
    for members in classes.values():
        if len(members) % 2:
            raise ValueError(f"no order for {kind}")
        first += members[0::2]
        second += members[1::2]
    return first + second, halves


def factor(kind: str) -> float:
    """Return what levels are multiplied by."""
    return {"f16": 1299 / 1024, "bf16": 1.0}[kind]


def reordered(kind: str, codes: Any) -> tuple[Any, Any]:
    """Return codes in the order of `code_order`, and the pairs of levels of each byte of them."""
    order, halves = code_order(kind)
    place = np.empty(16, np.int64)
    place[order] = np.arange(16)
    byte = np.arange(256)
    table = (place[byte >> 4] << 4 | place[byte & 15]).astype(np.uint8)
    levels = halves[order].astype(np.uint32)
    return table[codes], levels[byte >> 4] | levels[byte & 15] << np.uint32(16)
