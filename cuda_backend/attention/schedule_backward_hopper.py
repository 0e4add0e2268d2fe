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

__all__ = ["BackwardSchedule", "build_backward_schedule"]

int32 = types.int32


class BackwardSchedule(NamedTuple):
    """Device functions that all roles of a block share, so that they are at the same place.

    Attributes
    ----------
    place, first_block, turn
        As `build_backward_schedule` says.
    next_stage
        Step around the ring of Q and dO tiles.
    next_ds
        Step around the ring of dS tiles.
    """

    place: Callable[..., Any]
    first_block: Callable[..., Any]
    turn: Callable[..., Any]
    next_stage: Callable[..., Any]
    next_ds: Callable[..., Any]


def build_backward_schedule(variant: BackwardVariant | WideBackwardVariant) -> BackwardSchedule:
    """Return the schedule of `variant`.

    ``place`` is that of `build_place`, for blocks of keys and key heads.  Under a causal mask the first keys
    have most queries and come first, so that what is left for the end is short.  The deterministic option
    needs them backwards: query block m is added to by its last key block first, which begins with m, while
    the one before it begins a block of queries earlier; nobody waits for a tile that is drawn after its own.

    ``first_block(key_block, blocks, tq, offset)`` is the first block of queries that see the keys, `blocks`
    if there is none; ``turn(key_block, block, tq, tk, offset)`` how many blocks of keys add to a block of
    queries before this one.
    """
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
    def turn(key_block: Any, block: Any, tq: Any, tk: Any, offset: Any) -> Any:
        if causal:
            end = min(tk, int32(min(int32((block + 1) * block_m), tq) + offset))
            return int32(registers.quotient(int32(end + (block_n - 1)), block_n) - 1 - key_block)
        return int32(key_block)

    place = build_place(causal and variant.deterministic)
    ds_stages = 1 if isinstance(variant, WideBackwardVariant) else variant.ds_stages
    return BackwardSchedule(place, first_block, turn, ring(variant.stages), ring(ds_stages))
