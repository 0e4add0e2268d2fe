"""The two threads of a Hopper backward block that stream tiles in and add dQ up, along lists of tiles.

They are those of `producer_backward_hopper`, but which keys come next, and which queries see them, stands in
tables (`tile_lists`).  The producer reads them and tells the others: beside the number of the tile of keys,
where its list begins, how long it is, and the batch; beside each tile of Q, its entry and its query head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.schedule_backward_hopper import BackwardSchedule
from cuda_backend.attention.stages_backward_hopper import build_adder, build_stages
from cuda_backend.attention.tile_lists import BLOCK_SHIFT, MEMBER_SHIFT, MEMBERS, PARTIAL, RECORD_BYTES
from cuda_backend.attention.variant_backward_hopper import BackwardVariant
from cuda_backend.ptx import barrier, bulk, copy, grid, registers
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
    block_m, block_n, places, place = variant.block_m, variant.block_n, variant.places, schedule.place
    tile_slot, kv_empty = places.tile_slot, places.kv_empty
    begin, load_keys, fill_stage, end = build_stages(variant)

    @device_function
    def produce(base: Any, descriptors: Any, counter: Any, problem: Any, tables: Any) -> None:
        tiles, per_head, section, heads, all_heads, group, blocks, _, _, _, _, _ = problem
        begin(descriptors)
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
            load_keys(base, descriptors, row, own_head, batch)
            while state >= 32:
                entry = copy.load_word(tables[1] + uint64(4) * uint64(at))
                block, member = entry_block(entry), entry_member(entry)
                head = int32(own_head * group + member)
                line = int32((kv_head * group + member) * blocks + block)
                where = line, int32(block * block_m), head, batch
                state = fill_stage(base, descriptors, state, where, entry)
                state = int32(state - 32)
                at = registers.successor(at)
            tile = int32(copy.fetch_add(counter, 1) + grid.blocks())
        end(base, counter, state >> 4)

    return produce


def build_list_writer(variant: BackwardVariant, schedule: BackwardSchedule) -> Callable[..., None]:
    """Return ``write(base, sums, words, problem, tables)``, a device function for one thread."""
    places, place = variant.places, schedule.place
    k_full, kv_empty, tile_slot = places.k_full, places.kv_empty, places.tile_slot

    @device_function
    def turn(turns: Any, at: Any) -> Any:
        return copy.load_word(turns + uint64(4) * uint64(at))

    add = build_adder(variant, turn)

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
                add(base, sums, words, line, parity, (tables[2], at))
                parity = int32(parity ^ 1)
                at = registers.successor(at)
        bulk.wait_added()

    return write
