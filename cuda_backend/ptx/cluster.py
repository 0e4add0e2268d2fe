"""Clusters: blocks that run together and reach each other's shared memory.

Source: PTX ISA 8.7, "Parallel Synchronization and Communication Instructions: barrier.cluster", "Data
Movement and Conversion Instructions: mapa".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["arrive_at", "load_word", "rank", "synchronise"]

rank = instruction(
    "rank",
    types.uint32,
    {},
    "mov.u32 $0, %cluster_ctarank;",
    "=r",
    'Number of this block in its cluster.  PTX ISA, "%cluster_ctarank".',
    pure=True,
)

synchronise = instruction(
    "synchronise",
    types.void,
    {},
    "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
    "",
    'All threads of all blocks of the cluster.  PTX ISA, "barrier.cluster".',
)

arrive_at = instruction(
    "arrive_at",
    types.void,
    {"barrier": types.uint32, "block": types.uint32},
    "{ .reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; "
    "mbarrier.arrive.shared::cluster.b64 _, [there]; }",
    "r,r",
    "Arrive once at the barrier that lies in block number `block` where `barrier` lies in this one.  It says "
    "that shared memory was read, and publishes nothing: release at the scope of the cluster would fence "
    "global memory too.  "
    'PTX ISA, "mapa", "mbarrier.arrive".',
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
