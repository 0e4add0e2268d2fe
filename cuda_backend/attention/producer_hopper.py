"""What the producer thread of a Hopper block does: find a tile of query rows, stream its Q, K and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.schedule_hopper import Schedule
from cuda_backend.attention.variant_hopper import SUBTILE, Variant
from cuda_backend.ptx import barrier, copy, grid, registers, tma
from cuda_backend.ptx.assembly import types

__all__ = [
    "NO_TILE", "build_begin", "build_load", "build_loads", "build_producer", "build_start"
]  # fmt: skip

int32, uint64 = types.int32, types.uint64

NO_TILE = -1  # in place of a tile's number: there are no more


def build_start(variant: Variant) -> Callable[..., None]:
    """Return ``start(base)``, for one thread before all others: barriers, and how many arrive at them."""
    stages, q_stages, consumer_warps = variant.stages, variant.q_stages, 4 * variant.consumers
    places = variant.places
    q_full, q_empty = places.q_full, places.q_empty
    k_full, k_empty, v_full, v_empty = places.k_full, places.k_empty, places.v_full, places.v_empty

    @device_function
    def start(base: Any) -> None:
        for i in range(q_stages):
            barrier.initialise(base + q_full + 8 * i, 1)
            barrier.initialise(base + q_empty + 8 * i, consumer_warps)
        for i in range(stages):
            barrier.initialise(base + k_full + 8 * i, 1)
            barrier.initialise(base + k_empty + 8 * i, consumer_warps)
            barrier.initialise(base + v_full + 8 * i, 1)
            barrier.initialise(base + v_empty + 8 * i, consumer_warps)
        barrier.publish_initialisation()

    return start


def build_producer(variant: Variant, schedule: Schedule) -> Callable[..., None]:
    """Return ``produce(base, descriptors, counter, problem)``, a device function for one thread.

    The first tile is the block's own number, the others are drawn from a counter in global memory.  They are
    drawn late, under the loads of the last key tile: what is drawn early does not go to the block that is
    done first.
    """
    block_m, block_n = variant.block_m, variant.block_n
    q_bytes, k_bytes, v_bytes = variant.q_bytes, variant.k_bytes, variant.v_bytes
    begin, (load_q, load_k, load_v) = build_begin(3), build_loads(variant)
    _, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_slot = variant.places
    place, key_tiles, next_stage, next_q_stage = schedule

    @device_function
    def produce(base: Any, descriptors: Any, counter: Any, problem: Any) -> None:
        tiles, per_head, section, heads, all_heads, group, tq, tk, offset, _ = problem
        begin(descriptors)
        q_map, k_map, v_map = descriptors, descriptors + uint64(128), descriptors + uint64(256)
        blocks = int32(cuda.gridDim.x)
        tile = int32(cuda.blockIdx.x)
        stage, parity, q_stage, q_parity = int32(0), int32(1), int32(0), int32(1)
        while tile < tiles:
            row_block, head = place(tile, per_head, section, all_heads)
            batch = registers.quotient(head, heads)
            q_head = int32(head - batch * heads)
            kv_head = registers.quotient(q_head, group)
            full = base + q_full + 8 * q_stage
            barrier.wait(base + q_empty + 8 * q_stage, q_parity)
            copy.store_shared_word(base + tile_slot + 4 * q_stage, tile)
            barrier.expect_bytes(full, q_bytes)
            row = row_block * block_m
            load_q(base + q_stage * q_bytes, q_map, full, row, q_head, batch)
            j = int32(key_tiles((row_block + 1) * block_m, tq, tk, offset) - 1)
            drawn = int32(0)
            if j < 0:
                drawn = copy.fetch_add(counter, 1)
            while j >= 0:
                if j == 0:
                    drawn = copy.fetch_add(counter, 1)
                row = j * block_n
                full = base + k_full + 8 * stage
                barrier.wait(base + k_empty + 8 * stage, parity)
                barrier.expect_bytes(full, k_bytes)
                load_k(base + k_tiles + stage * k_bytes, k_map, full, row, kv_head, batch)
                full = base + v_full + 8 * stage
                barrier.wait(base + v_empty + 8 * stage, parity)
                barrier.expect_bytes(full, v_bytes)
                load_v(base + v_tiles + stage * v_bytes, v_map, full, row, kv_head, batch)
                stage, parity = next_stage(stage, parity)
                j = int32(j - 1)
            q_stage, q_parity = next_q_stage(q_stage, q_parity)
            tile = int32(drawn + blocks)
        barrier.wait(base + q_empty + 8 * q_stage, q_parity)
        copy.store_shared_word(base + tile_slot + 4 * q_stage, NO_TILE)
        barrier.arrive(base + q_full + 8 * q_stage)
        # Whoever comes last knows that every block has drawn its last tile: reset for the next launch.
        if copy.fetch_increment(counter + 4, blocks - 1) == blocks - 1:
            copy.store_global_word(counter, 0)

    return produce


def build_begin(count: int) -> Callable[..., None]:
    """Return ``begin(descriptors)``, for a producer's thread before all else; it has `count` of them."""

    @device_function
    def begin(descriptors: Any) -> None:
        for number in range(count):
            tma.prefetch_descriptor(descriptors + uint64(DESCRIPTOR_BYTES * number))
        grid.wait_for_earlier_grids()

    return begin


def build_loads(variant: Variant) -> tuple[Callable[..., None], ...]:
    """Return what loads a tile of Q, of K and of V: ``load(target, descriptor, full, row, head, batch)``."""
    k_subtiles, v_subtiles = variant.d_qk // SUBTILE, variant.d_v // SUBTILE
    tiles = (variant.block_m, k_subtiles), (variant.block_n, k_subtiles), (variant.block_n, v_subtiles)
    return tuple(build_load(tma.load_4d, rows, subtiles) for rows, subtiles in tiles)


def build_load(load_subtile: Callable[..., None], rows: int, subtiles: int) -> Callable[..., None]:
    """Return ``load(target, descriptor, full, row, head, batch)`` of a tile of so many rows and sub-tiles."""

    @device_function
    def load(target: Any, descriptor: Any, full: Any, row: Any, head: Any, batch: Any) -> None:
        for c in range(subtiles):
            load_subtile(target + c * (128 * rows), descriptor, full, c * SUBTILE, row, head, batch)

    return load
