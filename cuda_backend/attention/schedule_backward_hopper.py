"""Which keys a Hopper block works on, which queries see them, and whose turn it is to add to dQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import device_function
from cuda_backend.attention.schedule_hopper import build_place, ring
from cuda_backend.attention.variant_backward_hopper import BackwardVariant
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import registers
from cuda_backend.ptx.assembly import types

__all__ = ["BackwardSchedule", "build_backward_schedule", "rotates", "spacing_of"]

int32 = types.int32


class BackwardSchedule(NamedTuple):
    """Device functions that all roles of a block share, so that they are at the same place.

    Attributes
    ----------
    place, first_block, block_at, turn
        As `build_backward_schedule` says.
    next_stage
        Step around the ring of Q and dO tiles.
    next_ds
        Step around the ring of dS tiles.
    """

    place: Callable[..., Any]
    first_block: Callable[..., Any]
    block_at: Callable[..., Any]
    turn: Callable[..., Any]
    next_stage: Callable[..., Any]
    next_ds: Callable[..., Any]


def rotates(variant: BackwardVariant | WideBackwardVariant) -> bool:
    """Return whether blocks of keys begin with unlike blocks of queries: in turn, seen by all queries."""
    return variant.deterministic and not variant.causal and variant.mods is None


def spacing_of(key_blocks: int, blocks: int, grid: int) -> int:
    """Return how far apart the blocks of keys of a head begin, in blocks of queries; 0 if all begin together.

    They are spread evenly over the `blocks` of queries.  Each waits for others that come before and behind
    it, so all must run at the same time: in a `grid` of fewer blocks they begin together.

    >>> spacing_of(32, 64, 132), spacing_of(8, 8, 132), spacing_of(4, 2, 132), spacing_of(256, 512, 132)
    (2, 1, 0, 0)
    """
    return blocks // key_blocks if key_blocks <= grid else 0


def build_backward_schedule(variant: BackwardVariant | WideBackwardVariant) -> BackwardSchedule:
    """Return the schedule of `variant`.

    ``place(tile, per_head, section, all_heads)`` is the block of keys, and the key head, of a tile.  A block
    of keys takes steps from ``first_block(key_block, blocks, tq, offset)`` on, which is the first block of
    queries that see the keys, to `blocks`.  At each it is at the block of queries ``block_at(step, key_block,
    section, blocks)``; ``turn(key_block, step, block, (per_head, section, blocks, tq, tk, offset))`` says how
    many blocks of keys add to that one before.

    Steps are blocks of queries, and `place` is that of `build_place`.  Under a causal mask the first keys
    have most queries and come first, so that what is left for the end is short.  Turns need them backwards:
    query block m is added to by its last key block first, which begins with m, while the one before it begins
    a block of queries earlier; nobody waits for a tile that is drawn after its own.

    With variants that `rotates` says yes to, `section` is what `spacing_of` says: see `_build_rotation`.
    """
    backwards = variant.causal and variant.deterministic
    place, (first_block, block_at, turn) = build_place(backwards), _build_order(variant)
    if rotates(variant):
        place, block_at, turn = _build_rotation()
    ds_stages = 1 if isinstance(variant, WideBackwardVariant) else variant.ds_stages
    return BackwardSchedule(place, first_block, block_at, turn, ring(variant.stages), ring(ds_stages))


def _build_order(variant: BackwardVariant | WideBackwardVariant) -> tuple[Callable[..., Any], ...]:
    """Return ``first_block``, ``block_at`` and ``turn`` where steps are blocks of queries."""
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
    def block_at(step: Any, _key_block: Any, _section: Any, _blocks: Any) -> Any:
        return step

    @device_function
    def turn(key_block: Any, _step: Any, block: Any, sizes: Any) -> Any:
        _, _, _, tq, tk, offset = sizes
        if causal:
            end = min(tk, int32(min(int32((block + 1) * block_m), tq) + offset))
            return int32(registers.quotient(int32(end + (block_n - 1)), block_n) - 1 - key_block)
        return int32(key_block)

    return first_block, block_at, turn


def _build_rotation() -> tuple[Callable[..., Any], ...]:
    """Return ``place``, ``block_at`` and ``turn`` of blocks of keys that begin `spacing` apart.

    If all began with the first queries, they would stand in line there.  Blocks of queries are a ring: the
    first block of keys begins with the first one, the second block of keys `spacing` before that.  So no two
    are ever at one block of queries, and each arrives there `spacing` steps behind the one before it; they
    add in the order in which they arrive.  The last blocks of keys are the first to come around to the first
    queries.

    Nobody waits for ever if all of a head can run at the same time.  Tiles are drawn in order, a head behind
    the other: while one is not drawn as a whole, some block has a tile of an earlier head, or none, and will
    draw; and within a head who waits is at a later step than who is waited for.

    Source: Qiang et al. 2026, arXiv:2601.21824, "Shift Scheduling".
    """

    @device_function
    def place(tile: Any, per_head: Any, _spacing: Any, _all_heads: Any) -> Any:
        head = registers.quotient(tile, per_head)
        return int32(tile - head * per_head), head

    @device_function
    def block_at(step: Any, key_block: Any, spacing: Any, blocks: Any) -> Any:
        block = int32(step - key_block * spacing)
        if block < 0:
            block = int32(block + blocks)
        return block

    @device_function
    def turn(key_block: Any, step: Any, block: Any, sizes: Any) -> Any:
        per_head, spacing, blocks, _, _, _ = sizes
        if spacing == 0:
            return int32(key_block)
        # Before it comes to block 0, those have been here that came around before it, one every `spacing`.
        if block > step:
            return registers.quotient(step, spacing)
        # Then all before it, and those behind it that have come around to here.
        missing = registers.quotient(int32(blocks - step + spacing - 1), spacing)
        return max(int32(key_block), int32(per_head - missing))

    return place, block_at, turn
