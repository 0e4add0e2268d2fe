"""Rows of bytes moved without registers: to shared memory, and from there added to global memory.

The copy engine works on its own; the thread that starts a reduction closes groups of them and waits for
groups, as with ``wgmma``.  Addresses and sizes are multiples of 16 bytes.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions: Non-tensor copy",
"cp.async.bulk.commit_group", "cp.async.bulk.wait_group".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["add_floats", "commit", "load", "wait_added", "wait_read"]

load = instruction(
    "load",
    types.void,
    {"target": types.uint32, "source": types.uint64, "size": types.uint32, "barrier": types.uint32},
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    "r,l,r,r",
    'Copy `size` bytes to shared memory; it completes on `barrier`, by bytes.  PTX ISA, "cp.async.bulk".',
)

add_floats = instruction(
    "add_floats",
    types.void,
    {"target": types.uint64, "source": types.uint32, "size": types.uint32},
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$0], [$1], $2;",
    "l,r,r",
    'Add `size` bytes of float32 of shared memory to global memory.  PTX ISA, "cp.reduce.async.bulk".',
)

commit = instruction(
    "commit",
    types.void,
    {},
    "cp.async.bulk.commit_group;",
    "",
    'Close the group of what this thread has started.  PTX ISA, "cp.async.bulk.commit_group".',
)

wait_read = instruction(
    "wait_read",
    types.void,
    {},
    "cp.async.bulk.wait_group.read 0;",
    "",
    'Wait until all groups have read their sources.  PTX ISA, "cp.async.bulk.wait_group", .read.',
)

wait_added = instruction(
    "wait_added",
    types.void,
    {},
    "cp.async.bulk.wait_group 0;",
    "",
    'Wait until what all groups do is done and seen by this thread.  PTX ISA, "cp.async.bulk.wait_group".',
)
