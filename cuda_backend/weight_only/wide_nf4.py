"""Decoding with NF4 for 3 to 16 tokens: activations are read for 64 output features at once.

With many tokens it is activations that pass through shared memory, not levels.  A warp works on an item of four
tiles of 16 output features and 128 input features, so that what it loads of the tokens serves four tiles.
Items come by the copy engine, a ring of stages for each warp; activations come from global memory, for the
next item while this one is multiplied.  Items are divided evenly, and sums meet at the end, as in
`cuda_backend.weight_only.stream_nf4`; blocks of a cluster share tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, device_function, types
from cuda_backend.weight_only import machine
from cuda_backend.weight_only.stream_nf4 import SIGNATURE

__all__ = ["SIGNATURE", "Wide", "build", "parts_of"]

ROWS, CHUNK, HALF, TILES = 16, 256, 128, 4
TABLE_BYTES, MAP_BYTES = 1 << 16, 1024
CODES_BYTES, ABSMAX_BYTES = 1024, 64  # of a tile in an item
STAGE = TILES * (CODES_BYTES + ABSMAX_BYTES)

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


class Wide(NamedTuple):
    """One compiled kernel: ``"f16"`` or ``"bf16"``, up to 8 or 16 tokens, warps, stages, blocks of a cluster."""

    kind: str
    tokens: int
    warps: int = 8
    depth: int = 3
    cluster: int = 2
    early: bool = False
    blocks: int = 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def part_bytes(self) -> int:
        """Bytes of the sums of an item."""
        return 4 * TILES * ROWS * self.tokens

    def shared_bytes(self, parts: int) -> int:
        """Dynamic shared memory, with slack for alignment."""
        stages = self.warps * self.depth * (STAGE + 8)
        return 256 + TABLE_BYTES + MAP_BYTES + stages + self.warps * (parts - 1) * self.part_bytes


def parts_of(tiles: int, chunks: int, clusters: int, warps: int) -> int:
    """Return the most parts of four tiles that one of the `warps` of a cluster may have."""
    steps = 2 * chunks
    fours = -(-tiles // TILES)
    most = -(-fours // clusters)
    per = -(-most * steps // warps)
    return (per - 2) // steps + 2 if per > 1 else 1


def build(variant: Wide) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`."""
    WARPS, THREADS, DEPTH, CLUSTER = variant.warps, variant.threads, variant.depth, variant.cluster
    TOKENS, EARLY, WIDE = variant.tokens, variant.early, variant.tokens > 8
    SUMS = 8 if WIDE else 4
    ALL, PAIRS, OUTERS = TILES * SUMS, 32 if WIDE else 16, 2 * TILES
    PART_BYTES = variant.part_bytes
    ENTRIES = 256 // WARPS
    AT_ONCE = min(32, ENTRIES)
    PARTS, LEVELS = ENTRIES // AT_ONCE, max(1, 256 // THREADS)
    RING, BARS = TABLE_BYTES + MAP_BYTES, TABLE_BYTES + MAP_BYTES + WARPS * DEPTH * STAGE
    SLOTS = BARS + 8 * WARPS * DEPTH
    multiply = machine.product(variant.kind)
    pack, unpack = machine.pack_pair(variant.kind), machine.unpack_low(variant.kind)

    @device_function
    def ask(
        lane: Any,
        stage: Any,
        bar: Any,
        codes: Any,
        scales: Any,
        four: Any,
        step: Any,
        chunks: Any,
        tiles: Any,
    ) -> None:
        """Let the copy engine bring an item: a tile for each of four lanes."""
        if lane == 0:
            machine.expect_bytes(bar, uint32(STAGE))
        machine.meet()
        if lane < TILES:
            tile = int32(min(TILES * four + lane, tiles - 1))
            index = uint64(tile) * uint64(chunks) + uint64(step >> 1)
            source = codes + index * uint64(2 * CODES_BYTES) + uint64((step & 1) * CODES_BYTES)
            machine.bulk_load(stage + uint32(CODES_BYTES * lane), source, uint32(CODES_BYTES), bar)
            target = stage + uint32(TILES * CODES_BYTES + ABSMAX_BYTES * lane)
            machine.bulk_load(target, scales + index * uint64(ABSMAX_BYTES), uint32(ABSMAX_BYTES), bar)

    @device_function
    def ask_others(
        pairs: Any, outers: Any, low: Any, high: Any, outer: Any, row: Any, four: Any, step: Any, chunks: Any, N: Any,
        shared_by: Any,
    ) -> None:  # fmt: skip
        """Load activations, and scales of absmax, of an item."""
        ahead = uint64(2 * HALF) * uint64(step)
        for s in range(8):
            machine.load_8(pairs, int32(2 * s), low + ahead + uint64(32 * s))
            if WIDE:
                machine.load_8(pairs, int32(16 + 2 * s), high + ahead + uint64(32 * s))
        for i in range(TILES):
            for j in range(2):
                feature = int32(min(int32((TILES * four + i) * ROWS + row + 8 * j), int32(N - 1)))
                inner = uint32(feature * chunks + (step >> 1)) >> uint32(shared_by)
                outers[2 * i + j] = machine.load_word(outer + uint64(4) * uint64(inner))

    @device_function
    def widen(base: Any, bank: Any, word: Any, half: Any) -> Any:
        first = machine.look_up(base, bank, word, uint32(0x1140 + 0x20 * half))
        second = machine.look_up(base, bank, word, uint32(0x1150 + 0x20 * half))
        return first, second

    @device_function
    def add_item(
        total: Any, pairs: Any, outers: Any, stage: Any, base: Any, lane: Any, odd: Any, offset: Any
    ) -> None:
        part = cuda.local.array(SUMS, float32)
        words = cuda.local.array(8, uint32)
        bank, row = uint32(4 * lane), int32(lane >> 2)
        for i in range(TILES):
            machine.load_shared_16(words, int32(0), stage + uint32(CODES_BYTES * i + 16 * lane))
            machine.load_shared_16(words, int32(4), stage + uint32(CODES_BYTES * i + 512 + 16 * lane))
            at = stage + uint32(TILES * CODES_BYTES + ABSMAX_BYTES * i + 4 * row)
            own = uint32(machine.load_shared_word(at)) >> uint32(16 * odd)
            other = uint32(machine.load_shared_word(at + uint32(32))) >> uint32(16 * odd)
            for b in range(2):
                for e in range(SUMS):
                    part[e] = float32(0.0)
                for s in range(4):
                    step = 4 * b + s
                    a0, a2 = widen(base, bank, words[step // 2], step % 2)
                    a1, a3 = widen(base, bank, words[4 + step // 2], step % 2)
                    multiply(part, int32(0), a0, a1, a2, a3, pairs[2 * step], pairs[2 * step + 1])
                    if WIDE:
                        multiply(part, int32(4), a0, a1, a2, a3, pairs[16 + 2 * step], pairs[17 + 2 * step])
                for j in range(2):
                    code = ((other if j else own) >> uint32(8 * b)) & uint32(0xFF)
                    level = machine.load_shared_float(uint32(base + TABLE_BYTES) + (code << uint32(2)))
                    scale = level * uint32(outers[2 * i + j]).view(np.float32) + offset
                    for e in range(2):
                        total[SUMS * i + 2 * j + e] += part[2 * j + e] * scale
                        if WIDE:
                            total[SUMS * i + 4 + 2 * j + e] += part[4 + 2 * j + e] * scale

    @device_function
    def keep(total: Any, target: Any, lane: Any) -> None:
        """Put the sums of four tiles into shared memory, [tile, token, 16 features]."""
        row, quad = int32(lane >> 2), int32(lane & 3)
        for i in range(TILES):
            for e in range(SUMS):
                token = int32(2 * quad + (e & 1) + 8 * (e >> 2))
                place = uint32(4 * (16 * (TOKENS * i + token) + row + 8 * ((e >> 1) & 1)))
                machine.store_shared_float(target + place, total[SUMS * i + e])
                total[SUMS * i + e] = float32(0.0)

    def decode(
        codes: Any, scales: Any, outer: Any, offset_at: Any, pairs_at: Any, levels_at: Any,
        x: Any, bias: Any, out: Any, M: Any, N: Any, chunks: Any, tiles: Any, pitch: Any, parts: Any,
        shared_by: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((machine.shared_address(shared) + uint32(255)) & uint32(0xFFFFFF00))
        pairs = cuda.local.array(PAIRS, uint32)
        ahead = cuda.local.array(PAIRS, uint32)
        outers = cuda.local.array(OUTERS, uint32)
        outers_ahead = cuda.local.array(OUTERS, uint32)
        total = cuda.local.array(ALL, float32)
        entries = cuda.local.array(PARTS, uint32)
        levels = cuda.local.array(LEVELS, float32)
        if EARLY:
            machine.let_next_grid_start()

        thread = int32(cuda.threadIdx.x)
        warp, lane = machine.uniform(int32(thread >> 5)), int32(thread & 31)
        row, quad = int32(lane >> 2), int32(lane & 3)
        blocks, block = int32(cuda.gridDim.x // CLUSTER), int32(cuda.blockIdx.x // CLUSTER)
        rank = int32(cuda.blockIdx.x % CLUSTER)
        fours, steps = int32((tiles + (TILES - 1)) // TILES), int32(2 * chunks)
        each = machine.quotient(fours, blocks)
        rest = int32(fours - each * blocks)
        first = int32(block * each + min(block, rest))
        count = int32(each + (int32(1) if block < rest else int32(0)))
        items = int32(count * steps)
        per = int32((items + (CLUSTER * WARPS - 1)) // (CLUSTER * WARPS))
        begin = int32(min((rank * WARPS + warp) * per, items))
        end = int32(min(begin + per, items))
        start = machine.quotient(begin, steps)
        step = int32(begin - start * steps)
        shared_by = int32(shared_by - 2)

        stages = base + uint32(RING) + uint32(warp * (DEPTH * STAGE))
        bars = base + uint32(BARS) + uint32(warp * (8 * DEPTH))
        four, four_ahead, step_ahead = int32(first + start), int32(first + start), step
        if lane == 0:
            for slot in range(DEPTH):
                machine.initialise(bars + uint32(8 * slot), uint32(1))
            machine.publish_initialisation()
        machine.meet()
        for slot in range(DEPTH):
            if begin + slot < end:
                ask(
                    lane,
                    stages + uint32(STAGE * slot),
                    bars + uint32(8 * slot),
                    codes,
                    scales,
                    four_ahead,
                    step_ahead,
                    chunks,
                    tiles,
                )
            step_ahead += int32(1)
            if step_ahead == steps:
                step_ahead = int32(0)
                four_ahead += int32(1)

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
        # Columns beyond the last token repeat it, and are never stored.
        low = x + uint64(min(row, M - 1)) * uint64(pitch) + uint64(8 * quad)
        high = x + uint64(min(row + 8, M - 1)) * uint64(pitch) + uint64(8 * quad)
        if begin < end:
            ask_others(pairs, outers, low, high, outer, row, four, step, chunks, N, shared_by)
        for i in range(PARTS):
            pair = uint32(entries[i])
            for j in range(AT_ONCE):
                entry_at = uint32(256 * (ENTRIES * warp + AT_ONCE * i + j) + 4 * lane)
                machine.store_shared_word(base + entry_at, machine.from_lane(pair, int32(j)))
        for i in range(LEVELS):
            code = int32(thread + THREADS * i)
            if code < 256:
                machine.store_shared_float(base + uint32(TABLE_BYTES + 4 * code), levels[i])
        for i in range(ALL):
            total[i] = float32(0.0)
        cuda.syncthreads()

        slot, phase, item, part = int32(0), uint32(0), begin, int32(0)
        while item < end:
            next_step, next_four = int32(step + 1), four
            if next_step == steps:
                next_step, next_four = int32(0), int32(four + 1)
            if item + 1 < end:
                ask_others(
                    ahead, outers_ahead, low, high, outer, row, next_four, next_step, chunks, N, shared_by
                )
            bar, stage = bars + uint32(8 * slot), stages + uint32(STAGE * slot)
            machine.wait(bar, phase)
            add_item(total, pairs, outers, stage, base, lane, step & 1, offset)
            machine.meet()
            if item + DEPTH < end:
                ask(lane, stage, bar, codes, scales, four_ahead, step_ahead, chunks, tiles)
            step_ahead += int32(1)
            if step_ahead == steps:
                step_ahead = int32(0)
                four_ahead += int32(1)
            item += int32(1)
            if item == end:
                keep(total, stages, lane)  # nothing arrives there any more
            elif next_step == 0:
                keep(
                    total, base + uint32(SLOTS) + uint32(PART_BYTES) * uint32(warp * (parts - 1) + part), lane
                )
                part += int32(1)
            step, four = next_step, next_four
            for i in range(PAIRS):
                pairs[i] = ahead[i]
            for i in range(OUTERS):
                outers[i] = outers_ahead[i]
            slot += int32(1)
            if slot == DEPTH:
                slot = int32(0)
                phase ^= uint32(1)
        if CLUSTER > 1:
            machine.synchronise_cluster()
        else:
            cuda.syncthreads()

        for e in range(rank * THREADS + thread, count * (TILES * ROWS * M), CLUSTER * THREADS):
            feature = int32(e & 15)
            tile = machine.quotient(int32(e >> 4), M)
            token = int32((e >> 4) - tile * M)
            own = int32(tile >> 2)
            y = float32(0.0)
            # A warp's parts are counted from the first four tiles that it has a part of; the last is in its ring.
            for w in range(
                machine.quotient(int32(own * steps), per),
                machine.quotient(int32((own + 1) * steps - 1), per) + 1,
            ):
                place = int32(own - machine.quotient(int32(w * per), steps))
                last = int32(min((w + 1) * per, items) - 1)
                inside = int32(w % WARPS)
                at = base + uint32(SLOTS) + uint32(PART_BYTES) * uint32(inside * (parts - 1) + place)
                if own == machine.quotient(last, steps):
                    at = base + uint32(RING) + uint32(inside * (DEPTH * STAGE))
                at += uint32(4 * (16 * (TOKENS * (tile & 3) + token) + feature))
                if CLUSTER > 1:
                    y += uint32(machine.load_of_block(at, uint32(w // WARPS))).view(np.float32)
                else:
                    y += machine.load_shared_float(at)
            feature = int32((TILES * first + tile) * ROWS + feature)
            if feature < N:
                if bias != uint64(0):
                    y += unpack(machine.load_half(bias + uint64(2) * uint64(feature)))
                cell = uint64(token) * uint64(N) + uint64(feature)
                machine.store_half(out + uint64(2) * cell, pack(y, y))
        if CLUSTER > 1:
            machine.synchronise_cluster()  # until others have read what is here

    return decode
