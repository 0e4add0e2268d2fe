"""The tensor memory accelerator on matrices: boxes from global to shared memory.

Descriptors lie in device memory, for whoever copies again and again from the same matrices.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions: Tensor copy".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["acquire", "load", "prefetch"]

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
    {
        "target": types.uint32,
        "descriptor": types.uint64,
        "barrier": types.uint32,
        "column": types.int32,
        "row": types.int32,
    },
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[$0], [$1, {$3, $4}], [$2];",
    "r,l,r,r,r",
    "Copy the box at a column and a row to shared address `target`; it completes on `barrier`, by bytes.  "
    'PTX ISA, "cp.async.bulk.tensor".',
)

prefetch = instruction(
    "prefetch",
    types.void,
    {"descriptor": types.uint64, "column": types.int32, "row": types.int32},
    "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [$0, {$1, $2}];",
    "l,r,r",
    "Ask for a box in the L2 cache; what is written to it later is seen all the same.  "
    'PTX ISA, "cp.async.bulk.prefetch.tensor".',
)
