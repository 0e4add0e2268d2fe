"""What producer and consumers of a Hopper product of codes agree on: shared memory and the order of tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import device_function
from cuda_backend.int8.variant_hopper import LISTED, Wide
from cuda_backend.ptx import registers
from cuda_backend.ptx.assembly import types

__all__ = ["GROUP", "STEPS_OF_A_STAGE", "Layout", "layout_of", "placing"]

int32 = types.int32

GROUP = 8  # rows of tiles that are worked on together: with 16 columns they share what L2 holds
STEPS_OF_A_STAGE = [0, 2, 4, 6]  # 32 bytes each, in units of 16


class Layout(NamedTuple):
    """Bytes from the start of shared memory: stages of A and B first, then what is named here.

    Attributes
    ----------
    stage_bytes
        Of a stage; B lies behind A in it.
    columns
        Scale and bias of each column.
    full, empty
        Barriers of each stage: it has been brought, it has been read.
    columns_full, columns_empty
        The same of ``columns``.
    ready
        Barrier: outliers have been set aside.
    number, listed
        How many there are, and which.
    counted
        How many each of the warps that list them has found, 16 bytes apart.
    """

    stage_bytes: int
    columns: int
    full: int
    empty: int
    columns_full: int
    columns_empty: int
    ready: int
    number: int
    listed: int
    counted: int


def layout_of(variant: Wide) -> Layout:
    """Return the layout of `variant`."""
    stage_bytes = variant.a_bytes + variant.b_bytes
    columns = variant.stages * stage_bytes
    full = columns + 8 * variant.block_n
    empty = full + 8 * variant.stages
    behind = empty + 8 * variant.stages
    places = [*range(behind, behind + 40, 8), behind + 32 + 4 * LISTED]
    return Layout(stage_bytes, columns, full, empty, *places)


def placing(group: int) -> Callable[..., Any]:
    """Return the function from a tile to its row and column: down `group` rows, then to the next column."""

    @device_function
    def place(tile: Any, rows: Any, columns: Any) -> Any:
        index = registers.quotient(tile, group * columns)
        rank = int32(tile - index * group * columns)
        members = int32(min(group, rows - index * group))
        column = registers.quotient(rank, members)
        return int32(index * group + rank - column * members), int32(column)

    return place
