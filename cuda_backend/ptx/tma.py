"""The tensor memory accelerator: whole tiles between global and shared memory, by descriptor.

A descriptor is the 128-byte ``CUtensorMap`` that ``cuTensorMapEncodeTiled`` writes on the host; kernels get
its generic address, in parameters or in device memory. Elements outside the tensor arrive as zeros and still
count among the barrier's bytes, so a ragged tile needs no special case.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions: Tensor copy".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["load_4d", "prefetch_descriptor"]

prefetch_descriptor = instruction(
    "prefetch_descriptor",
    types.void,
    {"descriptor": types.uint64},
    "prefetch.tensormap [$0];",
    "l",
    'Bring a descriptor near the copy engine.  PTX ISA, "prefetch", .tensormap.',
)

load_4d = instruction(
    "load_4d",
    types.void,
    {
        "target": types.uint32,
        "descriptor": types.uint64,
        "barrier": types.uint32,
        **{f"coordinate_{axis}": types.int32 for axis in range(4)},
    },
    "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[$0], [$1, {$3, $4, $5, $6}], [$2];",
    "r,l,r,r,r,r,r",
    "Copy the box at four coordinates, the contiguous axis first, to shared address `target`; it "
    "completes on "
    '`barrier`, by bytes.  PTX ISA, "cp.async.bulk.tensor".',
)
