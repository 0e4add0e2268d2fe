"""What two threads of a Hopper backward block do: one streams tiles in, the other adds dQ up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.stages_backward_hopper import build_adder, build_stages
from cuda_backend.attention.variant_backward_hopper import CONSUMERS, BackwardVariant
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import barrier, bulk, copy, grid, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_backward_producer", "build_start", "build_writer"]

int32 = types.int32


def build_start(variant: BackwardVariant) -> Callable[..., None]:
    """Return ``start(base)``, for one thread before all others: barriers, and how many arrive at them."""
    places, stages, warps = variant.places, variant.stages, 4 * CONSUMERS
    singles = (
        (places.k_full, 1, 1), (places.v_full, 1, 1), (places.kv_empty, 1, warps + 1),
        (places.q_full, stages, 1), (places.q_empty, stages, warps),
        (places.do_full, stages, 1), (places.do_empty, stages, warps),
        (places.dq_full, CONSUMERS, 4), (places.dq_empty, CONSUMERS, 1),
    )  # fmt: skip
    barriers = tuple((at + 8 * i, arrivals) for at, count, arrivals in singles for i in range(count))

    @device_function
    def start(base: Any) -> None:
        for at, arrivals in barriers:
            barrier.initialise(base + at, arrivals)
        barrier.publish_initialisation()

    return start


def build_backward_producer(
    variant: BackwardVariant | WideBackwardVariant, schedule: BackwardSchedule
) -> Callable[..., None]:
    """Return ``produce(base, descriptors, counter, problem)``, for one thread.

    Tiles are drawn as in the forward kernel (`producer_hopper`).  K and V have room for one tile: the next
    one is loaded while the consumers write dK and dV of this one.
    """
    block_m, block_n = variant.block_m, variant.block_n
    places, place = variant.places, schedule.place
    first_block, block_at = schedule.first_block, schedule.block_at
    tile_slot, kv_empty = places.tile_slot, places.kv_empty
    begin, load_keys, fill_stage, end = build_stages(variant)

    @device_function
    def produce(base: Any, descriptors: Any, counter: Any, problem: Any) -> None:
        tiles, per_head, section, heads, all_heads, group, blocks, tq, _, offset, _, _ = problem
        begin(descriptors)
        tile = int32(cuda.blockIdx.x)
        # For want of registers one number: step around the ring, and 16 times the parity of K and V.
        state = int32(16)
        while tile < tiles:
            key_block, kv_head = place(tile, registers.fresh(per_head), section, all_heads)
            batch = registers.quotient(kv_head, heads)
            own_head = int32(kv_head - batch * heads)
            row = int32(key_block * block_n)
            barrier.wait(base + kv_empty, state >> 4)
            state = int32(state ^ 16)
            copy.store_shared_word(base + tile_slot, tile)
            load_keys(base, descriptors, row, own_head, batch)
            first = first_block(key_block, blocks, tq, offset)
            member = int32(0)
            while member < group:
                head = int32(own_head * group + member)
                step = first
                while step < blocks:
                    block = block_at(step, key_block, section, blocks)
                    line = int32((kv_head * group + member) * blocks + block)
                    where = line, int32(block * block_m), head, batch
                    state = fill_stage(base, descriptors, state, where, int32(0))
                    step = registers.successor(step)
                member = registers.successor(member)
            tile = int32(copy.fetch_add(counter, 1) + grid.blocks())
        end(base, counter, state >> 4)

    return produce


def build_writer(variant: BackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``write(base, sums, words, problem)``, a device function for one thread: it adds dQ up."""
    places, place = variant.places, schedule.place
    first_block, block_at = schedule.first_block, schedule.block_at
    k_full, kv_empty, tile_slot = places.k_full, places.kv_empty, places.tile_slot
    add = build_adder(variant, schedule.turn)

    @device_function
    def write(base: Any, sums: Any, words: Any, problem: Any) -> None:
        _, per_head, section, _, all_heads, group, blocks, tq, tk, offset, _, _ = problem
        parity, kv_parity = int32(0), int32(0)
        while True:
            barrier.wait(base + k_full, kv_parity)
            kv_parity = int32(kv_parity ^ 1)
            tile = copy.load_shared_word(base + tile_slot)
            barrier.arrive(base + kv_empty)
            if tile < 0:
                break
            key_block, kv_head = place(tile, per_head, section, all_heads)
            first = first_block(key_block, blocks, tq, offset)
            member = int32(0)
            while member < group:
                step = first
                while step < blocks:
                    block = block_at(step, key_block, section, blocks)
                    line = int32((kv_head * group + member) * blocks + block)
                    sizes = per_head, section, blocks, tq, tk, offset
                    add(base, sums, words, line, parity, (key_block, step, block, sizes))
                    parity = int32(parity ^ 1)
                    step = registers.successor(step)
                member = registers.successor(member)
        bulk.wait_added()

    return write
