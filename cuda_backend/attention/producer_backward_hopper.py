"""What two threads of a Hopper backward block do: one streams tiles in, the other adds dQ up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.producer_hopper import NO_TILE
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.variant_backward_hopper import CONSUMERS, BackwardVariant
from cuda_backend.attention.variant_hopper import SUBTILE
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import barrier, bulk, copy, grid, registers, tma, turns
from cuda_backend.ptx.assembly import types

__all__ = ["build_backward_producer", "build_start", "build_writer"]

int32, uint64 = types.int32, types.uint64


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
    """Return ``produce(base, descriptors, shifts, deltas, counter, problem)``, for one thread.

    Tiles are drawn as in the forward kernel (`producer_hopper`).  K and V have room for one tile: the next
    one is loaded while the consumers write dK and dV of this one.
    """
    block_m, block_n = variant.block_m, variant.block_n
    subtiles, v_subtiles = variant.d // SUBTILE, variant.d_v // SUBTILE
    q_bytes, do_bytes, stat_bytes = variant.q_bytes, variant.do_bytes, 4 * variant.block_m
    k_bytes, v_bytes = variant.k_bytes, variant.v_bytes
    places = variant.places
    k_tile, v_tile, q_tiles, do_tiles = places.k_tile, places.v_tile, places.q_tiles, places.do_tiles
    shift_places, delta_places, tile_slot = places.shifts, places.deltas, places.tile_slot
    k_full, v_full, kv_empty = places.k_full, places.v_full, places.kv_empty
    q_full, q_empty, do_full, do_empty = places.q_full, places.q_empty, places.do_full, places.do_empty
    place, first_block, stages = schedule.place, schedule.first_block, variant.stages
    load_q, load_k, load_v, load_do = (tma.load_4d_of(number) for number in range(4))

    @device_function
    def produce(base: Any, descriptors: Any, shifts: Any, deltas: Any, counter: Any, problem: Any) -> None:
        tiles, per_head, section, heads, all_heads, group, blocks, tq, _, offset, _, _ = problem
        for number in range(4):
            tma.prefetch_descriptor(descriptors + uint64(DESCRIPTOR_BYTES * number))
        grid.wait_for_earlier_grids()
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
            barrier.expect_bytes(base + k_full, k_bytes)
            for c in range(subtiles):
                target = base + k_tile + c * (128 * block_n)
                load_k(target, descriptors, base + k_full, c * SUBTILE, row, own_head, batch)
            barrier.expect_bytes(base + v_full, v_bytes)
            for c in range(v_subtiles):
                target = base + v_tile + c * (128 * block_n)
                load_v(target, descriptors, base + v_full, c * SUBTILE, row, own_head, batch)
            begin = first_block(key_block, blocks, tq, offset)
            member = int32(0)
            while member < group:
                head = int32(own_head * group + member)
                block = begin
                while block < blocks:
                    line = int32((kv_head * group + member) * blocks + block)
                    row = int32(block * block_m)
                    odd = int32((state & 15) >= stages)
                    stage, parity = int32((state & 15) - stages * odd), int32(odd ^ 1)
                    full = base + q_full + 8 * stage
                    barrier.wait(base + q_empty + 8 * stage, parity)
                    barrier.expect_bytes(full, q_bytes + stat_bytes)
                    target = base + q_tiles + stage * q_bytes
                    for c in range(subtiles):
                        at = target + c * (128 * block_m)
                        load_q(at, descriptors, full, c * SUBTILE, row, head, batch)
                    target = base + shift_places + stage * stat_bytes
                    bulk.load(target, shifts + uint64(line) * uint64(stat_bytes), stat_bytes, full)
                    full = base + do_full + 8 * stage
                    barrier.wait(base + do_empty + 8 * stage, parity)
                    barrier.expect_bytes(full, do_bytes + stat_bytes)
                    target = base + do_tiles + stage * do_bytes
                    for c in range(v_subtiles):
                        at = target + c * (128 * block_m)
                        load_do(at, descriptors, full, c * SUBTILE, row, head, batch)
                    target = base + delta_places + stage * stat_bytes
                    bulk.load(target, deltas + uint64(line) * uint64(stat_bytes), stat_bytes, full)
                    state = registers.successor(state)
                    if (state & 15) == 2 * stages:
                        state = int32(state - 2 * stages)
                    block = registers.successor(block)
                member = registers.successor(member)
            tile = int32(copy.fetch_add(counter, 1) + grid.blocks())
        barrier.wait(base + kv_empty, state >> 4)
        copy.store_shared_word(base + tile_slot, NO_TILE)
        barrier.arrive(base + k_full)
        # Whoever comes last knows that every block has drawn its last tile: reset for the next launch.
        last = int32(grid.blocks() - 1)
        if copy.fetch_increment(counter + uint64(4), last) == last:
            copy.store_global_word(counter, 0)

    return produce


def build_writer(variant: BackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``write(base, sums, words, problem)``, a device function for one thread.

    The consumers' shares of a dQ tile lie in `sums` as in shared memory, one behind the other.
    """
    share_bytes, deterministic = variant.share_bytes, variant.deterministic
    places = variant.places
    dq_tile, dq_full, dq_empty = places.dq_tile, places.dq_full, places.dq_empty
    k_full, kv_empty, tile_slot = places.k_full, places.kv_empty, places.tile_slot
    place, first_block, turn = schedule.place, schedule.first_block, schedule.turn

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
            begin = first_block(key_block, blocks, tq, offset)
            member = int32(0)
            while member < group:
                block = begin
                while block < blocks:
                    line = int32((kv_head * group + member) * blocks + block)
                    word = words + uint64(line) * uint64(4)
                    for w in range(CONSUMERS):
                        barrier.wait(base + dq_full + 8 * w, parity)
                        if deterministic and w == 0:
                            mine = turn(key_block, block, tq, tk, offset)
                            while turns.word_seen(word) != mine:
                                pass
                        target = (
                            sums + uint64(line) * uint64(CONSUMERS * share_bytes) + uint64(w * share_bytes)
                        )
                        bulk.add_floats(target, base + dq_tile + w * share_bytes, share_bytes)
                        bulk.commit()
                        bulk.wait_read()
                        barrier.arrive(base + dq_empty + 8 * w)
                    if deterministic:
                        bulk.wait_added()
                        turns.pass_turn(word)
                    parity = int32(parity ^ 1)
                    block = registers.successor(block)
                member = registers.successor(member)
        bulk.wait_added()

    return write
