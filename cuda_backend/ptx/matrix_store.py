"""Fragments of a matrix stored from registers: eight by eight numbers of 16 bits, each block turned.

Source: PTX ISA 8.7, "Warp Level Matrix Instructions: stmatrix".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["store_turned"]

store_turned = instruction(
    "store_turned",
    types.void,
    {"address": types.uint32, **dict.fromkeys("abcd", types.uint32)},
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
    "r,r,r,r,r",
    "Store four blocks of which lane l holds row l // 4, columns 2 (l % 4) and the next: column c "
    "goes to the 16 bytes at the address that lane c, of the second block lane 8 + c and so on, gives.  "
    'PTX ISA, "stmatrix", .trans.',
)
