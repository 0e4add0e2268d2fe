"""The tensor memory accelerator: whole tiles between global and shared memory, by descriptor.

A descriptor is the 128-byte ``CUtensorMap`` that ``cuTensorMapEncodeTiled`` writes on the host; kernels get
its generic address, in parameters or in device memory. Elements outside the tensor arrive as zeros and still
count among the barrier's bytes, so a ragged tile needs no special case.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions: Tensor copy".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import Intrinsic, instruction, types

__all__ = ["load_4d", "load_4d_of", "load_row_of", "prefetch_descriptor"]

prefetch_descriptor = instruction(
    "prefetch_descriptor",
    types.void,
    {"descriptor": types.uint64},
    "prefetch.tensormap [$0];",
    "l",
    'Bring a descriptor near the copy engine.  PTX ISA, "prefetch", .tensormap.',
)

_COPY = "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
_OPERANDS = {
    "target": types.uint32,
    "descriptor": types.uint64,
    "barrier": types.uint32,
    **{f"coordinate_{axis}": types.int32 for axis in range(4)},
}

load_4d = instruction(
    "load_4d",
    types.void,
    _OPERANDS,
    f"{_COPY} [$0], [$1, {{$3, $4, $5, $6}}], [$2];",
    "r,l,r,r,r,r,r",
    "Copy the box at four coordinates, the contiguous axis first, to shared address `target`; it "
    "completes on "
    '`barrier`, by bytes.  PTX ISA, "cp.async.bulk.tensor".',
)


_ROWS = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"


def load_row_of(number: int) -> Intrinsic:
    """Return the copy of a row of a matrix by descriptor `number` of those at ``descriptor``.

    compute-sanitizer's racecheck knows that the copy engine writes here, not a thread: it takes a copy
    without a descriptor (`bulk.load`) for a write of the thread that starts it, which no barrier orders.
    """
    text = f"{{ .reg .b64 own; add.u64 own, $1, {128 * number}; {_ROWS} [$0], [own, {{0, $3}}], [$2]; }}"
    operands = {
        "target": types.uint32, "descriptor": types.uint64, "barrier": types.uint32, "row": types.int32,
    }  # fmt: skip
    doc = 'PTX ISA, "cp.async.bulk.tensor", two coordinates.'
    return instruction(f"load_row_{number}", types.void, operands, text, "r,l,r,r", doc)


def load_4d_of(number: int) -> Intrinsic:
    """Return `load_4d` by descriptor `number` of those that lie one behind the other at ``descriptor``.

    Its address is made where it is used: several addresses of 64 bits are many registers for a producer.
    """
    copy = f"{_COPY} [$0], [own, {{$3, $4, $5, $6}}], [$2];"
    text = f"{{ .reg .b64 own; add.u64 own, $1, {128 * number}; {copy} }}"
    return instruction(f"load_4d_{number}", types.void, _OPERANDS, text, "r,l,r,r,r,r,r", "See `load_4d`.")
