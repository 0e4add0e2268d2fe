"""The two threads of a Hopper backward block that stream tiles in and add dQ up, along lists of tiles.

They are those of `producer_backward_hopper`, but which keys come next, and which queries see them, stands in
tables (`tile_lists`).  The producer reads them and tells the others: beside the number of the tile of keys,
where its list begins, how long it is, and the batch; beside each tile of Q, its entry and its query head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.producer_hopper import NO_TILE
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.tile_lists import BLOCK_SHIFT, MEMBER_SHIFT, MEMBERS, PARTIAL, RECORD_BYTES
from cuda_backend.attention.variant_backward_hopper import CONSUMERS, BackwardVariant
from cuda_backend.attention.variant_hopper import SUBTILE
from cuda_backend.ptx import barrier, bulk, copy, grid, registers, tma, turns
from cuda_backend.ptx.assembly import types

__all__ = [
    "BATCH", "FIRST", "LENGTH", "build_list_producer", "build_list_writer", "entry_block", "entry_member",
    "entry_partial",
]  # fmt: skip

int32, uint64 = types.int32, types.uint64

FIRST, LENGTH, BATCH = 4, 8, 12  # bytes behind the number of the tile; where its list begins, how long it is


@device_function
def entry_block(entry: Any) -> Any:
    """Return the block of queries of an entry."""
    return int32(entry >> BLOCK_SHIFT)


@device_function
def entry_member(entry: Any) -> Any:
    """Return which it is of the query heads of the key head."""
    return int32((entry >> MEMBER_SHIFT) & (MEMBERS - 1))


@device_function
def entry_partial(entry: Any) -> Any:
    """Return whether some of its scores may not be allowed, or lie behind the last query or key."""
    return int32(entry & PARTIAL)


def build_list_producer(variant: BackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``produce(base, descriptors, shifts, deltas, counter, problem, tables)``, for one thread.

    `tables` are the addresses of records, entries and turns.
    """
    block_m, block_n, subtiles = variant.block_m, variant.block_n, variant.d // SUBTILE
    q_bytes, k_bytes, stat_bytes = variant.q_bytes, variant.k_bytes, 4 * variant.block_m
    places = variant.places
    k_tile, v_tile, q_tiles, do_tiles = places.k_tile, places.v_tile, places.q_tiles, places.do_tiles
    shift_places, delta_places, tile_slot = places.shifts, places.deltas, places.tile_slot
    k_full, v_full, kv_empty, entry_places = places.k_full, places.v_full, places.kv_empty, places.entries
    q_full, q_empty, do_full, do_empty = places.q_full, places.q_empty, places.do_full, places.do_empty
    place, stages = schedule.place, variant.stages
    load_q, load_k, load_v, load_do = (tma.load_4d_of(number) for number in range(4))

    @device_function
    def produce(
        base: Any, descriptors: Any, shifts: Any, deltas: Any, counter: Any, problem: Any, tables: Any
    ) -> None:
        tiles, per_head, section, heads, all_heads, group, blocks, _, _, _, _, _ = problem
        for number in range(4):
            tma.prefetch_descriptor(descriptors + uint64(DESCRIPTOR_BYTES * number))
        grid.wait_for_earlier_grids()
        record = cuda.local.array(4, int32)
        tile = int32(cuda.blockIdx.x)
        # For want of registers one number: step around the ring, 16 times the parity of K and V, and 32 times
        # how many entries are left.
        state = int32(16)
        while tile < tiles:
            copy.load_16(record, int32(0), tables[0] + uint64(tile) * uint64(RECORD_BYTES))
            at = record[1]
            key_block, kv_head = place(record[0], registers.fresh(per_head), section, all_heads)
            batch = registers.quotient(kv_head, heads)
            own_head = int32(kv_head - batch * heads)
            row = int32(key_block * block_n)
            barrier.wait(base + kv_empty, state >> 4)
            state = int32((state ^ 16) + 32 * record[2])
            copy.store_shared_word(base + tile_slot, record[0])
            copy.store_shared_word(base + tile_slot + FIRST, at)
            copy.store_shared_word(base + tile_slot + LENGTH, record[2])
            copy.store_shared_word(base + tile_slot + BATCH, batch)
            barrier.expect_bytes(base + k_full, k_bytes)
            for c in range(subtiles):
                target = base + k_tile + c * (128 * block_n)
                load_k(target, descriptors, base + k_full, c * SUBTILE, row, own_head, batch)
            barrier.expect_bytes(base + v_full, k_bytes)
            for c in range(subtiles):
                target = base + v_tile + c * (128 * block_n)
                load_v(target, descriptors, base + v_full, c * SUBTILE, row, own_head, batch)
            while state >= 32:
                entry = copy.load_word(tables[1] + uint64(4) * uint64(at))
                block, member = entry_block(entry), entry_member(entry)
                head = int32(own_head * group + member)
                line = int32((kv_head * group + member) * blocks + block)
                row = int32(block * block_m)
                odd = int32((state & 15) >= stages)
                stage, parity = int32((state & 15) - stages * odd), int32(odd ^ 1)
                full = base + q_full + 8 * stage
                barrier.wait(base + q_empty + 8 * stage, parity)
                copy.store_shared_word(base + entry_places + 8 * stage, entry)
                copy.store_shared_word(base + entry_places + 8 * stage + 4, head)
                barrier.expect_bytes(full, q_bytes + stat_bytes)
                target = base + q_tiles + stage * q_bytes
                for c in range(subtiles):
                    to = target + c * (128 * block_m)
                    load_q(to, descriptors, full, c * SUBTILE, row, head, batch)
                target = base + shift_places + stage * stat_bytes
                bulk.load(target, shifts + uint64(line) * uint64(stat_bytes), stat_bytes, full)
                full = base + do_full + 8 * stage
                barrier.wait(base + do_empty + 8 * stage, parity)
                barrier.expect_bytes(full, q_bytes + stat_bytes)
                target = base + do_tiles + stage * q_bytes
                for c in range(subtiles):
                    to = target + c * (128 * block_m)
                    load_do(to, descriptors, full, c * SUBTILE, row, head, batch)
                target = base + delta_places + stage * stat_bytes
                bulk.load(target, deltas + uint64(line) * uint64(stat_bytes), stat_bytes, full)
                state = registers.successor(state)
                if (state & 15) == 2 * stages:
                    state = int32(state - 2 * stages)
                state = int32(state - 32)
                at = registers.successor(at)
            tile = int32(copy.fetch_add(counter, 1) + grid.blocks())
        barrier.wait(base + kv_empty, state >> 4)
        copy.store_shared_word(base + tile_slot, NO_TILE)
        barrier.arrive(base + k_full)
        # Whoever comes last knows that every block has drawn its last tile: reset for the next launch.
        last = int32(grid.blocks() - 1)
        if copy.fetch_increment(counter + uint64(4), last) == last:
            copy.store_global_word(counter, 0)

    return produce


