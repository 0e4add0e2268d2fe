"""Warpgroup matrix products: 64 rows, n columns, float32 sums of fp16 or bf16, or int32 sums of int8.

``wgmma`` runs asynchronously: `fence`, issue, `commit`, and later a wait that names how many committed
groups may still run. Neither accumulators nor operands in registers may be touched in between.

A product here is a whole chain over K (one intrinsic, one asm), made by a factory for its shape. Thread t
of the warpgroup (warp w = t // 32, lane l = t % 32) holds, as accumulator 4 i + e, row 16 w + l // 4 + 8 (e
// 2) and column 8 i + 2 (l % 4) + e % 2; packed in pairs, this is also how it holds A.

Source: PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from cuda_backend.ptx.assembly import (
    LLVM_TYPES,
    Intrinsic,
    Lowering,
    declare,
    element_pointers,
    emit,
    instruction,
    passed,
    types,
)

__all__ = [
    "MIDDLE",
    "commit",
    "descriptor_k_major",
    "descriptor_k_major_32",
    "descriptor_mn_major",
    "fence",
    "k_major_steps",
    "product_codes",
    "product_codes_behind_fence",
    "product_codes_from_middle",
    "product_registers",
    "product_shared",
    "product_step",
    "register_list",
    "wait",
    "wait_for_older",
]

SWIZZLE_128, SWIZZLE_32 = 1 << 62, 3 << 62  # PTX ISA, "Matrix Descriptor Format", bits 62 and 63
MIDDLE, MIDDLE_BITS = 3.0 * 2**22, 0x4B400000  # float32, in whose neighbourhood a unit in the last place is 1
PRODUCT = 'One chain of products.  PTX ISA, "wgmma.mma_async".'

fence = instruction(
    "fence",
    types.void,
    {},
    "wgmma.fence.sync.aligned;",
    "",
    'Order writes of registers before the next product.  PTX ISA, "wgmma.fence".',
)

commit = instruction(
    "commit",
    types.void,
    {},
    "wgmma.commit_group.sync.aligned;",
    "",
    'Close the group of products issued so far.  PTX ISA, "wgmma.commit_group".',
)


wait_for_older = instruction(
    "wait_for_older",
    types.void,
    {},
    "wgmma.wait_group.sync.aligned 1;",
    "",
    "Wait until all groups but the last have run: what they read is free, accumulators are not.  "
    'PTX ISA, "wgmma.wait_group".',
)


def wait(pending: int, count: int) -> Intrinsic:
    """Return the wait until at most `pending` groups run, tied to the `count` accumulators then complete."""

    def lower(accumulators: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            text = f"wgmma.wait_group.sync.aligned {pending};"
            passed(context, builder, signature.args[0], values[0], count, text)
            return context.get_dummy_value()

        return types.void(accumulators), codegen

    return declare(f"wait_{pending}", ("accumulators",), 'PTX ISA, "wgmma.wait_group".', lower)


def descriptor_mn_major(leading_bytes: int) -> Intrinsic:
    """Return what makes the descriptor of a tile with 64 elements along N in a row and K down the rows (V).

    Sub-tiles of 64 columns lie `leading_bytes` apart, groups of 8 rows 1024 bytes.  The tile starts at
    a multiple of 1024 and is swizzled by 128 bytes.
    """
    return _descriptor(SWIZZLE_128 | (1024 >> 4) << 32 | (leading_bytes >> 4) << 16)


def _descriptor(high: int) -> Intrinsic:
    """Return what makes a descriptor of an address and the bits of its layout."""
    return instruction(
        "descriptor",
        types.uint64,
        {"address": types.uint32},
        f"{{ .reg .b32 a; shr.b32 a, $1, 4; cvt.u64.u32 $0, a; or.b64 $0, $0, {high:#x}; }}",
        "=l,r",
        'PTX ISA, "Matrix Descriptor Format".',
        pure=True,
    )


# A tile with 64 elements along K in a row: the leading distance is not used with a swizzle.
descriptor_k_major = descriptor_mn_major(16)

# A tile with 16 elements along K in a row of 32 bytes, swizzled by as many: groups of 8 rows are 256 bytes.
descriptor_k_major_32 = _descriptor(SWIZZLE_32 | (256 >> 4) << 32 | (16 >> 4) << 16)


def k_major_steps(depth: int, rows: int) -> list[int]:
    """Return where each step of 16 along K starts in sub-tiles of `rows` rows of 64, in units of 16 bytes.

    >>> k_major_steps(128, 128)[3:6]
    [6, 1024, 1026]
    """
    return [(k // 4) * rows * 8 + (k % 4) * 2 for k in range(depth // 16)]


def product_shared(
    n: int,
    kind: str,
    a_offsets: Sequence[int],
    b_offsets: Sequence[int],
    *,
    a_turned: bool = False,
    b_turned: bool = False,
) -> Intrinsic:
    """Return D = A B, both operands in shared memory; one 64 x n x 16 step for a pair of offsets.

    Parameters
    ----------
    n : int
        Columns: a multiple of 8, at most 256.
    kind : str
        ``"f16"`` or ``"bf16"``.
    a_offsets, b_offsets : sequence of int
        Where each step along K starts, relative to the descriptors, in units of 16 bytes.
    a_turned, b_turned : bool
        Whether an operand has M or N along its rows in place of K, as `descriptor_mn_major` describes it.

    Returns
    -------
    Intrinsic
        ``product(accumulators[n // 2] of float32, descriptor of A, descriptor of B)``.
    """
    count = n // 2
    turned = f"{int(a_turned)}, {int(b_turned)}"
    lines = ["{ .reg .b64 a, b;"]
    for step, (da, db) in enumerate(zip(a_offsets, b_offsets, strict=True)):
        lines.append(f"add.s64 a, ${count}, {da}; add.s64 b, ${count + 1}, {db};")
        lines.append(f"{_opcode(n, kind)} {register_list(0, count)}, a, b, {int(step > 0)}, 1, 1, {turned};")
    text = "\n".join([*lines, "}"])

    def lower(accumulators: Any, *_: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kinds = signature.args[0]
            passed(context, builder, kinds, values[0], count, text, values[1:], ("l", "l"), read=False)
            return context.get_dummy_value()

        return types.void(accumulators, types.uint64, types.uint64), codegen

    return declare(f"product_shared_{n}_{kind}", ("accumulators", "a", "b"), PRODUCT, lower)


def product_step(n: int, kind: str, *, awaited: bool = True) -> Intrinsic:
    """Return D += A B for one step along K, both operands K-major in shared memory, and the wait for it.

    The fence stands in the same asm: what ptxas moves between a fence and its product serialises products.

    Parameters
    ----------
    n, kind
        As in `product_shared`.
    awaited : bool
        Whether to wait; else the accumulators are left alone until `wait` says that it has run.

    Returns
    -------
    Intrinsic
        ``product(accumulators[n // 2] of float32, or of their bits, descriptor of A, descriptor of B)``.
    """
    count = n // 2
    text = "\n".join(
        (
            "wgmma.fence.sync.aligned;",
            f"{_opcode(n, kind)} {register_list(0, count)}, ${2 * count}, ${2 * count + 1}, 1, 1, 1, 0, 0;",
            "wgmma.commit_group.sync.aligned;",
            *(["wgmma.wait_group.sync.aligned 0;"] if awaited else []),
        )
    )

    def lower(accumulators: Any, *_: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            passed(context, builder, signature.args[0], values[0], count, text, values[1:], ("l", "l"))
            return context.get_dummy_value()

        return types.void(accumulators, types.uint64, types.uint64), codegen

    return declare(f"product_step_{n}_{kind}", ("accumulators", "a", "b"), PRODUCT, lower)


def product_codes(n: int, offsets: Sequence[int]) -> Intrinsic:
    """Return D += A B of int8 in int32, both operands K-major in shared memory, 64 x n x 32 for each offset.

    Parameters
    ----------
    n : int
        Columns: 8, 16, 24, or a multiple of 16 up to 256.
    offsets : sequence of int
        Where each step along K starts in both tiles, in units of 16 bytes.

    Returns
    -------
    Intrinsic
        ``product(accumulators[n // 2] of int32, descriptor of A, descriptor of B)``.
    """
    return _product_codes(f"product_codes_{n}", n, offsets, "")


def product_codes_behind_fence(n: int, offsets: Sequence[int]) -> Intrinsic:
    """Return `product_codes` with `fence` in the same asm, behind what else moves the accumulators."""
    return _product_codes(f"product_codes_behind_fence_{n}", n, offsets, "wgmma.fence.sync.aligned;")


def _product_codes(name: str, n: int, offsets: Sequence[int], before: str) -> Intrinsic:
    count = n // 2
    first = 2 * count
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8"
    lines = ["{ .reg .b64 a, b; .reg .pred add; setp.eq.b32 add, 0, 0;", before]  # no immediate is taken here
    for offset in offsets:
        lines.append(f"add.s64 a, ${first}, {offset}; add.s64 b, ${first + 1}, {offset};")
        lines.append(f"{opcode} {register_list(0, count)}, a, b, add;")
    text = "\n".join([*lines, "}"])

    def lower(accumulators: Any, *_: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kind, array, others = signature.args[0], values[0], values[1:]
            passed(context, builder, kind, array, count, text, others, ("l", "l"))
            return context.get_dummy_value()

        return types.void(accumulators, types.uint64, types.uint64), codegen

    return declare(name, ("accumulators", "a", "b"), PRODUCT, lower)


def product_codes_from_middle(n: int, offsets: Sequence[int]) -> Intrinsic:
    """Return D = A B of int8, both operands K-major in shared memory, sums that read as float32.

    They start from the bits of `MIDDLE`.  Between 2**23 and 2**24 neighbouring float32 are neighbouring
    integers, so their bits are those of MIDDLE plus the sum, exactly, if that is below 2**22: no conversion
    is needed.  They must be waited for as integers: moving them to another register reads them.  The fence
    stands in the same asm, behind the writes of the registers.

    Parameters
    ----------
    n, offsets
        As in `product_codes`.

    Returns
    -------
    Intrinsic
        ``product(accumulators[n // 2] of int32, descriptor of A, descriptor of B)``.
    """
    count = n // 2
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8"
    lines = ["{ .reg .b64 a, b; .reg .pred add; setp.eq.b32 add, 0, 0;"]
    lines += [f"mov.b32 ${i}, {MIDDLE_BITS:#x};" for i in range(count)]
    lines.append("wgmma.fence.sync.aligned;")
    for offset in offsets:
        lines.append(f"add.s64 a, ${count}, {offset}; add.s64 b, ${count + 1}, {offset};")
        lines.append(f"{opcode} {register_list(0, count)}, a, b, add;")
    text = "\n".join([*lines, "}"])

    def lower(accumulators: Any, *_: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            word = LLVM_TYPES[types.int32]
            pointers = element_pointers(context, builder, signature.args[0], values[0], count)
            constraints = ",".join(["=&r"] * count + ["l", "l", "~{memory}"])
            found = emit(builder, ir.LiteralStructType([word] * count), list(values[1:]), text, constraints)
            for i, pointer in enumerate(pointers):
                builder.store(builder.extract_value(found, i), pointer)
            return context.get_dummy_value()

        return types.void(accumulators, types.uint64, types.uint64), codegen

    return declare(f"product_codes_from_middle_{n}", ("accumulators", "a", "b"), PRODUCT, lower)


def product_registers(n: int, kind: str, b_offsets: Sequence[int]) -> Intrinsic:
    """Return D += A B with A in registers and B in shared memory, N-major.

    Parameters
    ----------
    n, kind
        As in `product_shared`.
    b_offsets : sequence of int
        Where each step along K starts, relative to the descriptor, in units of 16 bytes.

    Returns
    -------
    Intrinsic
        ``product(accumulators[n // 2] of float32, a[4 * len(b_offsets)] of uint32, descriptor of B)``.
    """
    count, words = n // 2, 4 * len(b_offsets)
    first = 2 * count
    lines = ["{ .reg .b64 b;"]
    for step, db in enumerate(b_offsets):
        fragment = register_list(first + 4 * step, 4)
        lines.append(f"add.s64 b, ${first + words}, {db};")
        lines.append(f"{_opcode(n, kind)} {register_list(0, count)}, {fragment}, b, 1, 1, 1, 1;")
    text = "\n".join([*lines, "}"])

    def lower(accumulators: Any, a: Any, _b: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointers = element_pointers(context, builder, signature.args[1], values[1], words)
            operands = [*(builder.load(pointer) for pointer in pointers), values[2]]
            constraints = ["r"] * words + ["l"]
            passed(context, builder, signature.args[0], values[0], count, text, operands, constraints)
            return context.get_dummy_value()

        return types.void(accumulators, a, types.uint64), codegen

    return declare(f"product_registers_{n}_{kind}", ("accumulators", "a", "b"), PRODUCT, lower)


def _opcode(n: int, kind: str) -> str:
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"


def register_list(first: int, count: int) -> str:
    """Return operands `first` to ``first + count - 1`` as wgmma takes its accumulators."""
    return "{" + ", ".join(f"${i}" for i in range(first, first + count)) + "}"
