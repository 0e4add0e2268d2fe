"""One grid behind another: the next launch of a stream may begin before this one has ended.

A launch with the attribute *programmatic stream serialization* may start as soon as every block of the
launch before it has called `let_next_grid_start` or has ended.  What it does before `wait_for_earlier_grids`
(barriers, descriptors) runs beside the end of that launch; what it does behind it sees all that was written.

Source: PTX ISA 8.7, "Parallel Synchronization and Communication Instructions: griddepcontrol".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["blocks", "let_next_grid_start", "wait_for_earlier_grids"]

blocks = instruction(
    "blocks",
    types.int32,
    {},
    "mov.u32 $0, %nctaid.x;",
    "=r",
    'Blocks of the grid, read again at each use: no register is kept for it.  PTX ISA, "%nctaid".',
)

let_next_grid_start = instruction(
    "let_next_grid_start",
    types.void,
    {},
    "griddepcontrol.launch_dependents;",
    "",
    'This block does not hold up the next grid any more.  PTX ISA, "griddepcontrol", .launch_dependents.',
)

wait_for_earlier_grids = instruction(
    "wait_for_earlier_grids",
    types.void,
    {},
    "griddepcontrol.wait;",
    "",
    "Wait until the grids before this one have ended and their writes are visible; at once if this grid was "
    'launched without the attribute.  PTX ISA, "griddepcontrol", .wait.',
)