def build_list_writer(variant: BackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``write(base, sums, words, problem, tables)``, a device function for one thread."""
    share_bytes, deterministic = variant.share_bytes, variant.deterministic
    places = variant.places
    dq_tile, dq_full, dq_empty = places.dq_tile, places.dq_full, places.dq_empty
    k_full, kv_empty, tile_slot = places.k_full, places.kv_empty, places.tile_slot
    place = schedule.place

    @device_function
    def write(base: Any, sums: Any, words: Any, problem: Any, tables: Any) -> None:
        _, per_head, section, _, all_heads, group, blocks, _, _, _, _, _ = problem
        parity, kv_parity = int32(0), int32(0)
        while True:
            barrier.wait(base + k_full, kv_parity)
            kv_parity = int32(kv_parity ^ 1)
            at = copy.load_shared_word(base + tile_slot + FIRST)
            end = int32(at + copy.load_shared_word(base + tile_slot + LENGTH))
            tile = copy.load_shared_word(base + tile_slot)
            barrier.arrive(base + kv_empty)
            if tile < 0:
                break
            _, kv_head = place(tile, per_head, section, all_heads)
            while at < end:
                entry = copy.load_word(tables[1] + uint64(4) * uint64(at))
                line = int32((kv_head * group + entry_member(entry)) * blocks + entry_block(entry))
                word = words + uint64(line) * uint64(4)
                for w in range(CONSUMERS):
                    barrier.wait(base + dq_full + 8 * w, parity)
                    if deterministic and w == 0:
                        mine = copy.load_word(tables[2] + uint64(4) * uint64(at))
                        while turns.word_seen(word) != mine:
                            pass
                    target = sums + uint64(line) * uint64(CONSUMERS * share_bytes) + uint64(w * share_bytes)
                    bulk.add_floats(target, base + dq_tile + w * share_bytes, share_bytes)
                    bulk.commit()
                    bulk.wait_read()
                    barrier.arrive(base + dq_empty + 8 * w)
                if deterministic:
                    bulk.wait_added()
                    turns.pass_turn(word)
                parity = int32(parity ^ 1)
                at = registers.successor(at)
        bulk.wait_added()

    return write
