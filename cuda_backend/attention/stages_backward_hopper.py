"""What the producers of Hopper backward blocks have in common: tiles into shared memory, dQ out of it.

`producer_backward_hopper` walks ranges of queries, `lists_backward_hopper` lists of tiles; what either does
with a tile, once it knows which, is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import device_function
from cuda_backend.attention.producer_hopper import NO_TILE, build_begin, build_load
from cuda_backend.attention.variant_backward_hopper import (
    CONSUMERS,
    DESCRIPTORS,
    BackwardPlaces,
    BackwardVariant,
)
from cuda_backend.attention.variant_hopper import SUBTILE
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import barrier, bulk, copy, grid, registers, tma, turns
from cuda_backend.ptx.assembly import types

__all__ = ["Stages", "build_adder", "build_stages"]

int32, uint64 = types.int32, types.uint64


class Stages(NamedTuple):
    """Device functions of a producer, for one thread.

    Attributes
    ----------
    begin
        ``begin(descriptors)`` comes before all others.
    load_keys
        ``load_keys(base, descriptors, row, head, batch)`` loads K and V, where there is room.
    fill_stage
        ``fill_stage(base, descriptors, state, (line, row, head, batch), entry)`` waits for room for Q and
        dO of tile number `line`, loads them with their statistics, and returns the next `state`; consumers
        that walk lists are told the `entry`.  A state is the step around the ring of stages, twice, in the
        lowest four bits: one number, for want of registers, in which other bits are the producer's own.
    end
        ``end(base, counter, parity)`` says that there are no more tiles, once K and V may be written.
    """

    begin: Callable[..., None]
    load_keys: Callable[..., None]
    fill_stage: Callable[..., Any]
    end: Callable[..., None]


def build_stages(variant: BackwardVariant | WideBackwardVariant) -> Stages:
    """Return what the producer of `variant` does with tiles."""
    block_m, block_n = variant.block_m, variant.block_n
    subtiles, v_subtiles = variant.d // SUBTILE, variant.d_v // SUBTILE
    q_bytes, do_bytes, k_bytes, v_bytes = variant.q_bytes, variant.do_bytes, variant.k_bytes, variant.v_bytes
    stat_bytes, stat_pitch, stages = 4 * block_m, variant.stat_pitch, variant.stages
    places = variant.places
    k_tile, v_tile, q_tiles, do_tiles = places.k_tile, places.v_tile, places.q_tiles, places.do_tiles
    shift_places, delta_places, tile_slot = places.shifts, places.deltas, places.tile_slot
    k_full, v_full, kv_empty = places.k_full, places.v_full, places.kv_empty
    q_full, q_empty, do_full, do_empty = places.q_full, places.q_empty, places.do_full, places.do_empty
    lists = isinstance(variant, BackwardVariant) and variant.lists
    entry_places = places.entries if isinstance(places, BackwardPlaces) else 0
    begin = build_begin(DESCRIPTORS)
    load_q = build_load(tma.load_4d_of(0), block_m, subtiles)
    load_k = build_load(tma.load_4d_of(1), block_n, subtiles)
    load_v = build_load(tma.load_4d_of(2), block_n, v_subtiles)
    load_do = build_load(tma.load_4d_of(3), block_m, v_subtiles)
    load_shifts, load_deltas = tma.load_row_of(4), tma.load_row_of(5)

    @device_function
    def load_keys(base: Any, descriptors: Any, row: Any, head: Any, batch: Any) -> None:
        barrier.expect_bytes(base + k_full, k_bytes)
        load_k(base + k_tile, descriptors, base + k_full, row, head, batch)
        barrier.expect_bytes(base + v_full, v_bytes)
        load_v(base + v_tile, descriptors, base + v_full, row, head, batch)

    @device_function
    def fill_stage(base: Any, descriptors: Any, state: Any, where: Any, entry: Any) -> Any:
        line, row, head, batch = where
        odd = int32((state & 15) >= stages)
        stage, parity = int32((state & 15) - stages * odd), int32(odd ^ 1)
        full = base + q_full + 8 * stage
        barrier.wait(base + q_empty + 8 * stage, parity)
        if lists:
            copy.store_shared_word(base + entry_places + 8 * stage, entry)
            copy.store_shared_word(base + entry_places + 8 * stage + 4, head)
        barrier.expect_bytes(full, q_bytes + stat_bytes)
        load_q(base + q_tiles + stage * q_bytes, descriptors, full, row, head, batch)
        load_shifts(base + shift_places + stage * stat_pitch, descriptors, full, line)
        full = base + do_full + 8 * stage
        barrier.wait(base + do_empty + 8 * stage, parity)
        barrier.expect_bytes(full, do_bytes + stat_bytes)
        load_do(base + do_tiles + stage * do_bytes, descriptors, full, row, head, batch)
        load_deltas(base + delta_places + stage * stat_pitch, descriptors, full, line)
        state = registers.successor(state)
        if (state & 15) == 2 * stages:
            state = int32(state - 2 * stages)
        return state

    @device_function
    def end(base: Any, counter: Any, parity: Any) -> None:
        barrier.wait(base + kv_empty, parity)
        copy.store_shared_word(base + tile_slot, NO_TILE)
        barrier.arrive(base + k_full)
        # Whoever comes last knows that every block has drawn its last tile: reset for the next launch.
        last = int32(grid.blocks() - 1)
        if copy.fetch_increment(counter + uint64(4), last) == last:
            copy.store_global_word(counter, 0)

    return Stages(begin, load_keys, fill_stage, end)


def build_adder(variant: BackwardVariant, turn: Callable[..., Any]) -> Callable[..., None]:
    """Return ``add(base, sums, words, line, parity, where)``, a device function for one thread.

    It adds a tile of dQ, number `line`, to the sums in global memory; with the deterministic option not
    before ``turn(*where)`` blocks of keys have.  The consumers' shares of a tile lie in `sums` as in shared
    memory, one behind the other.
    """
    share_bytes, places = variant.share_bytes, variant.places
    dq_tile, dq_full, dq_empty = places.dq_tile, places.dq_full, places.dq_empty

    @device_function
    def send(base: Any, sums: Any, line: Any, w: Any) -> None:
        target = sums + uint64(line) * uint64(CONSUMERS * share_bytes) + uint64(w * share_bytes)
        bulk.add_floats(target, base + dq_tile + w * share_bytes, share_bytes)
        bulk.commit()

    @device_function
    def add(base: Any, sums: Any, _words: Any, line: Any, parity: Any, _where: Any) -> None:
        for w in range(CONSUMERS):
            barrier.wait(base + dq_full + 8 * w, parity)
            send(base, sums, line, w)
            bulk.wait_read()
            barrier.arrive(base + dq_empty + 8 * w)

    @device_function
    def add_in_turn(base: Any, sums: Any, words: Any, line: Any, parity: Any, where: Any) -> None:
        word = words + uint64(line) * uint64(4)
        mine = turn(*where)
        # Mostly the turn has come before the tile has: what it costs to see that is hidden behind the tile.
        while turns.addition_seen(word) != mine:
            pass
        for w in range(CONSUMERS):
            barrier.wait(base + dq_full + 8 * w, parity)
            send(base, sums, line, w)
        bulk.wait_read()
        for w in range(CONSUMERS):
            barrier.arrive(base + dq_empty + 8 * w)
        bulk.wait_added()
        turns.pass_addition(word)

    return add_in_turn if variant.deterministic else add
