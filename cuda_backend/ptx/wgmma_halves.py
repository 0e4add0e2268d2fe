"""Products whose accumulators are two arrays, of the left and the right half of the columns, or only one.

Each half is a vector of registers, which is free as soon as its own group of products has run.  With one
vector for all columns in some products, and a half of it in others, ptxas serialises them (C7511).

Source: PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuda_backend.ptx.assembly import Intrinsic, Lowering, declare, element_pointers, passed_at, types
from cuda_backend.ptx.wgmma import PRODUCT, register_list

__all__ = ["product_codes_in_halves", "wait_for_both"]


def wait_for_both(count: int, halves: int = 2) -> Intrinsic:
    """Return ``wait(left, right)``: for all groups, tied to `count` registers of each half, or of one."""

    def lower(*arrays: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointers = _pointers(context, builder, signature.args[:halves], values[:halves], count)
            passed_at(builder, types.int32, pointers, "wgmma.wait_group.sync.aligned 0;")
            return context.get_dummy_value()

        return types.void(*arrays), codegen

    return declare("wait_for_both", ("left", "right"), 'PTX ISA, "wgmma.wait_group".', lower)


def product_codes_in_halves(
    n: int, offsets: Sequence[int], right: int, *, halves: int = 2, stages: int = 1, apart: bool = False
) -> Intrinsic:
    """Return D += A B of int8, 64 x n, as two products of n / 2 columns or as one, fence and commit included.

    Parameters
    ----------
    n, offsets
        As in `product_codes`.
    right : int
        Where the right half of B's rows starts, in units of 16 bytes.
    halves : int
        2, or 1: then the left array has all accumulators, and the right one is not touched.
    stages : int
        How many pairs of tiles.
    apart : bool
        Whether each half is a group of its own, all stages of the left one first.

    Returns
    -------
    Intrinsic
        ``product(left[n // 4] of int32, right[n // 4], tiles[2 * stages] of uint64)``: descriptors of A and B
        of each stage in turn.
    """
    count = n // (2 * halves)
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n // halves}k32.s32.s8.s8"
    first = 2 * halves * count  # operand: accumulators are outputs and inputs
    lines = ["{ .reg .b64 a, b; .reg .pred add; setp.eq.b32 add, 0, 0;", "wgmma.fence.sync.aligned;"]
    for side in range(halves):
        for tile in range(first, first + 2 * stages, 2):
            for offset in offsets:
                lines.append(
                    f"add.s64 a, ${tile}, {offset}; add.s64 b, ${tile + 1}, {offset + side * right};"
                )
                lines.append(f"{opcode} {register_list(side * count, count)}, a, b, add;")
        if apart or side == halves - 1:
            lines.append("wgmma.commit_group.sync.aligned;")
    text = "\n".join([*lines, "}"])

    def lower(*kinds: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointers = _pointers(context, builder, signature.args[:halves], values[:halves], count)
            tiles = element_pointers(context, builder, signature.args[2], values[2], 2 * stages)
            descriptors = [builder.load(pointer) for pointer in tiles]
            passed_at(builder, types.int32, pointers, text, descriptors, ["l"] * (2 * stages))
            return context.get_dummy_value()

        return types.void(*kinds), codegen

    return declare(f"product_codes_in_{halves}_{n}_{stages}", ("left", "right", "tiles"), PRODUCT, lower)


def _pointers(context: Any, builder: Any, kinds: Any, halves: Any, count: int) -> list[Any]:
    """Return pointers to the registers of the left half, then of the right one."""
    return [
        pointer
        for kind, array in zip(kinds, halves, strict=True)
        for pointer in element_pointers(context, builder, kind, array, count)
    ]
