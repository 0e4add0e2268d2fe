"""Decoding on tensor cores, at the speed of memory: parts of a cache, merged by the block that ends last.

A block owns one part of the keys of one key head and a tile of up to 16 rows that read them, the query heads
of the group packed with the new queries.  Its warps take turns of a few keys, each on its own: a warp has a
ring of stages in shared memory, asks for the keys of some turns ahead by asynchronous copies, and waits for
its oldest, never for another warp.  What a multiprocessor has in flight is several times what the latency of
memory needs.  Products have the keys as their 16 rows and the queries as their 8 columns::

    S' = K Q', times the scale, masked
    m, l = new maxima and sums of each query, P' = exp2(S' - m)
    O' = exp2(m_old - m) O' + V' P'

P' is rounded to the format of the inputs and turned in registers.  Warps merge in shared memory.  A part
leaves float32 outputs and log-sum-exps to base 2, and the last block of a tile, which a counter in global
memory tells of, weighs them.  Keys in pages differ in where a turn begins: lanes hold the pages of many turns
ahead.

From compute capability 9.0 on a launch begins under the end of the one before it, and asks the L2 cache for
its first keys; it reads nothing before the launch ahead has ended.

On an H200 what `choose` takes ran in the twelve cases of tests/cuda/decode_table.py, compared with PyTorch:
whole caches and pages, ragged, up to five queries, float16 and bfloat16, D of 64 and 128.  Other widths were
compiled and played.

Sources: Dao, Haziza, Massa & Sizov 2023, Flash-Decoding; Kwon et al. 2023, arXiv:2309.06180, section 4.1;
PTX ISA 8.7, "mma", "ldmatrix", "cp.async".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.decode_loader_ampere import build_loader
from cuda_backend.attention.decode_merge_ampere import (
    AT_ONCE,
    build_merge_of_parts,
    build_merge_of_warps,
    build_write,
)
from cuda_backend.attention.decode_step_ampere import build_step
from cuda_backend.attention.decode_variant_ampere import KEYS, DecodeVariant
from cuda_backend.ptx import barrier, copy, copy_async, grid, registers, turns
from cuda_backend.ptx.assembly import types

__all__ = ["ADDRESSES", "SIGNATURE", "build"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

ADDRESSES = 9
SIGNATURE = types.void(
    *[uint64] * 3,  # q, k, v, or their pages
    *[uint64] * 2,  # page table, k_lengths; 0 if there is none
    *[uint64] * 2,  # out [B, Tq, Hq, Dv]; lse [B, Hq, Tq], or 0
    *[uint64] * 2,  # outputs of parts, then their log-sum-exps; a counter of each tile, 0 before and after
    *[int32] * 4,  # Tq, Tk, Hkv, Hq / Hkv
    *[int32] * 2,  # tiles of rows, parts
    *[int32] * 2,  # keys of a page, pages of a sequence
    *[int32] * 3,  # steps of q along batch, queries and heads, in units of 4 bytes
    *[int32] * 6,  # steps of k and of v along batch or pages, keys and heads, in units of 16 bytes
    *[int32] * 3,  # steps of the table along batch and pages, and of k_lengths, in bytes
    int32,  # bits of the scale times log2(e)
)
MINUS_INFINITY = -math.inf


def build(variant: DecodeVariant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, ``variant.shared_bytes`` of dynamic shared memory, and a block for
    each part of each tile of rows of each key head of each sequence.
    """
    D, DV, ROWS, TURN = variant.D, variant.Dv, variant.rows, variant.keys
    WARPS, THREADS, STAGES, STAGE = variant.warps, variant.threads, variant.stages, variant.stage_bytes
    COLUMNS, BATCH = ROWS // 8, 32 * KEYS // TURN
    FLAG_AT, LSE_AT = variant.flag_at, variant.lse_at
    OWN_ROWS, GIVEN_WORDS = 2 * COLUMNS, 4 * AT_ONCE  # of a lane
    QUERY_WORDS, OUTPUTS, QUADS = D // 8 * COLUMNS, DV // 4 * COLUMNS, DV // 4
    EARLY, HINTED = variant.early, variant.hinted > 0
    ask, look_up, hint = build_loader(variant)
    step, write = build_step(variant), build_write(variant)
    leave, merged_warps = build_merge_of_warps(variant)
    weigh, ask_parts, add_parts = build_merge_of_parts(variant)
    wait_for_oldest = copy_async.wait(STAGES - 2)

    @device_function
    def share(keys: Any, part: Any, parts: Any) -> Any:
        """Return the turns of a part, from the first to the one behind the last; shares differ by one."""
        count = int32(registers.quotient(int32(keys + (TURN - 1)), int32(TURN)))
        size = registers.quotient(count, parts)
        longer = int32(count - size * parts)
        begin = int32(part * size + min(part, longer))
        return begin, int32(begin + size + registers.select_int(int32(part < longer), int32(1), int32(0)))

    def decode(
        q: Any, k: Any, v: Any, table: Any, lengths: Any, out: Any, lse: Any, work: Any, counters: Any,
        queries: Any, longest: Any, heads: Any, group: Any, tiles: Any, parts: Any, page: Any, pages: Any,
        q_batch: Any, q_query: Any, q_head: Any, k_batch: Any, k_key: Any, k_head: Any,
        v_batch: Any, v_key: Any, v_head: Any, table_batch: Any, table_page: Any, length_step: Any,
        scale_bits: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((copy.shared_address(shared) + uint32(127)) & uint32(0xFFFFFF80))
        fragments = cuda.local.array(QUERY_WORDS, uint32)
        outputs = cuda.local.array(OUTPUTS, float32)
        largest = cuda.local.array(OWN_ROWS, float32)
        totals = cuda.local.array(OWN_ROWS, float32)
        limits = cuda.local.array(OWN_ROWS, int32)
        four = cuda.local.array(4, float32)
        given = cuda.local.array(GIVEN_WORDS, uint32)

        thread = int32(cuda.threadIdx.x)
        warp, lane = registers.uniform(int32(thread >> 5)), int32(thread & 31)
        # Blocks that run side by side read the heads of the same keys, which lie side by side.
        rest = int32(cuda.blockIdx.x)
        tile = int32(rest - registers.quotient(rest, tiles) * tiles)
        rest = registers.quotient(rest, tiles)
        kv_head = int32(rest - registers.quotient(rest, heads) * heads)
        rest = registers.quotient(rest, heads)
        b = registers.quotient(rest, parts)
        part = int32(rest - b * parts)

        k_at = k + uint64(16) * uint64(kv_head) * uint64(k_head)
        v_at = v + uint64(16) * uint64(kv_head) * uint64(v_head)
        steps = (
            uint64(16) * uint64(k_key), uint64(16) * uint64(v_key),
            uint64(16) * uint64(k_batch), uint64(16) * uint64(v_batch), page,
        )  # fmt: skip
        if page == 0:
            k_at += uint64(16) * uint64(b) * uint64(k_batch)
            v_at += uint64(16) * uint64(b) * uint64(v_batch)

        keys = longest
        begin, end = share(keys, part, parts)
        if EARLY:
            grid.let_next_grid_start()
            if HINTED:
                hint(lane, int32(begin + warp), end, keys, k_at, v_at, steps)
            grid.wait_for_earlier_grids()
        if lengths != uint64(0):
            keys = copy.load_word(lengths + uint64(b) * uint64(length_step))
            keys = int32(max(int32(0), min(keys, longest)))
            begin, end = share(keys, part, parts)
        own_table = table + uint64(b) * uint64(table_batch)

        ring = base + uint32(warp * (STAGES * STAGE))
        ahead, asked = int32(begin + warp), int32(0)  # the turn to be asked for next, and the turns before it
        number = look_up(ahead, lane, own_table, table_page, page, pages)
        later = look_up(int32(ahead + WARPS * BATCH), lane, own_table, table_page, page, pages)
        for slot in range(STAGES - 1):
            if ahead < end:
                ask(ring + uint32(slot * STAGE), lane, ahead, asked, keys, number, k_at, v_at, steps)
            copy_async.commit()
            ahead, asked = int32(ahead + WARPS), int32(asked + 1)

        # While the first keys are on their way: the queries.
        row, pair = int32(tile * ROWS + (lane >> 2)), int32(lane & 3)
        all_rows, head = int32(queries * group), int32(kv_head * group)
        for c in range(COLUMNS):
            of_row = int32(row + 8 * c)
            i = registers.quotient(of_row, group)
            at = uint64(b) * uint64(q_batch) + uint64(i) * uint64(q_query)
            at += uint64(head + of_row - i * group) * uint64(q_head) + uint64(pair)
            for s in range(D // 16):
                for half in range(2):
                    word = uint32(0)
                    if of_row < all_rows:
                        word = uint32(copy.load_word(q + uint64(4) * (at + uint64(8 * s + 4 * half))))
                    fragments[2 * (COLUMNS * s + c) + half] = word
        # The newest query sees all keys, the one before it one less.
        unseen = int32(keys - queries + 1)
        lowest = int32(unseen + registers.quotient(int32(tile * ROWS), group))
        for r in range(OWN_ROWS):
            of_row = int32(tile * ROWS + 8 * (r >> 1) + 2 * pair + (r & 1))
            limits[r] = int32(unseen + registers.quotient(of_row, group))
            largest[r], totals[r] = float32(MINUS_INFINITY), float32(0.0)
        for i in range(OUTPUTS):
            outputs[i] = float32(0.0)

        scale = uint32(scale_bits).view(np.float32)
        turn, slot, free = int32(begin + warp), int32(0), int32(STAGES - 1)
        while turn < end:
            wait_for_oldest()
            barrier.warp()  # now all lanes' copies are seen, and all have done with the turn before
            if ahead < end:
                ask(ring + uint32(free * STAGE), lane, ahead, asked, keys, number, k_at, v_at, steps)
            copy_async.commit()
            ahead, asked = int32(ahead + WARPS), int32(asked + 1)
            if asked % BATCH == 0:
                number = later
                later = look_up(int32(ahead + WARPS * BATCH), lane, own_table, table_page, page, pages)
            stage = ring + uint32(slot * STAGE)
            step(outputs, largest, totals, fragments, limits, stage, lane, int32(turn * TURN), lowest, scale)
            free = slot
            slot = int32(slot + 1)
            if slot == STAGES:
                slot = int32(0)
            turn = int32(turn + WARPS)

        cuda.syncthreads()  # sums take the place of the stages
        leave(base, warp, lane, outputs, largest, totals)
        cuda.syncthreads()
        unit = int32((b * heads + kv_head) * tiles + tile)
        parts_lse = work + uint64(4 * DV * ROWS) * uint64(cuda.gridDim.x)
        lines = uint64(unit) * uint64(parts)
        items = int32(min(int32(ROWS), int32(all_rows - tile * ROWS)) * QUADS)
        for e in range(thread, items, THREADS):
            own_row = int32(registers.quotient(int32(e), int32(QUADS)))
            column = int32(4 * (e - own_row * QUADS))
            lse2 = merged_warps(four, base, own_row, column)
            if parts == 1:
                of_row = int32(tile * ROWS + own_row)
                i = registers.quotient(of_row, group)
                h = int32(head + of_row - i * group)
                write(four, lse2, out, lse, b, i, h, queries, int32(heads * group), column)
            else:
                line = (lines + uint64(part)) * uint64(ROWS) + uint64(own_row)
                copy.store_global_16(
                    work + uint64(4) * (line * uint64(DV) + uint64(column)),
                    four[0].view(np.uint32), four[1].view(np.uint32),
                    four[2].view(np.uint32), four[3].view(np.uint32),
                )  # fmt: skip
                if column == 0:
                    copy.store_global_float(parts_lse + uint64(4) * line, lse2)
        if parts == 1:
            return

        cuda.syncthreads()
        if thread == 0:
            before = turns.take_number(counters + uint64(4) * uint64(unit), int32(parts - 1))
            copy.store_shared_word(base + uint32(FLAG_AT), before)
        cuda.syncthreads()
        if copy.load_shared_word(base + uint32(FLAG_AT)) != parts - 1:
            return
        of_unit = work + lines * uint64(4 * ROWS * DV)
        # Outputs of the first parts are on their way while weights are made.
        own_row = int32(registers.quotient(thread, int32(QUADS)))
        if thread < items:
            ask_parts(given, of_unit, parts, own_row, int32(4 * (thread - own_row * QUADS)), int32(0))
        rows = int32(registers.quotient(items, int32(QUADS)))
        weigh(base, warp, lane, parts_lse + lines * uint64(4 * ROWS), parts, rows)
        cuda.syncthreads()
        for e in range(thread, items, THREADS):
            own_row = int32(registers.quotient(int32(e), int32(QUADS)))
            column = int32(4 * (e - own_row * QUADS))
            for c in range(4):
                four[c] = float32(0.0)
            for first in range(0, parts, AT_ONCE):
                if e != thread or first > 0:
                    ask_parts(given, of_unit, parts, own_row, column, int32(first))
                add_parts(four, given, base, parts, own_row, int32(first))
            of_row = int32(tile * ROWS + own_row)
            i = registers.quotient(of_row, group)
            h = int32(head + of_row - i * group)
            lse2 = copy.load_shared_float(base + uint32(LSE_AT + 4 * own_row))
            write(four, lse2, out, lse, b, i, h, queries, int32(heads * group), column)

    return decode
