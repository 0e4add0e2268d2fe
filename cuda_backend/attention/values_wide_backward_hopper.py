"""What the first consumer of a wide Hopper backward block does: P, dV, and the first columns of dQ.

Per tile of queries, scores turned (rows are keys)::

    S' = K Q'    P = exp2    P to the second consumer    dV += P dO    wait for dS    dQ = dS K, added

dV stays in registers over all queries, and over all query heads of the key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.exchange_wide_backward_hopper import DS_TURN, P_TURN, build_queries, build_sender
from cuda_backend.attention.gradient_hopper import build_gradient, build_stores
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import barrier, copy, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["build_values_consumer"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

ALL, NONE = -(1 << 30), 1 << 30  # first column that a row may see: before and after every column


def build_values_consumer(variant: WideBackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``consume(base, thread, dv_out, sums, words, scale, drop, problem)``, for a whole warpgroup.

    `thread` counts within the warpgroup; `scale` is that of the scores times log2(e); `drop` has the seed of
    the dropout, its threshold, and the factor of what is kept.
    """
    block_m, block_n, causal, dropout = variant.block_m, variant.block_n, variant.causal, variant.dropout
    s_count, p_count, dv_count = block_m // 2, block_m // 4, variant.d_v // 2
    dq_count = 32 * variant.dq_shares(0)[1]
    q_bytes, do_bytes, stat_pitch = variant.q_bytes, variant.do_bytes, variant.stat_pitch
    places = variant.places
    k_tile, q_tiles, do_tiles, p_tile = places.k_tile, places.q_tiles, places.do_tiles, places.p_tile
    k_full, kv_empty, tile_slot, shift_places = (
        places.k_full,
        places.kv_empty,
        places.tile_slot,
        places.shifts,
    )
    q_full, q_empty, do_full, do_empty = places.q_full, places.q_empty, places.do_full, places.do_empty
    place, first_block, block_at, turn, next_stage, _ = schedule
    mask, weights, _, pack = build_gradient(variant)
    send, mark, keep = build_sender(variant)
    store_row = build_stores(variant._replace(d=variant.d_v))[2]
    multiply_queries, look, add_queries, let = build_queries(variant, 0)
    along_k, across_q = wgmma.descriptor_k_major, wgmma.descriptor_mn_major(128 * block_m)
    key_steps, query_steps = (wgmma.k_major_steps(variant.d, rows) for rows in (block_n, block_m))
    score_product = wgmma.product_shared(block_m, variant.kind, key_steps, query_steps)
    value_product = wgmma.product_registers(
        variant.d_v, variant.kind, [128 * k for k in range(block_m // 16)]
    )
    scores_done, values_done = wgmma.wait(0, s_count), wgmma.wait(1, dv_count)
    queries_done = wgmma.wait(0, dq_count)

    @device_function
    def consume(
        base: Any, thread: Any, dv_out: Any, sums: Any, words: Any, scale: Any, drop: Any, problem: Any
    ) -> None:
        seed, threshold, kept = drop
        _, per_head, section, heads, all_heads, group, blocks, tq, tk, offset, _, columns = problem
        s = cuda.local.array(s_count, float32)
        p = cuda.local.array(p_count, uint32)
        dv = cuda.local.array(dv_count, float32)
        dq = cuda.local.array(dq_count, float32)
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        warp = int32(thread >> 5)
        own_row = int32(16 * warp + (lane >> 2))
        p_lane = base + p_tile + 16 * thread
        k_rows = along_k(base + k_tile)
        stage, parity, kv_parity = int32(0), int32(0), int32(0)
        added = int32(-1)  # the tile that the next block of keys is not yet told of
        while True:
            barrier.wait(base + k_full, kv_parity)
            kv_parity = int32(kv_parity ^ 1)
            tile = copy.load_warp_word(base + tile_slot, lane)
            if tile < 0:
                break
            key_block, kv_head = place(tile, per_head, section, all_heads)
            key = int32(key_block * block_n + own_row)
            for i in range(dv_count):
                dv[i] = float32(0.0)
            seeing = int32(ALL)  # queries from here on see all keys
            if causal:
                seeing = int32(key_block * block_n + (block_n - 1) - offset)
            if key_block * block_n + block_n > tk:
                seeing = int32(NONE)
            begin = first_block(key_block, blocks, tq, offset)
            member = int32(0)
            while member < group:
                step = begin
                while step < blocks:
                    block = block_at(step, key_block, section, blocks)
                    do_place = base + do_tiles + stage * do_bytes
                    barrier.wait(base + q_full + 8 * stage, parity)
                    wgmma.fence()
                    score_product(s, k_rows, along_k(base + q_tiles + stage * q_bytes))
                    wgmma.commit()
                    let(words, added, lane)
                    scores_done(s)
                    row = int32(block * block_m)
                    if row < seeing:
                        # The first query that may see the thread's two rows.
                        first_low, first_high = int32(ALL), int32(ALL)
                        if causal:
                            first_low, first_high = key - offset, key + 8 - offset
                        first_low = registers.select_int(int32(key >= tk), NONE, first_low)
                        first_high = registers.select_int(int32(key + 8 >= tk), NONE, first_high)
                        shift = row + 2 * quad_lane
                        mask(s, first_low - shift, first_high - shift)
                    weights(s, scale, base + shift_places + stage * stat_pitch + 8 * quad_lane)
                    barrier.arrive_warp(base + q_empty + 8 * stage, lane)
                    if dropout:
                        # For want of registers anew for each tile.
                        batch = registers.quotient(registers.fresh(kv_head), heads)
                        head = int32((kv_head - batch * heads) * group + member)
                        mark(s, (seed, batch, head, row, int32(key - (lane >> 2)), lane, threshold))
                    send(s, p_lane)
                    barrier.give_turn(P_TURN)
                    if dropout:
                        keep(s, kept)
                    pack(p, s)
                    barrier.wait(base + do_full + 8 * stage, parity)
                    wgmma.fence()
                    value_product(dv, p, across_q(do_place))
                    wgmma.commit()
                    barrier.take_turn(DS_TURN)
                    multiply_queries(dq, base)
                    values_done(dv)
                    barrier.arrive_warp(base + do_empty + 8 * stage, lane)
                    added = int32((kv_head * group + member) * blocks + block)
                    sizes = per_head, section, blocks, tq, tk, offset
                    look(words, added, turn(key_block, step, block, sizes))
                    queries_done(dq)
                    add_queries(dq, sums, added, thread)
                    stage, parity = next_stage(stage, parity)
                    step = registers.successor(step)
                member = registers.successor(member)
            let(words, added, lane)
            added = int32(-1)
            barrier.arrive_warp(base + kv_empty, lane)
            batch = registers.quotient(kv_head, heads)
            rows = (uint64(batch) * uint64(tk) + uint64(key)) * uint64(heads) + uint64(
                kv_head - batch * heads
            )
            for half in range(2):
                address = dv_out + (rows + uint64(8 * half * heads)) * uint64(2 * columns)
                valid = int32(key + 8 * half < tk)
                store_row(dv, int32(2 * half), float32(1.0), address, quad_lane, columns, valid)

    return consume
