"""Decoding with NF4 for more tokens on Hopper: activations are read for 64 output features at once.

With many tokens it is activations that would fill shared memory and what leads to it.  A warp works on an
item of four tiles of 16 output features and 128 input features, so that what it loads of the tokens serves
four tiles.  Items come by the copy engine, a ring of stages for each warp; activations come from global
memory, for the next item while this one is multiplied.  `cuda_backend.weight_only.nf4_pieces` says how items
are divided and how sums meet.

The grid may start before the one ahead of it has ended, as that of `cuda_backend.weight_only.stream_nf4`.

Sources: Dettmers et al. 2023, arXiv:2305.14314, eq. 5 and 6; PTX ISA 8.7, "mma", "cp.async.bulk".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function, types
from cuda_backend.weight_only import machine
from cuda_backend.weight_only.nf4_pieces import RESIDENT_BYTES, SIGNATURE, filled, level_of, share, widened
from cuda_backend.weight_only.variant import ROWS, STAGE_BYTES, TILES, Wide

__all__ = ["SIGNATURE", "build"]

HALF = 128  # input features of an item, half a chunk
CODES_BYTES, ABSMAX_BYTES = 1024, 64  # of a tile in an item; absmax are those of the whole chunk

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


def build(variant: Wide) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads and ``variant.shared_bytes(parts)`` of dynamic shared memory.
    """
    WARPS, THREADS, DEPTH, TOKENS = variant.warps, variant.threads, variant.depth, variant.tokens
    EIGHTS = TOKENS // 8
    SUMS = 4 * EIGHTS  # of a tile, that a lane holds
    ALL, PAIRS, OUTERS = TILES * SUMS, 16 * EIGHTS, 2 * TILES
    PART_BYTES = variant.part_bytes
    RING, BARS = RESIDENT_BYTES, RESIDENT_BYTES + WARPS * DEPTH * STAGE_BYTES
    SLOTS = BARS + 8 * WARPS * DEPTH
    asked, kept, ENTRIES, LEVELS = filled(THREADS)
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
            machine.expect_bytes(bar, uint32(STAGE_BYTES))
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
        pairs: Any, outers: Any, low: Any, high: Any, outer: Any, row: Any, four: Any, step: Any, chunks: Any,
        N: Any, shared_by: Any,
    ) -> None:  # fmt: skip
        """Load activations, and scales of absmax, of an item."""
        ahead = uint64(2 * HALF) * uint64(step)
        for s in range(8):
            machine.load_8(pairs, int32(2 * s), low + ahead + uint64(32 * s))
            if EIGHTS > 1:
                machine.load_8(pairs, int32(16 + 2 * s), high + ahead + uint64(32 * s))
        for i in range(TILES):
            for j in range(2):
                feature = int32(min(int32((TILES * four + i) * ROWS + row + 8 * j), int32(N - 1)))
                inner = uint32(feature * chunks + (step >> 1)) >> uint32(shared_by)
                outers[2 * i + j] = machine.load_word(outer + uint64(4) * uint64(inner))

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
                    a0, a2 = widened(base, bank, words[step // 2], step % 2)
                    a1, a3 = widened(base, bank, words[4 + step // 2], step % 2)
                    for h in range(EIGHTS):
                        at_pair = 16 * h + 2 * step
                        multiply(part, int32(4 * h), a0, a1, a2, a3, pairs[at_pair], pairs[at_pair + 1])
                for j in range(2):
                    level = level_of(base, other if j else own, 8 * b)
                    scale = level * uint32(outers[2 * i + j]).view(np.float32) + offset
                    for h in range(EIGHTS):
                        for e in range(2):
                            total[SUMS * i + 4 * h + 2 * j + e] += part[4 * h + 2 * j + e] * scale

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
        machine.let_next_grid_start()
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((machine.shared_address(shared) + uint32(255)) & uint32(0xFFFFFF00))
        pairs = cuda.local.array(PAIRS, uint32)
        ahead = cuda.local.array(PAIRS, uint32)
        outers = cuda.local.array(OUTERS, uint32)
        outers_ahead = cuda.local.array(OUTERS, uint32)
        total = cuda.local.array(ALL, float32)
        entries = cuda.local.array(ENTRIES, uint32)
        levels = cuda.local.array(LEVELS, float32)

        thread = int32(cuda.threadIdx.x)
        warp, lane = machine.uniform(int32(thread >> 5)), int32(thread & 31)
        row, quad = int32(lane >> 2), int32(lane & 3)
        fours, steps = int32((tiles + (TILES - 1)) // TILES), int32(2 * chunks)
        first, count, per, begin, end = share(fours, steps, int32(WARPS), warp)
        start = machine.quotient(begin, steps)
        step = int32(begin - start * steps)
        shared_by = int32(shared_by - 2)  # of chunks, which have four absmax

        stages = base + uint32(RING) + uint32(warp * (DEPTH * STAGE_BYTES))
        bars = base + uint32(BARS) + uint32(warp * (8 * DEPTH))
        slots = base + uint32(SLOTS)
        four, four_ahead, step_ahead = int32(first + start), int32(first + start), step
        if lane == 0:
            for slot in range(DEPTH):
                machine.initialise(bars + uint32(8 * slot), uint32(1))
            machine.publish_initialisation()
        machine.meet()
        for slot in range(DEPTH):
            if begin + slot < end:
                stage, bar = stages + uint32(STAGE_BYTES * slot), bars + uint32(8 * slot)
                ask(lane, stage, bar, codes, scales, four_ahead, step_ahead, chunks, tiles)
            step_ahead += int32(1)
            if step_ahead == steps:
                step_ahead = int32(0)
                four_ahead += int32(1)

        # While the first codes are on their way.
        offset = machine.load_float(offset_at)
        asked(entries, levels, pairs_at, levels_at, thread)
        machine.wait_for_earlier_grids()
        # Columns beyond the last token repeat it, and are never stored.
        low = x + uint64(min(row, M - 1)) * uint64(pitch) + uint64(8 * quad)
        high = x + uint64(min(row + 8, M - 1)) * uint64(pitch) + uint64(8 * quad)
        if begin < end:
            ask_others(pairs, outers, low, high, outer, row, four, step, chunks, N, shared_by)
        kept(base, entries, levels, thread)
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
            bar, stage = bars + uint32(8 * slot), stages + uint32(STAGE_BYTES * slot)
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
                keep(total, slots + uint32(PART_BYTES) * uint32(warp * (parts - 1) + part), lane)
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
        cuda.syncthreads()

        for e in range(thread, count * (TILES * ROWS * M), THREADS):
            feature = int32(e & 15)
            tile = machine.quotient(int32(e >> 4), M)
            token = int32((e >> 4) - tile * M)
            own = int32(tile >> 2)
            y = float32(0.0)
            # A warp's parts are counted from the first that it has a part of; the last is in its ring.
            source = machine.quotient(int32(own * steps), per)
            beyond = machine.quotient(int32((own + 1) * steps - 1), per) + 1
            for w in range(source, beyond):
                place = int32(own - machine.quotient(int32(w * per), steps))
                last = int32(min((w + 1) * per, count * steps) - 1)
                at = slots + uint32(PART_BYTES) * uint32(w * (parts - 1) + place)
                if own == machine.quotient(last, steps):
                    at = base + uint32(RING) + uint32(w * (DEPTH * STAGE_BYTES))
                y += machine.load_shared_float(
                    at + uint32(4 * (16 * (TOKENS * (tile & 3) + token) + feature))
                )
            feature = int32((TILES * first + tile) * ROWS + feature)
            if feature < N:
                if bias != uint64(0):
                    y += unpack(machine.load_half(bias + uint64(2) * uint64(feature)))
                cell = uint64(token) * uint64(N) + uint64(feature)
                machine.store_half(out + uint64(2) * cell, pack(y, y))

    return decode
