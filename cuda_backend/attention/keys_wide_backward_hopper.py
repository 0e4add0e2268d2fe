"""What the second consumer of a wide Hopper backward block does: dS, dK, and the last columns of dQ.

Per tile of queries, scores turned (rows are keys)::

    dP' = V dO'    wait for P    dS = P (dP - delta), to shared memory    dQ = dS K    dK += dS Q
    wait for dQ    dQ added      wait for dK

dK stays in registers over all queries, and over all query heads of the key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.exchange_wide_backward_hopper import (
    DS_TURN,
    MEET,
    P_TURN,
    build_queries,
    build_receiver,
)
from cuda_backend.attention.gradient_hopper import build_gradient, build_stores
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import barrier, copy, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["build_keys_consumer"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


def build_keys_consumer(variant: WideBackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``consume(base, thread, dk_out, sums, words, factor, kept, problem)``, for a whole warpgroup.

    `thread` counts within the warpgroup; `factor` is that of the scores, `kept` of what dropout keeps.
    """
    block_m, block_n = variant.block_m, variant.block_n
    s_count, p_count, dk_count = block_m // 2, block_m // 4, variant.d // 2
    dq_count = 32 * variant.dq_shares(1)[1]
    q_bytes, do_bytes, stat_pitch = variant.q_bytes, variant.do_bytes, variant.stat_pitch
    places = variant.places
    v_tile, q_tiles, do_tiles, p_tile = places.v_tile, places.q_tiles, places.do_tiles, places.p_tile
    ds_tile, delta_places, tile_slot = places.ds_tile, places.deltas, places.tile_slot
    k_full, v_full, kv_empty = places.k_full, places.v_full, places.kv_empty
    q_full, q_empty, do_full, do_empty = places.q_full, places.q_empty, places.do_full, places.do_empty
    ds_empty = places.ds_empty
    place, first_block, block_at, turn, next_stage, _ = schedule
    pack = build_gradient(variant)[3]
    receive = build_receiver(variant)
    meet = barrier.named(MEET, 128)
    store_ds, _, store_row = build_stores(variant)
    multiply_queries, look, add_queries, let = build_queries(variant, 1)
    along_v, across_q = wgmma.descriptor_k_major, wgmma.descriptor_mn_major(128 * block_m)
    v_steps, do_steps = (wgmma.k_major_steps(variant.d_v, rows) for rows in (block_n, block_m))
    dp_product = wgmma.product_shared(block_m, variant.kind, v_steps, do_steps)
    key_product = wgmma.product_registers(variant.d, variant.kind, [128 * k for k in range(block_m // 16)])
    dp_done, queries_done, keys_done = (
        wgmma.wait(0, s_count),
        wgmma.wait(1, dq_count),
        wgmma.wait(0, dk_count),
    )

    @device_function
    def consume(
        base: Any, thread: Any, dk_out: Any, sums: Any, words: Any, factor: Any, kept: Any, problem: Any
    ) -> None:
        _, per_head, section, heads, all_heads, group, blocks, tq, tk, offset, columns, _ = problem
        dp = cuda.local.array(s_count, float32)
        ds = cuda.local.array(p_count, uint32)
        dq = cuda.local.array(dq_count, float32)
        dk = cuda.local.array(dk_count, float32)
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        warp = int32(thread >> 5)
        # Lane l gives row l % 8 of block l // 8: blocks 0 and 2 are of the first eight keys, 2 and 3 of the
        # next eight queries.
        chunk = int32((2 * warp + ((lane >> 3) & 1)) ^ (lane & 7))
        ds_lane = base + ds_tile + ((lane >> 4) * 8 + (lane & 7)) * 128 + chunk * 16
        p_lane = base + p_tile + 16 * thread
        v_rows = along_v(base + v_tile)
        stage, parity, kv_parity, step_parity = int32(0), int32(0), int32(0), int32(0)
        added = int32(-1)  # the tile that the next block of keys is not yet told of
        while True:
            barrier.wait(base + k_full, kv_parity)
            tile = copy.load_warp_word(base + tile_slot, lane)
            if tile < 0:
                break
            barrier.wait(base + v_full, kv_parity)
            kv_parity = int32(kv_parity ^ 1)
            key_block, kv_head = place(tile, per_head, section, all_heads)
            for i in range(dk_count):
                dk[i] = float32(0.0)
            begin = first_block(key_block, blocks, tq, offset)
            member = int32(0)
            while member < group:
                step = begin
                while step < blocks:
                    block = block_at(step, key_block, section, blocks)
                    barrier.wait(base + do_full + 8 * stage, parity)
                    wgmma.fence()
                    dp_product(dp, v_rows, along_v(base + do_tiles + stage * do_bytes))
                    wgmma.commit()
                    let(words, added, lane)
                    dp_done(dp)
                    barrier.take_turn(P_TURN)
                    receive(dp, p_lane, base + delta_places + stage * stat_pitch + 8 * quad_lane, kept)
                    barrier.arrive_warp(base + do_empty + 8 * stage, lane)
                    pack(ds, dp)
                    # Other warps of this warpgroup may still multiply dS; the first consumer has, see P.
                    barrier.wait(base + ds_empty, step_parity ^ 1)
                    store_ds(ds, ds_lane)
                    barrier.publish_stores()
                    barrier.give_turn(DS_TURN)
                    barrier.wait(base + q_full + 8 * stage, parity)
                    meet()
                    step_parity = int32(step_parity ^ 1)
                    multiply_queries(dq, base)
                    key_product(dk, ds, across_q(base + q_tiles + stage * q_bytes))
                    wgmma.commit()
                    added = int32((kv_head * group + member) * blocks + block)
                    sizes = per_head, section, blocks, tq, tk, offset
                    look(words, added, turn(key_block, step, block, sizes))
                    queries_done(dq)
                    barrier.arrive_warp(base + ds_empty, lane)
                    add_queries(dq, sums, added, thread)
                    keys_done(dk)
                    barrier.arrive_warp(base + q_empty + 8 * stage, lane)
                    stage, parity = next_stage(stage, parity)
                    step = registers.successor(step)
                member = registers.successor(member)
            let(words, added, lane)
            added = int32(-1)
            barrier.arrive_warp(base + kv_empty, lane)
            key = int32(key_block * block_n + 16 * warp + (lane >> 2))
            batch = registers.quotient(kv_head, heads)
            rows = (uint64(batch) * uint64(tk) + uint64(key)) * uint64(heads) + uint64(
                kv_head - batch * heads
            )
            for half in range(2):
                address = dk_out + (rows + uint64(8 * half * heads)) * uint64(2 * columns)
                valid = int32(key + 8 * half < tk)
                store_row(dk, int32(2 * half), factor, address, quad_lane, columns, valid)

    return consume
