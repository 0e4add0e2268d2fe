"""What a consumer warpgroup of a Hopper block does with lists of key tiles: 64 query rows of a tile.

The steps are those of `consumer_hopper`; which keys a step has, and whether they need a mask, comes with K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.finish_hopper import build_finish
from cuda_backend.attention.lists_hopper import STEP_BYTES
from cuda_backend.attention.mask_words import WORD_BYTES
from cuda_backend.attention.modifiers_hopper import build_modifiers
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.attention.softmax_hopper import NO_KEY, build_output, build_softmax
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant
from cuda_backend.ptx import barrier, copy, registers, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["build_flexible_consumer"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


def build_flexible_consumer(variant: FlexibleVariant) -> Callable[..., None]:
    """Return ``consume(base, thread, out, lse, masks, scale, factor, aux, problem)``, for a whole warpgroup.

    `masks` is the address of `mask_words`; `scale` is that of the scores, for the user's function; `factor`
    is what the softmax multiplies them by: log2(e), times the scale if they come over the scale: without
    such a function, or if the variant is `folded`.
    """
    tiles, work_slot, step_slot = variant.tiles, variant.work_slot, variant.step_slot
    block_m, block_n, masked, modified, folded = (
        tiles.block_m,
        tiles.block_n,
        variant.masked,
        bool(variant.mods.score),
        variant.folded,
    )
    s_count, o_count, p_count = block_n // 2, tiles.d_v // 2, block_n // 4
    q_bytes, k_bytes, v_bytes = tiles.q_bytes, tiles.k_bytes, tiles.v_bytes
    _, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = tiles.places
    next_stage, next_q_stage = ring(tiles.stages), ring(tiles.q_stages)
    foresee, modify, mask = build_modifiers(variant)
    _, softmax_row, pack_scores = build_softmax(tiles)
    (rescale, _, _), finish = build_output(tiles), build_finish(tiles)
    pin_scores = registers.pin(s_count)
    k_descriptor, v_descriptor = wgmma.descriptor_k_major, wgmma.descriptor_mn_major(128 * block_n)
    q_steps, k_steps = (wgmma.k_major_steps(tiles.d_qk, rows) for rows in (block_m, block_n))
    qk_product = wgmma.product_shared(block_n, tiles.kind, q_steps, k_steps)
    pv_product = wgmma.product_registers(tiles.d_v, tiles.kind, [128 * k for k in range(block_n // 16)])
    scores_done, scores_first_done = wgmma.wait(0, s_count), wgmma.wait(1, s_count)
    output_done = wgmma.wait(0, o_count)

    @device_function
    def look(base: Any, stage: Any, numbers: Any, place: Any) -> Any:
        """Return where the scores of a step are, and what this warpgroup, and thread, may see of them."""
        b, h, row, last, column, tk, aux = place
        _, _, group_index, masks = numbers
        slot = base + step_slot + STEP_BYTES * stage
        step, seen = registers.uniform(copy.load_shared_word(slot)), int32(0)
        if masked:
            seen = registers.uniform(copy.load_shared_word(slot + 4 + 4 * group_index))
        where = b, h, row, last, int32(step * block_n + column), tk, aux
        low, high = foresee(seen, masks, where)
        return where, seen, low, high

    @device_function
    def softmax(s: Any, numbers: Any, step: Any, old: Any) -> Any:
        """Turn products of a step into weights; return maxima, sums and factors of what was before."""
        scales, factor, _, _ = numbers
        max_low, sum_low, max_high, sum_high = old
        where, seen, low, high = step
        if modified:
            modify(s, scales, where)
        if masked and seen >= 0:
            mask(s, low, high, where)
        max_low, sum_low, factor_low = softmax_row(s, int32(0), factor, max_low, sum_low)
        max_high, sum_high, factor_high = softmax_row(s, int32(2), factor, max_high, sum_high)
        return (max_low, sum_low, max_high, sum_high), factor_low, factor_high

    @device_function
    def consume(
        base: Any, thread: Any, out: Any, lse: Any, masks: Any, scale: Any, factor: Any, aux: Any,
        problem: Any,
    ) -> None:  # fmt: skip
        _, heads, _, tq, tk, columns = problem
        s = cuda.local.array(s_count, float32)
        o = cuda.local.array(o_count, float32)
        p = cuda.local.array(p_count, uint32)
        lane = int32(thread & 31)
        quad_lane = int32(lane & 3)
        group_index = registers.uniform(int32(thread >> 7) - 1)
        inverse = float32(1.0) / scale if folded else scale
        numbers = (scale, inverse), factor, group_index, masks + uint64(WORD_BYTES) * uint64(thread & 127)
        stage, parity, q_stage, q_parity = int32(0), int32(0), int32(0), int32(0)
        while True:
            barrier.wait(base + q_full + 8 * q_stage, q_parity)
            # All lanes read the words; `arrive_warp`, which frees them, waits for all.
            slot = base + work_slot + 16 * q_stage
            row_block = registers.uniform(copy.load_shared_word(slot))
            if row_block < 0:
                break
            head = registers.uniform(copy.load_shared_word(slot + 4))
            left = registers.uniform(copy.load_shared_word(slot + 8))
            batch = registers.quotient(head, heads)
            q_head = int32(head - batch * heads)
            q_descriptor = k_descriptor(base + q_stage * q_bytes + group_index * (64 * 128))
            own = registers.fresh(thread)  # again for each tile, rather than kept in a register
            row = int32(row_block * block_m + 64 * group_index + 16 * ((own >> 5) & 3) + ((own >> 2) & 7))
            place = batch, q_head, row, int32(tq - 1), int32(2 * quad_lane), tk, aux
            for i in range(o_count):
                o[i] = float32(0.0)
            rows = float32(NO_KEY), float32(0.0), float32(NO_KEY), float32(0.0)
            if left > 0:
                barrier.wait(base + k_full + 8 * stage, parity)
                wgmma.fence()
                qk_product(s, q_descriptor, k_descriptor(base + k_tiles + stage * k_bytes))
                wgmma.commit()
                step = look(base, stage, numbers, place)
                scores_done(s)
                barrier.arrive_warp(base + k_empty + 8 * stage, lane)
                rows, factor_low, factor_high = softmax(s, numbers, step, rows)
                barrier.wait(base + v_full + 8 * stage, parity)
                pack_scores(p, s)
                left = int32(left - 1)
                while left > 0:
                    old_stage = stage
                    stage, parity = next_stage(stage, parity)
                    barrier.wait(base + k_full + 8 * stage, parity)
                    wgmma.fence()
                    qk_product(s, q_descriptor, k_descriptor(base + k_tiles + stage * k_bytes))
                    wgmma.commit()
                    pv_product(o, p, v_descriptor(base + v_tiles + old_stage * v_bytes))
                    wgmma.commit()
                    step = look(base, stage, numbers, place)
                    scores_first_done(s)
                    barrier.arrive_warp(base + k_empty + 8 * stage, lane)
                    rows, factor_low, factor_high = softmax(s, numbers, step, rows)
                    # Without the pin, ptxas moves the exponentials behind the wait for O: no overlap.
                    pin_scores(s)
                    barrier.wait(base + v_full + 8 * stage, parity)
                    output_done(o)
                    barrier.arrive_warp(base + v_empty + 8 * old_stage, lane)
                    pack_scores(p, s)
                    rescale(o, factor_low, factor_high)
                    left = int32(left - 1)
                barrier.arrive_warp(base + q_empty + 8 * q_stage, lane)
                wgmma.fence()
                pv_product(o, p, v_descriptor(base + v_tiles + stage * v_bytes))
                wgmma.commit()
                output_done(o)
                barrier.arrive_warp(base + v_empty + 8 * stage, lane)
                stage, parity = next_stage(stage, parity)
            else:
                barrier.arrive_warp(base + q_empty + 8 * q_stage, lane)
            q_stage, q_parity = next_q_stage(q_stage, q_parity)

            # The head's number rather than its parts: those would be kept in registers all along.
            finish(o, rows, factor, out, lse, row, registers.fresh(head), quad_lane, (heads, tq, columns))

    return consume
