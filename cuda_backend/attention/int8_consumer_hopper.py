"""What a consumer warpgroup does for attention in int8: `consumer_hopper`'s steps, scores from codes.

Scores of a key tile are integers times one factor, of the queries' block, the tile's and the scale.  They
come as float32 of `wgmma.MIDDLE` plus the integer, which neither the mask nor the maximum minds, and one FMA
takes them to the exponent: ``exp2(s * c - (MIDDLE * c + max))``.  Its constant is rounded at the size of
MIDDLE * c, which moves the weights of a row and tile by a factor of 1 + c / 2 at most; c is a 2**-21st of the
largest score that the codes can express.

A row's maximum stays as it is until it lags behind by more than `LAG`; where no row of a warp has moved its
own, O is not rescaled.  The two warpgroups issue Q Kᵀ in turns, so that one is at its softmax while the
other's products run; the turn is given on before P V is issued.  docs/performance.md has the kernels without.

A warpgroup's tile is a chain that is longer than its products: O is waited for before the last exponentials,
beside which P is packed and the next sums are set to MIDDLE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.finish_hopper import build_rows
from cuda_backend.attention.schedule_hopper import Schedule
from cuda_backend.attention.softmax_hopper import NO_KEY, build_output, build_softmax, build_tile
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.ptx import barrier, copy, grid, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["CODE_BYTES", "build_consumer"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

CODE_BYTES = 128  # of a row of codes: a head of up to 128, filled with zeros
STEPS = [0, 2, 4, 6]  # along a row of codes, 32 each, in units of 16 bytes
LAG = 8.0  # binary orders that a maximum may lag behind: weights stay below 256
EARLY = 6  # of 16: quads of scores whose exponentials are taken before O is waited for
TURNS = 2  # the number of the first warpgroup's turn


def build_consumer(variant: Variant, schedule: Schedule) -> Callable[..., None]:
    """Return ``consume(base, thread, out, scales, scale, problem)``, a device function for a whole warpgroup.

    ``scales`` are the addresses of the scales of q and k and how many of each a head has.
    """
    block_m, block_n = variant.block_m, variant.block_n
    s_count, o_count, p_count = block_n // 2, variant.d_v // 2, block_n // 4
    QUADS = block_n // 8  # of two numbers of each of a thread's two rows
    q_bytes, k_bytes, v_bytes = variant.q_bytes, variant.k_bytes, variant.v_bytes
    _, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = variant.places
    place, key_tiles, next_stage, next_q_stage = schedule
    (row_top, weights, set_back), pack_scores = build_softmax_parts(variant), build_softmax(variant)[2]
    tile_of, limits_of, mask_tile = build_tile(variant)
    (rescale, row_total, _), (inverse, store_rows) = build_output(variant), build_rows(variant)
    pin_scores = registers.pin(s_count)
    k_descriptor, v_descriptor = wgmma.descriptor_k_major, wgmma.descriptor_mn_major(128 * block_n)
    first_product = wgmma.product_codes_from_middle(block_n, STEPS)
    qk_product = wgmma.product_codes_behind_fence(block_n, STEPS)
    pv_product = wgmma.product_registers(variant.d_v, variant.kind, [128 * k for k in range(block_n // 16)])
    scores_done, scores_first_done = wgmma.wait(0, s_count), wgmma.wait(1, s_count)
    output_done = wgmma.wait(0, o_count)

    @device_function
    def tops(
        codes: Any, s: Any, factor: Any, j: Any, quad_lane: Any, limits: Any, max_low: Any, max_high: Any
    ) -> Any:
        """Mask scores of key tile `j`; return maxima, what is taken off, and factors of what was before."""
        for i in range(s_count):
            s[i] = codes[i].view(np.float32)
        mask_tile(s, j, quad_lane, limits)
        max_low, shift_low, factor_low = row_top(s, int32(0), factor, max_low)
        max_high, shift_high, factor_high = row_top(s, int32(2), factor, max_high)
        return max_low, max_high, shift_low, shift_high, factor_low, factor_high

    @device_function
    def consume(base: Any, thread: Any, out: Any, scales: Any, scale: Any, problem: Any) -> None:
        grid.wait_for_earlier_grids()  # which write the scales
        _, per_head, section, heads, all_heads, group, tq, tk, offset, columns = problem
        q_scales, k_scales, q_blocks, k_blocks = scales
        codes = cuda.local.array(s_count, int32)
        s = cuda.local.array(s_count, float32)
        o = cuda.local.array(o_count, float32)
        p = cuda.local.array(p_count, uint32)
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        group_index = registers.uniform(int32(thread >> 7) - 1)
        own_row = int32(64 * group_index + 16 * ((thread >> 5) & 3) + (lane >> 2))
        own_turn, other_turn = int32(TURNS + group_index), int32(TURNS + 1 - group_index)
        if group_index == 1:
            barrier.give_turn(other_turn)
        zero = int32(min(tq, int32(0))).view(np.float32)  # which the compiler does not know
        stage, parity, q_stage, q_parity = int32(0), int32(0), int32(0), int32(0)
        while True:
            barrier.wait(base + q_full + 8 * q_stage, q_parity)
            tile = tile_of(base, q_stage, lane)
            if tile < 0:
                break
            q_descriptor = k_descriptor(base + q_stage * q_bytes + group_index * (64 * CODE_BYTES))
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
            batch = registers.quotient(head, heads)
            kv_head = registers.quotient(int32(head - batch * heads), group)
            kv_heads = registers.quotient(heads, group)
            line = uint64(batch) * uint64(kv_heads) + uint64(kv_head)
            of_keys = k_scales + uint64(4) * line * uint64(k_blocks)
            block = int32(min(registers.quotient(group_row, int32(64)), q_blocks - 1))
            place_of_q = uint64(4) * (uint64(head) * uint64(q_blocks) + uint64(block))
            q_factor = copy.load_float(q_scales + place_of_q) * scale
            while j >= own:  # what only other warpgroups need
                barrier.take_turn(own_turn)
                barrier.give_turn(other_turn)
                barrier.wait(base + k_full + 8 * stage, parity)
                barrier.wait(base + v_full + 8 * stage, parity)
                if lane == 0:
                    barrier.arrive(base + k_empty + 8 * stage)
                    barrier.arrive(base + v_empty + 8 * stage)
                stage, parity = next_stage(stage, parity)
                j = int32(j - 1)
            if j >= 0:
                k_factor = copy.load_float(of_keys + uint64(4) * uint64(j))
                barrier.wait(base + k_full + 8 * stage, parity)
                barrier.take_turn(own_turn)
                first_product(codes, q_descriptor, k_descriptor(base + k_tiles + stage * k_bytes))
                wgmma.commit()
                barrier.give_turn(other_turn)
                scores_done(codes)
                if lane == 0:
                    barrier.arrive(base + k_empty + 8 * stage)
                factor = q_factor * k_factor
                max_low, max_high, shift_low, shift_high, factor_low, factor_high = tops(
                    codes, s, factor, j, quad_lane, limits, max_low, max_high
                )
                sum_low = weights(s, int32(0), factor, shift_low, 0, QUADS)
                sum_high = weights(s, int32(2), factor, shift_high, 0, QUADS)
                barrier.wait(base + v_full + 8 * stage, parity)
                pack_scores(p, s)
                set_back(codes, s, zero)
                j = int32(j - 1)
                while j >= 0:
                    old_stage = stage
                    stage, parity = next_stage(stage, parity)
                    k_factor = copy.load_float(of_keys + uint64(4) * uint64(j))
                    barrier.wait(base + k_full + 8 * stage, parity)
                    barrier.take_turn(own_turn)
                    qk_product(codes, q_descriptor, k_descriptor(base + k_tiles + stage * k_bytes))
                    wgmma.commit()
                    barrier.give_turn(other_turn)
                    pv_product(o, p, v_descriptor(base + v_tiles + old_stage * v_bytes))
                    wgmma.commit()
                    scores_first_done(codes)
                    if lane == 0:
                        barrier.arrive(base + k_empty + 8 * stage)
                    factor = q_factor * k_factor
                    max_low, max_high, shift_low, shift_high, factor_low, factor_high = tops(
                        codes, s, factor, j, quad_lane, limits, max_low, max_high
                    )
                    sum_low = sum_low * factor_low + weights(s, int32(0), factor, shift_low, 0, EARLY)
                    sum_high = sum_high * factor_high + weights(s, int32(2), factor, shift_high, 0, EARLY)
                    # Without the pin, ptxas moves the exponentials behind the wait for O: no overlap.
                    pin_scores(s)
                    barrier.wait(base + v_full + 8 * stage, parity)
                    output_done(o)
                    if lane == 0:
                        barrier.arrive(base + v_empty + 8 * old_stage)
                    # P is free: what is packed and set back goes beside the last exponentials.
                    sum_low += weights(s, int32(0), factor, shift_low, EARLY, QUADS)
                    sum_high += weights(s, int32(2), factor, shift_high, EARLY, QUADS)
                    pack_scores(p, s)
                    set_back(codes, s, zero)
                    moved = int32(factor_low != float32(1.0)) | int32(factor_high != float32(1.0))
                    if registers.any_lane(moved) != 0:
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

            sum_low, sum_high = row_total(sum_low), row_total(sum_high)
            factors = inverse(sum_low), inverse(sum_high)
            store_rows(o, factors, out, row, head, batch, quad_lane, (heads, tq, columns))

    return consume


def build_softmax_parts(variant: Variant) -> tuple[Callable[..., Any], ...]:
    """Return ``row_top``, ``weights`` and ``set_back`` for scores of MIDDLE plus an integer.

    ``row_top(s, first, factor, old_max)`` is the new maximum of a row (``first`` 0 or 2), which lags behind
    and is of the scores times ``factor``; what is taken off; and the factor for what was summed before.
    ``weights(s, first, factor, shift, begin, end)`` turns a part of it into weights in place and returns
    their sum.  ``set_back(codes, s, zero)`` makes accumulators MIDDLE again: as a number times
    `zero` plus MIDDLE, since ptxas puts constants just in front of the product, which waits.
    """
    quads, middle = variant.block_n // 8, wgmma.MIDDLE

    @device_function
    def row_top(s: Any, first: Any, factor: Any, old_max: Any) -> Any:
        largest = float32(NO_KEY).view(np.int32)  # integers: these float32 are ordered so, and three compare
        for i in range(quads):
            largest = max(largest, s[4 * i + first].view(np.int32), s[4 * i + first + 1].view(np.int32))
        top_score = int32(largest).view(np.float32)
        top_score = registers.maximum(top_score, registers.exchange_float(top_score, 1))
        top_score = registers.maximum(top_score, registers.exchange_float(top_score, 2))
        new_max = registers.maximum(old_max, (top_score - float32(middle)) * factor)
        new_max = old_max if new_max <= old_max + float32(LAG) else new_max
        # A row without a key so far: exp2(-inf - 0) = 0, where exp2(-inf + inf) would be NaN.
        top = new_max if new_max != float32(NO_KEY) else float32(0.0)
        shift = registers.fused_multiply_add(float32(middle), factor, top)
        return new_max, shift, registers.exp2(old_max - top)

    @device_function
    def weights(s: Any, first: Any, factor: Any, shift: Any, begin: Any, end: Any) -> Any:
        total = float32(0.0)
        for i in range(begin, end):
            for e in range(2):
                p = registers.exp2(registers.fused_multiply_add(s[4 * i + first + e], factor, -shift))
                s[4 * i + first + e] = p
                total += p
        return total

    @device_function
    def set_back(codes: Any, s: Any, zero: Any) -> None:
        for i in range(4 * quads):
            codes[i] = registers.fused_multiply_add(s[i], zero, float32(middle)).view(np.int32)

    return row_top, weights, set_back
