"""The tensor memory accelerator on matrices: boxes between global and shared memory, also into a cluster.

Descriptors lie in device memory, for whoever copies again and again from the same matrices.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions: Tensor copy".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["acquire", "load", "multicast"]

_BOX = {
    "target": types.uint32,
    "descriptor": types.uint64,
    "barrier": types.uint32,
    "column": types.int32,
    "row": types.int32,
}

acquire = instruction(
    "acquire",
    types.void,
    {"descriptor": types.uint64},
    "fence.proxy.tensormap::generic.acquire.sys [$0], 128;",
    "l",
    "Order this thread's later copies after the host's writing of a descriptor into global memory.  "
    'PTX ISA, "membar, fence", fence.proxy.tensormap.',
)

load = instruction(
    "load",
    types.void,
    _BOX,
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[$0], [$1, {$3, $4}], [$2];",
    "r,l,r,r,r",
    "Copy the box at a column and a row to shared address `target`; it completes on `barrier`, by bytes.  "
    'PTX ISA, "cp.async.bulk.tensor".',
)

multicast = instruction(
    "multicast",
    types.void,
    {**_BOX, "blocks": types.uint32},
    "{ .reg .b16 blocks; cvt.u16.u32 blocks, $5; "
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
    "[$0], [$1, {$3, $4}], [$2], blocks; }",
    "r,l,r,r,r,r",
    "The same into every block of the cluster whose bit is set in `blocks`, at the same place in each, whose "
    'own barrier there counts the bytes.  PTX ISA, "cp.async.bulk.tensor", .multicast::cluster.',
)
