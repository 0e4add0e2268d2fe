"""Which tile of query rows a Hopper block works on, which key tiles it needs, which stage holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import device_function
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.ptx import registers
from cuda_backend.ptx.assembly import types

__all__ = ["Schedule", "build_place", "build_schedule", "ring"]

int32 = types.int32


class Schedule(NamedTuple):
    """Device functions that a producer and its consumers share, so that both are at the same place.

    Attributes
    ----------
    place, key_tiles
        As `build_schedule` says.
    next_stage, next_q_stage
        Steps around the rings of K and V tiles, and of Q tiles.
    """

    place: Callable[..., Any]
    key_tiles: Callable[..., Any]
    next_stage: Callable[..., Any]
    next_q_stage: Callable[..., Any]


def build_schedule(variant: Variant) -> Schedule:
    """Return the schedule of `variant`.

    ``place`` is that of `build_place`: within a section the row blocks with most keys come first, so that
    what is left for the end is short.  ``key_tiles(end_row, tq, tk, offset)`` counts the key tiles that the
    rows before ``end_row`` need.
    """
    block_n, causal = variant.block_n, variant.causal
    place = build_place(causal)

    @device_function
    def key_tiles(end_row: Any, tq: Any, tk: Any, offset: Any) -> Any:
        end = tk
        if causal:
            end = min(end, min(end_row, tq) + offset)
        return registers.quotient(int32(max(end, 0) + (block_n - 1)), block_n)

    return Schedule(place, key_tiles, ring(variant.stages), ring(variant.q_stages))


def build_place(backwards: bool) -> Callable[..., Any]:
    """Return ``place(tile, per_head, section, all_heads)``: the row block and the head of a tile.

    The head is batch and head in one number.  Heads come in sections whose arrays fit the L2 cache; within a
    section row blocks come in order, or `backwards`.
    """

    @device_function
    def place(tile: Any, per_head: Any, section: Any, all_heads: Any) -> Any:
        index = registers.quotient(tile, section * per_head)
        rank = int32(tile - index * section * per_head)
        members = min(section, int32(all_heads - index * section))
        row_rank = registers.quotient(rank, members)
        head = int32(index * section + rank - row_rank * members)
        if backwards:
            return int32(per_head - 1 - row_rank), head
        return int32(row_rank), head

    return place


def ring(stages: int) -> Callable[..., Any]:
    """Return the step around a ring of `stages`: (stage, parity of its phase) to the next ones."""

    @device_function
    def advance(stage: Any, parity: Any) -> Any:
        if stage == stages - 1:
            return int32(0), int32(parity ^ 1)
        return int32(stage + 1), parity

    return advance
