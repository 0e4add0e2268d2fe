"""What a consumer warpgroup of a Hopper backward block does: 64 keys, against all queries that see them.

Per tile of queries, scores turned (rows are keys)::

    S' = K Q'    dP' = V dO'    wait for S'    P = exp2    wait for dP'    dS = P (dP - delta)
    dS to shared memory         dV += P dO     the consumers meet
    dQ = dS K    dK += dS Q     wait for dQ    dQ to shared memory, whence it is added to global memory
    wait for dK

dK and dV stay in registers over all queries, and over all query heads of the key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.gradient_hopper import build_gradient, build_stores
from cuda_backend.attention.lists_backward_hopper import BATCH, LENGTH, entry_block, entry_partial
from cuda_backend.attention.mods_backward_hopper import LOG2_E, build_mods
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.variant_backward_hopper import CONSUMERS, BackwardVariant
from cuda_backend.ptx import barrier, copy, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["build_backward_consumer"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

ALL, NONE = -(1 << 30), 1 << 30  # first column that a row may see: before and after every column


def build_backward_consumer(variant: BackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``consume(base, thread, dk_out, dv_out, scale, factor, drop, problem, aux)``, for a warpgroup.

    `scale` is that of the scores times log2(e), `factor` that of the scores; `drop` has the seed of the
    dropout, its threshold, and the factor of what is kept; `aux` the arrays of the user's functions.
    """
    block_m, block_n, d, kind, causal = (
        variant.block_m,
        variant.block_n,
        variant.d,
        variant.kind,
        variant.causal,
    )
    s_count, p_count, dk_count, dq_count = block_m // 2, block_m // 4, d // 2, variant.dq_columns // 2
    q_bytes, ds_bytes, share_bytes, stat_pitch = (
        variant.q_bytes,
        variant.ds_bytes,
        variant.share_bytes,
        variant.stat_pitch,
    )
    places = variant.places
    k_tile, v_tile, q_tiles, do_tiles = places.k_tile, places.v_tile, places.q_tiles, places.do_tiles
    ds_tiles, dq_tile, shift_places, delta_places = (
        places.ds_tiles,
        places.dq_tile,
        places.shifts,
        places.deltas,
    )
    k_full, v_full, kv_empty, tile_slot = places.k_full, places.v_full, places.kv_empty, places.tile_slot
    q_full, q_empty, do_full, do_empty = places.q_full, places.q_empty, places.do_full, places.do_empty
    dq_full, dq_empty = places.dq_full, places.dq_empty
    dropout = variant.dropout
    one_ds = variant.ds_stages == 1
    place, first_block, block_at, _, next_stage, next_ds = schedule
    mask, weights, gradient, pack = build_gradient(variant)
    lists, entry_places = variant.lists, places.entries
    allow, modify, weigh, fetch, modified, parked = build_mods(variant)
    store_ds, store_dq, store_row = build_stores(variant)
    meet = barrier.named(1, 128 * CONSUMERS)
    along_k, across_q = wgmma.descriptor_k_major, wgmma.descriptor_mn_major(128 * block_m)
    across_k = wgmma.descriptor_mn_major(128 * block_n)
    key_steps, query_steps = wgmma.k_major_steps(d, block_n), wgmma.k_major_steps(d, block_m)
    score_product = wgmma.product_shared(block_m, kind, key_steps, query_steps)
    key_product = wgmma.product_registers(d, kind, [128 * k for k in range(block_m // 16)])
    ds_steps, k_steps = wgmma.k_major_steps(block_n, block_m), [128 * k for k in range(block_n // 16)]
    swapped = variant.swapped
    if swapped:
        dq_product = wgmma.product_shared(variant.dq_columns, kind, k_steps, ds_steps, a_turned=True)
    else:
        dq_product = wgmma.product_shared(variant.dq_columns, kind, ds_steps, k_steps, b_turned=True)
    # Where in dS, and in K, a consumer's part of dQ begins: 64 rows of either, or a sub-tile of 64 columns.
    ds_part, k_part = (64 * 128, 0) if variant.row_split else (0, 128 * block_n)
    early_dv = variant.early_dv and not variant.dropout
    scores_alone = wgmma.wait(0, s_count)
    scores_done, dp_done = wgmma.wait(1, s_count), wgmma.wait(int(early_dv), s_count)
    dq_done, dk_done = wgmma.wait(1, dq_count), wgmma.wait(0, dk_count)
    pin_scores = registers.pin(s_count)

    @device_function
    def row_of(thread: Any) -> Any:
        """Return the first of the two keys of a thread, from the first of the tile on."""
        return int32(16 * (thread >> 5) - 64 + ((thread & 31) >> 2))

    @device_function
    def consume(
        base: Any,
        thread: Any,
        dk_out: Any,
        dv_out: Any,
        scale: Any,
        factor: Any,
        drop: Any,
        problem: Any,
        aux: Any,
    ) -> None:
        seed, threshold, kept = drop
        _, per_head, section, heads, all_heads, group, blocks, tq, tk, offset, k_columns, v_columns = problem
        s = cuda.local.array(s_count, float32)
        dp = cuda.local.array(s_count, float32)
        p = cuda.local.array(p_count, uint32)
        ds = cuda.local.array(p_count, uint32)
        dq = cuda.local.array(dq_count, float32)
        dk = cuda.local.array(dk_count, float32)
        dv = cuda.local.array(dk_count, float32)
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        warp = int32((thread >> 5) & 3)
        w = registers.uniform(int32(thread >> 7) - 1)
        own_row = int32(64 * w + 16 * warp + (lane >> 2))
        # Lane l gives row l % 8 of block l // 8: blocks 0 and 2 are of the first eight keys, 2 and 3 of the
        # next eight queries.
        chunk = int32((2 * warp + ((lane >> 3) & 1)) ^ (lane & 7))
        ds_lane = base + ds_tiles + w * (128 * block_m) + ((lane >> 4) * 8 + (lane & 7)) * 128 + chunk * 16
        dq_lane = base + dq_tile + w * share_bytes + (thread & 127) * 16
        k_rows = along_k(base + k_tile + w * (64 * 128))
        v_rows = along_k(base + v_tile + w * (64 * 128))
        k_across = across_k(base + k_tile + w * k_part)
        stage, parity, ds_stage, ds_parity = int32(0), int32(0), int32(0), int32(0)
        kv_parity, dq_parity = int32(0), int32(1)
        # With lists, for want of registers, one number: steps modulo 4, and 4 times the parity of K and V.
        state = int32(0)
        while True:
            if lists:
                kv_parity = int32(state >> 2)
            barrier.wait(base + k_full, kv_parity)
            tile = copy.load_warp_word(base + tile_slot, lane)
            if tile < 0:
                break
            barrier.wait(base + v_full, kv_parity)
            kv_parity = int32(kv_parity ^ 1)
            state = int32(state ^ 4)
            key_block, kv_head = place(tile, per_head, section, all_heads)
            if lists:
                key = int32(key_block * block_n + row_of(registers.thread()))
            else:
                key = int32(key_block * block_n + own_row)
            batch, head_first, first_key = int32(0), int32(0), int32(0)
            if dropout:
                batch = registers.quotient(kv_head, heads)
                head_first = int32((kv_head - batch * heads) * group)
                first_key = int32(key_block * block_n + 64 * w + 16 * warp)
            last_key = int32(key_block * block_n + 64 * w + 63)
            # The first query that this thread's rows may see; queries from `seeing` on see all keys.
            first_low, first_high, seeing = int32(ALL), int32(ALL), int32(ALL)
            if causal:
                first_low, first_high, seeing = key - offset, key + 8 - offset, int32(last_key - offset)
            first_low = registers.select_int(int32(key >= tk), NONE, first_low)
            first_high = registers.select_int(int32(key + 8 >= tk), NONE, first_high)
            if last_key >= tk:
                seeing = int32(NONE)
            for i in range(dk_count):
                dk[i] = float32(0.0)
                dv[i] = float32(0.0)
            begin, end, members = first_block(key_block, blocks, tq, offset), blocks, group
            if lists:
                begin = int32(-copy.load_warp_word(base + tile_slot + LENGTH, lane))
                end, members = int32(0), int32(1)
            member = int32(0)
            while member < members:
                at = begin
                while at < end:
                    block = block_at(at, key_block, section, blocks)
                    if lists:
                        stage, parity = int32(state & 1), int32((state >> 1) & 1)
                        ds_stage, dq_parity = int32(state & 1), int32((state & 1) ^ 1)
                    q_place = base + q_tiles + stage * q_bytes
                    do_place = base + do_tiles + stage * q_bytes
                    barrier.wait(base + q_full + 8 * stage, parity)
                    wgmma.fence()
                    score_product(s, k_rows, along_k(q_place))
                    wgmma.commit()
                    if not modified:
                        barrier.wait(base + do_full + 8 * stage, parity)
                        score_product(dp, v_rows, along_k(do_place))
                        wgmma.commit()
                    if lists:
                        entry = copy.load_warp_word(base + entry_places + 8 * stage, lane)
                        block = entry_block(entry)
                    if modified:
                        scores_alone(s)
                    else:
                        scores_done(s)
                    row = int32(block * block_m)
                    drawn = (
                        seed, batch, int32(head_first + member), row, first_key, lane, threshold, kept
                    )  # fmt: skip
                    own_shifts = base + shift_places + stage * stat_pitch + 8 * quad_lane
                    if lists:
                        batch = copy.load_warp_word(base + tile_slot + BATCH, lane)
                        head = copy.load_warp_word(base + entry_places + 8 * stage + 4, lane)
                        where = batch, head, int32(row + 2 * quad_lane), key, tq, tk, aux
                        own_ds = ds_lane + ds_stage * ds_bytes
                        if entry_partial(entry) != 0:
                            allow(s, where)
                        if modified:
                            if parked:
                                weigh(s, factor, own_shifts, own_ds, where)
                            else:
                                modify(s, factor, own_shifts, own_ds, where)
                            pin_scores(s)
                            # dP only now: beside its accumulators there is no room for what functions want.
                            barrier.wait(base + do_full + 8 * stage, parity)
                            wgmma.fence()
                            score_product(dp, v_rows, along_k(do_place))
                            wgmma.commit()
                            if not parked:
                                weights(s, float32(LOG2_E), own_shifts)
                        else:
                            weights(s, scale, own_shifts)
                    else:
                        if row < seeing:
                            shift = row + 2 * quad_lane
                            mask(s, first_low - shift, first_high - shift)
                        weights(s, scale, own_shifts)
                    # Without the pin, ptxas may move the exponentials behind the wait for dP.
                    pin_scores(s)
                    if early_dv:
                        pack(p, s)
                        wgmma.fence()
                        key_product(dv, p, across_q(do_place))
                        wgmma.commit()
                    dp_done(dp)
                    gradient(dp, s, base + delta_places + stage * stat_pitch + 8 * quad_lane, drawn)
                    if parked:
                        fetch(p, ds_lane + ds_stage * ds_bytes)
                    elif not early_dv:
                        pack(p, s)
                    pack(ds, dp)
                    if one_ds:
                        meet()
                    store_ds(ds, ds_lane + ds_stage * ds_bytes)
                    barrier.publish_stores()
                    if not early_dv:
                        wgmma.fence()
                        key_product(dv, p, across_q(do_place))
                        wgmma.commit()
                    meet()
                    if early_dv:
                        wgmma.fence()
                    ds_rows = along_k(base + ds_tiles + ds_stage * ds_bytes + w * ds_part)
                    if swapped:
                        dq_product(dq, k_across, ds_rows)
                    else:
                        dq_product(dq, ds_rows, k_across)
                    wgmma.commit()
                    key_product(dk, ds, across_q(q_place))
                    wgmma.commit()
                    dq_done(dq)
                    barrier.arrive_warp(base + do_empty + 8 * stage, lane)
                    barrier.wait(base + dq_empty + 8 * w, dq_parity)
                    store_dq(dq, dq_lane)
                    barrier.publish_stores()
                    barrier.arrive_warp(base + dq_full + 8 * w, lane)
                    dq_parity = int32(dq_parity ^ 1)
                    dk_done(dk)
                    barrier.arrive_warp(base + q_empty + 8 * stage, lane)
                    stage, parity = next_stage(stage, parity)
                    ds_stage, ds_parity = next_ds(ds_stage, ds_parity)
                    state = int32((state & 4) | ((state + 1) & 3))
                    at = registers.successor(at)
                member = registers.successor(member)
            if lists:  # as above: for want of registers it has not been kept
                tile = copy.load_warp_word(base + tile_slot, lane)
                key_block, kv_head = place(tile, per_head, section, all_heads)
                key = int32(key_block * block_n + row_of(registers.thread()))
            barrier.arrive_warp(base + kv_empty, lane)
            batch = registers.quotient(kv_head, heads)
            line = (uint64(batch) * uint64(tk) + uint64(key)) * uint64(heads) + uint64(
                kv_head - batch * heads
            )
            for half in range(2):
                below = uint64(8 * half * heads)
                valid = int32(key + 8 * half < tk)
                address = dk_out + (line + below) * uint64(2 * k_columns)
                store_row(dk, int32(2 * half), factor, address, quad_lane, k_columns, valid)
                address = dv_out + (line + below) * uint64(2 * v_columns)
                store_row(dv, int32(2 * half), float32(1.0), address, quad_lane, v_columns, valid)

    return consume
