"""Clusters: blocks that run together and reach each other's shared memory.

Source: PTX ISA 8.7, "Parallel Synchronization and Communication Instructions: barrier.cluster", "Data
Movement and Conversion Instructions: mapa".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["load_word", "synchronise"]

synchronise = instruction(
    "synchronise",
    types.void,
    {},
    "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
    "",
    'All threads of all blocks of the cluster.  PTX ISA, "barrier.cluster".',
)

load_word = instruction(
    "load_word",
    types.int32,
    {"address": types.uint32, "block": types.uint32},
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, $1, $2; ld.shared::cluster.b32 $0, [there]; }",
    "=r,r,r",
    "The word that lies in block number `block` where `address` lies in this one.  "
    'PTX ISA, "mapa", "ld", .shared::cluster.',
)
