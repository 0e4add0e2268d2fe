"""Clusters: blocks that run together and reach each other's shared memory.

Source: PTX ISA 8.7, "Parallel Synchronization and Communication Instructions: barrier.cluster", "Data
Movement and Conversion Instructions: mapa".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["arrive", "leave", "load_float", "load_word", "synchronise", "wait"]

synchronise = instruction(
    "synchronise",
    types.void,
    {},
    "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
    "",
    'All threads of all blocks of the cluster.  PTX ISA, "barrier.cluster".',
)

arrive = instruction(
    "arrive",
    types.void,
    {},
    "barrier.cluster.arrive.release;",
    "",
    'The first half of `synchronise`, which waits for nobody.  PTX ISA, "barrier.cluster".',
)

wait = instruction(
    "wait",
    types.void,
    {},
    "barrier.cluster.wait.acquire;",
    "",
    'The other half: all threads of all blocks have arrived.  PTX ISA, "barrier.cluster".',
)

leave = instruction(
    "leave",
    types.void,
    {},
    "barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;",
    "",
    "As `synchronise`, but what was stored before need not be seen behind it: no fence waits for stores to "
    "global memory.  Blocks that end together stay until all have used what they read of each other.  PTX "
    'ISA, "barrier.cluster", .relaxed.',
)

load_float = instruction(
    "load_float",
    types.float32,
    {"address": types.uint32, "block": types.uint32},
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, $1, $2; ld.shared::cluster.f32 $0, [there]; }",
    "=f,r,r",
    'The same of a float32.  PTX ISA, "mapa", "ld", .shared::cluster.',
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
