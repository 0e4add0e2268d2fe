"""Which keys a Hopper block works on, which queries see them, and whose turn it is to add to dQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import device_function
from cuda_backend.attention.schedule_hopper import build_place, ring
from cuda_backend.attention.variant_backward_hopper import BackwardVariant
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import grid, registers
from cuda_backend.ptx.assembly import types

__all__ = ["BackwardSchedule", "build_backward_schedule"]

int32 = types.int32


class BackwardSchedule(NamedTuple):
    """Device functions that all roles of a block share, so that they are at the same place.

    Attributes
    ----------
    place, first_block, walk, block_at, turn
        As `build_backward_schedule` says.
    next_stage
        Step around the ring of Q and dO tiles.
    next_ds
        Step around the ring of dS tiles.
    """

    place: Callable[..., Any]
    first_block: Callable[..., Any]
    walk: Callable[..., Any]
    block_at: Callable[..., Any]
    turn: Callable[..., Any]
    next_stage: Callable[..., Any]
    next_ds: Callable[..., Any]


def build_backward_schedule(variant: BackwardVariant | WideBackwardVariant) -> BackwardSchedule:
    """Return the schedule of `variant`.

    ``place`` is that of `build_place`, for blocks of keys and key heads.  A block of keys takes steps from
    ``first_block(key_block, blocks, tq, offset)`` on, the first block of queries that see the keys, to
    `blocks`; ``block_at(step, walk(key_block, per_head, blocks), blocks)`` is the block of queries of a step.
    ``turn(walk, step, key_block, block, blocks, tq, tk, offset)`` says how many blocks of keys add to it
    before this one.

    Under a causal mask, or where no turns are taken, steps are blocks of queries.  Under the mask the first
    keys have most queries and come first, so that what is left for the end is short.  Turns need them
    backwards: query block m is added to by its last key block first, which begins with m, while the one
    before it begins a block of queries earlier; nobody waits for a tile that is drawn after its own.  Turns
    without a mask are those of `_build_rotation`.
    """
    causal, lists = variant.causal, variant.mods is not None
    first_block, turn = _build_range(variant)
    walk, block_at = _build_order()
    if variant.deterministic and not causal and not lists:
        walk, block_at, turn = _build_rotation()
    place = build_place(causal and variant.deterministic)
    ds_stages = 1 if isinstance(variant, WideBackwardVariant) else variant.ds_stages
    stages = ring(variant.stages), ring(ds_stages)
    return BackwardSchedule(place, first_block, walk, block_at, turn, *stages)


def _build_range(variant: BackwardVariant | WideBackwardVariant) -> tuple[Callable[..., Any], ...]:
    """Return ``first_block``, and ``turn`` of blocks of keys that take blocks of queries in order."""
    block_m, block_n, causal = variant.block_m, variant.block_n, variant.causal

    @device_function
    def first_block(key_block: Any, blocks: Any, tq: Any, offset: Any) -> Any:
        if causal:
            query = int32(key_block * block_n - offset)
            if query >= tq:
                return int32(blocks)
            return registers.quotient(int32(max(query, int32(0))), block_m)
        return int32(0)

    @device_function
    def turn(
        _walk: Any, _step: Any, key_block: Any, block: Any, _blocks: Any, tq: Any, tk: Any, offset: Any
    ) -> Any:
        if causal:
            end = min(tk, int32(min(int32((block + 1) * block_m), tq) + offset))
            return int32(registers.quotient(int32(end + (block_n - 1)), block_n) - 1 - key_block)
        return int32(key_block)

    return first_block, turn


def _build_order() -> tuple[Callable[..., Any], ...]:
    """Return ``walk`` and ``block_at`` of blocks of keys that take blocks of queries in order."""

    @device_function
    def walk(_key_block: Any, _per_head: Any, _blocks: Any) -> Any:
        return int32(0)

    @device_function
    def block_at(step: Any, _walk: Any, _blocks: Any) -> Any:
        return step

    return walk, block_at


def _build_rotation() -> tuple[Callable[..., Any], ...]:
    """Return ``walk``, ``block_at`` and ``turn`` of blocks of keys that all queries see, and take turns.

    If all began with the first queries, they would stand in line there.  So the blocks of keys of a head
    begin at places spread evenly around the ring of its blocks of queries, the second `spacing` before the
    first one: no two are ever at one block of queries, and each arrives there `spacing` steps behind the one
    before it.  They add in the order in which they arrive.

    Those behind arrive at the last blocks of queries first, so that the first block of keys waits for later
    ones there.  They must run at the same time, so they go in windows of at most as many as the grid has
    blocks (and there are blocks of queries), alike in size but for the last; a window adds to a block of
    queries when those before it have.  Nobody waits for ever: tiles are drawn in order, those of a window one
    behind the other, so while a window is not drawn as a whole, some block has a tile of an earlier one, or
    none, and will draw; and within a window who waits is a later step than who is waited for.

    Source: Qiang et al. 2026, arXiv:2601.21824, "Shift Scheduling".
    """

    @device_function
    def walk(key_block: Any, per_head: Any, blocks: Any) -> Any:
        """Return by how many steps it is behind rank 0, the spacing, and where its window begins and ends."""
        most = min(int32(blocks), int32(grid.blocks()))
        windows = registers.quotient(int32(per_head + most - 1), most)
        size = registers.quotient(int32(per_head + windows - 1), windows)
        spacing = registers.quotient(blocks, size)
        first = int32(registers.quotient(key_block, size) * size)
        return int32((key_block - first) * spacing), spacing, first, min(int32(first + size), int32(per_head))

    @device_function
    def block_at(step: Any, walk: Any, blocks: Any) -> Any:
        block = int32(step - walk[0])
        if block < 0:
            block = int32(block + blocks)
        return block

    @device_function
    def turn(
        walk: Any, step: Any, key_block: Any, _block: Any, blocks: Any, _tq: Any, _tk: Any, _offset: Any
    ) -> Any:
        behind, spacing, first, end = walk
        # Until it comes to block 0, those have been here that have come around before it, one each spacing;
        # then all before it, and those behind it that have come around to here.
        if step < behind:
            return int32(first + registers.quotient(step, spacing))
        return max(key_block, int32(end - registers.quotient(int32(blocks - step + spacing - 1), spacing)))

    return walk, block_at, turn
