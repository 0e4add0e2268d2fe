"""What a consumer warpgroup of a Hopper block does: 64 query rows of a tile, against all keys they see.

The order of one step, with the softmax of one key tile beside P V of the tile before it::

    issue S = Q K(j)'     issue O += P V(j-1)     wait for S     softmax     wait for O     P = S
    rescale O
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.finish_hopper import build_finish
from cuda_backend.attention.schedule_hopper import Schedule
from cuda_backend.attention.softmax_hopper import NO_KEY, build_drop, build_output, build_softmax, build_tile
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.ptx import barrier, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["build_consumer"]

int32, uint32, float32 = types.int32, types.uint32, types.float32


def build_consumer(variant: Variant, schedule: Schedule) -> Callable[..., None]:
    """Return ``consume(base, thread, out, lse, scale, drop, problem)``, for a whole warpgroup.

    `drop` has the seed of the dropout, its threshold, and the factor of what is kept.
    """
    block_m, block_n = variant.block_m, variant.block_n
    s_count, o_count, p_count = block_n // 2, variant.d_v // 2, block_n // 4
    q_bytes, k_bytes, v_bytes = variant.q_bytes, variant.k_bytes, variant.v_bytes
    _, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = variant.places
    place, key_tiles, next_stage, next_q_stage = schedule
    _, softmax_row, pack_scores = build_softmax(variant)
    tile_of, limits_of, mask_tile = build_tile(variant)
    (rescale, _, _), finish = build_output(variant), build_finish(variant)
    dropout, drop_weights = variant.dropout, build_drop(variant)
    pin_scores = registers.pin(s_count)
    k_descriptor, v_descriptor = wgmma.descriptor_k_major, wgmma.descriptor_mn_major(128 * block_n)
    q_steps, k_steps = (wgmma.k_major_steps(variant.d_qk, rows) for rows in (block_m, block_n))
    qk_product = wgmma.product_shared(block_n, variant.kind, q_steps, k_steps)
    pv_product = wgmma.product_registers(variant.d_v, variant.kind, [128 * k for k in range(block_n // 16)])
    scores_done, scores_first_done = wgmma.wait(0, s_count), wgmma.wait(1, s_count)
    output_done = wgmma.wait(0, o_count)

    @device_function
    def softmax(s: Any, scale: Any, j: Any, quad_lane: Any, limits: Any, rows: Any) -> Any:
        """Turn scores of key tile `j` into weights; return maxima, sums and factors of what was before."""
        max_low, sum_low, max_high, sum_high = rows
        mask_tile(s, j, quad_lane, limits)
        max_low, sum_low, factor_low = softmax_row(s, int32(0), scale, max_low, sum_low)
        max_high, sum_high, factor_high = softmax_row(s, int32(2), scale, max_high, sum_high)
        return max_low, sum_low, max_high, sum_high, factor_low, factor_high

    @device_function
    def drop_tile(
        s: Any, seed: Any, threshold: Any, head: Any, heads: Any, row: Any, j: Any, quad_lane: Any
    ) -> None:
        """Drop weights of key tile `j`; batch and head come anew each time, for want of registers."""
        start = int32(j * block_n)
        batch = registers.quotient(registers.fresh(head), heads)
        drop_weights(s, seed, threshold, batch, int32(head - batch * heads), row, start, quad_lane)

    @device_function
    def consume(base: Any, thread: Any, out: Any, lse: Any, scale: Any, drop: Any, problem: Any) -> None:
        seed, threshold, kept = drop
        _, per_head, section, heads, all_heads, _, tq, tk, offset, columns = problem
        s = cuda.local.array(s_count, float32)
        o = cuda.local.array(o_count, float32)
        p = cuda.local.array(p_count, uint32)
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        group_index = registers.uniform(int32(thread >> 7) - 1)
        own_row = int32(64 * group_index + 16 * ((thread >> 5) & 3) + (lane >> 2))
        stage, parity, q_stage, q_parity = int32(0), int32(0), int32(0), int32(0)
        while True:
            barrier.wait(base + q_full + 8 * q_stage, q_parity)
            tile = tile_of(base, q_stage, lane)
            if tile < 0:
                break
            q_descriptor = k_descriptor(base + q_stage * q_bytes + group_index * (64 * 128))
            row_block, head = place(tile, per_head, section, all_heads)
            row = int32(row_block * block_m + own_row)
            group_row = int32(row_block * block_m + 64 * group_index)
            limits = limits_of(row, group_row, tk, offset)
            for i in range(o_count):
                o[i] = float32(0.0)
            max_low, max_high = float32(NO_KEY), float32(NO_KEY)
            sum_low, sum_high = float32(0.0), float32(0.0)
            j = int32(key_tiles((row_block + 1) * block_m, tq, tk, offset) - 1)
            own = key_tiles(group_row + 64, tq, tk, offset) if group_row < tq else int32(0)
            while j >= own:  # what only other warpgroups need
                barrier.wait(base + k_full + 8 * stage, parity)
                barrier.wait(base + v_full + 8 * stage, parity)
                if lane == 0:
                    barrier.arrive(base + k_empty + 8 * stage)
                    barrier.arrive(base + v_empty + 8 * stage)
                stage, parity = next_stage(stage, parity)
                j = int32(j - 1)
            if j >= 0:
                barrier.wait(base + k_full + 8 * stage, parity)
                wgmma.fence()
                qk_product(s, q_descriptor, k_descriptor(base + k_tiles + stage * k_bytes))
                wgmma.commit()
                scores_done(s)
                if lane == 0:
                    barrier.arrive(base + k_empty + 8 * stage)
                max_low, sum_low, max_high, sum_high, factor_low, factor_high = softmax(
                    s, scale, j, quad_lane, limits, (max_low, sum_low, max_high, sum_high)
                )
                if dropout:
                    drop_tile(s, seed, threshold, head, heads, row, j, quad_lane)
                barrier.wait(base + v_full + 8 * stage, parity)
                pack_scores(p, s)
                j = int32(j - 1)
                while j >= 0:
                    old_stage = stage
                    stage, parity = next_stage(stage, parity)
                    barrier.wait(base + k_full + 8 * stage, parity)
                    wgmma.fence()
                    qk_product(s, q_descriptor, k_descriptor(base + k_tiles + stage * k_bytes))
                    wgmma.commit()
                    pv_product(o, p, v_descriptor(base + v_tiles + old_stage * v_bytes))
                    wgmma.commit()
                    scores_first_done(s)
                    if lane == 0:
                        barrier.arrive(base + k_empty + 8 * stage)
                    max_low, sum_low, max_high, sum_high, factor_low, factor_high = softmax(
                        s, scale, j, quad_lane, limits, (max_low, sum_low, max_high, sum_high)
                    )
                    if dropout:
                        drop_tile(s, seed, threshold, head, heads, row, j, quad_lane)
                    # Without the pin, ptxas moves the exponentials behind the wait for O: no overlap.
                    pin_scores(s)
                    barrier.wait(base + v_full + 8 * stage, parity)
                    output_done(o)
                    if lane == 0:
                        barrier.arrive(base + v_empty + 8 * old_stage)
                    pack_scores(p, s)
                    rescale(o, factor_low, factor_high)
                    j = int32(j - 1)
                if lane == 0:
                    barrier.arrive(base + q_empty + 8 * q_stage)
                wgmma.fence()
                pv_product(o, p, v_descriptor(base + v_tiles + stage * v_bytes))
                wgmma.commit()
                output_done(o)
                if lane == 0:
                    barrier.arrive(base + v_empty + 8 * stage)
                stage, parity = next_stage(stage, parity)
            elif lane == 0:
                barrier.arrive(base + q_empty + 8 * q_stage)
            q_stage, q_parity = next_q_stage(q_stage, q_parity)

            if dropout:
                rescale(o, kept, kept)
            rows = max_low, sum_low, max_high, sum_high
            finish(o, rows, scale, out, lse, row, head, quad_lane, (heads, tq, columns))

    return consume
