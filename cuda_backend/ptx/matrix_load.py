"""Fragments of matrices from shared memory, as they are or turned: eight by eight numbers of 16 bits.

Of a block lane l gets row l // 4, columns 2 (l % 4) and the next; turned, rows 2 (l % 4) and the next of
column l // 4.  The address of a row of 16 bytes is given by one lane: 0 to 7 for the first block, 8 to 15 for
the second and so on.

Source: PTX ISA 8.7, "Warp Level Matrix Instructions: ldmatrix", "movmatrix".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types
from cuda_backend.ptx.copy import words_loader

__all__ = ["load_blocks", "load_blocks_turned", "turn_block"]

load_blocks = words_loader(
    "load_blocks",
    4,
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
    "r",
    'Four blocks, one word of each for a lane.  PTX ISA, "ldmatrix".',
)

load_blocks_turned = words_loader(
    "load_blocks_turned",
    4,
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
    "r",
    'The same, each block turned.  PTX ISA, "ldmatrix", .trans.',
)

turn_block = instruction(
    "turn_block",
    types.uint32,
    {"word": types.uint32},
    "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
    "=r,r",
    'A block in the registers of a warp, turned.  PTX ISA, "movmatrix".',
)
