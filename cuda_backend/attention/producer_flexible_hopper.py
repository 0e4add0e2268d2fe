"""What the producer thread of a Hopper block does with lists of key tiles: follow them, and stream.

It hands on what the lists say through shared memory: the words of a tile of query rows with its Q, a step
with the K of its key tile, both under the barrier that says that the tile has arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.lists_hopper import STEP_BYTES
from cuda_backend.attention.producer_hopper import NO_TILE, build_begin, build_loads
from cuda_backend.attention.schedule_hopper import ring
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant
from cuda_backend.ptx import barrier, bulk, copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_flexible_producer"]

int32, uint64 = types.int32, types.uint64


def build_flexible_producer(variant: FlexibleVariant) -> Callable[..., None]:
    """Return ``produce(base, descriptors, counter, work, steps, problem)``, for one thread.

    `work` and `steps` are addresses of what `lists_hopper.key_lists` returns.  Tiles are drawn as in
    the dense kernel; a list is read one step ahead of what it is needed for.
    """
    tiles, work_slot, step_slot = variant.tiles, variant.work_slot, variant.step_slot
    block_m, block_n = tiles.block_m, tiles.block_n
    q_bytes, k_bytes, v_bytes = tiles.q_bytes, tiles.k_bytes, tiles.v_bytes
    begin, (load_q, load_k, load_v) = build_begin(3), build_loads(tiles)
    _, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = tiles.places
    next_stage, next_q_stage = ring(tiles.stages), ring(tiles.q_stages)

    @device_function
    def produce(base: Any, descriptors: Any, counter: Any, work: Any, steps: Any, problem: Any) -> None:
        count, heads, group, _, _, _ = problem
        begin(descriptors)
        q_map, k_map, v_map = descriptors, descriptors + uint64(128), descriptors + uint64(256)
        blocks = int32(cuda.gridDim.x)
        tile = int32(cuda.blockIdx.x)
        words = cuda.local.array(4, int32)
        stage, parity, q_stage, q_parity = int32(0), int32(1), int32(0), int32(1)
        while tile < count:
            copy.load_16(words, int32(0), work + uint64(16) * uint64(tile))
            row_block, head, left = int32(words[0]), int32(words[1]), int32(words[3])
            at = steps + uint64(STEP_BYTES) * uint64(words[2])
            step = copy.load_word(at)
            batch = registers.quotient(head, heads)
            q_head = int32(head - batch * heads)
            kv_head = registers.quotient(q_head, group)
            full = base + q_full + 8 * q_stage
            barrier.wait(base + q_empty + 8 * q_stage, q_parity)
            slot = base + work_slot + 16 * q_stage
            copy.store_shared_word(slot, row_block)
            copy.store_shared_word(slot + 4, head)
            copy.store_shared_word(slot + 8, left)
            barrier.expect_bytes(full, q_bytes)
            row = row_block * block_m
            load_q(base + q_stage * q_bytes, q_map, full, row, q_head, batch)
            drawn = int32(0)
            if left == 0:
                drawn = copy.fetch_add(counter, 1)
            while left > 0:
                if left == 1:
                    drawn = copy.fetch_add(counter, 1)
                row = step * block_n
                following = copy.load_word(at + uint64(STEP_BYTES))  # the lists end with a step that is none
                full = base + k_full + 8 * stage
                barrier.wait(base + k_empty + 8 * stage, parity)
                barrier.expect_bytes(full, k_bytes + STEP_BYTES)
                bulk.load(base + step_slot + STEP_BYTES * stage, at, STEP_BYTES, full)
                load_k(base + k_tiles + stage * k_bytes, k_map, full, row, kv_head, batch)
                full = base + v_full + 8 * stage
                barrier.wait(base + v_empty + 8 * stage, parity)
                barrier.expect_bytes(full, v_bytes)
                load_v(base + v_tiles + stage * v_bytes, v_map, full, row, kv_head, batch)
                stage, parity = next_stage(stage, parity)
                step = following
                at += uint64(STEP_BYTES)
                left = int32(left - 1)
            q_stage, q_parity = next_q_stage(q_stage, q_parity)
            tile = int32(drawn + blocks)
        barrier.wait(base + q_empty + 8 * q_stage, q_parity)
        copy.store_shared_word(base + work_slot + 16 * q_stage, NO_TILE)
        barrier.arrive(base + q_full + 8 * q_stage)
        # Whoever comes last knows that every block has drawn its last tile: reset for the next launch.
        if copy.fetch_increment(counter + 4, blocks - 1) == blocks - 1:
            copy.store_global_word(counter, 0)

    return produce
