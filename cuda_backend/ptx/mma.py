"""Products of a warp, float32 sums of fp16 or bf16, and how operands are made of packed codes.

Lane l of the warp, g = l // 4 and t = l % 4, holds of A [16, 16] the pairs (row g, columns 2t and 2t + 1),
(row g + 8, the same), (row g, columns 2t + 8 and 2t + 9), (row g + 8, the same); of B [16, 8] the pairs (rows
2t and 2t + 1, column g) and (rows 2t + 8 and 2t + 9, column g); of C and D [16, 8] columns 2t and 2t + 1 of
row g and of row g + 8.  The first of a pair is in the low half of its word.

Source: PTX ISA 8.7, "Matrix multiply-accumulate operation using mma instruction", figures for m16n8k16.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cuda_backend.ptx.assembly import LLVM_TYPES, Intrinsic, Lowering, declare, emit, instruction, types

__all__ = ["look_up", "permute", "product", "subtract_pair"]

_word = types.uint32


def product(kind: str) -> Intrinsic:
    """Return D = A B + C for one warp, in place.

    Parameters
    ----------
    kind : str
        ``"f16"`` or ``"bf16"``.

    Returns
    -------
    Intrinsic
        ``product(sums, first, a0, a1, a2, a3, b0, b1)``: four float32 of local array `sums` from `first` on.
    """
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3"

    def lower(sums: Any, _first: Any, *_words: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, values[0])
            places = [
                builder.gep(array.data, [builder.add(values[1], ir.Constant(ir.IntType(32), i))])
                for i in range(4)
            ]
            operands = [*values[2:], *(builder.load(place) for place in places)]
            result = ir.LiteralStructType([LLVM_TYPES[types.float32]] * 4)
            found = emit(builder, result, operands, text, constraints, side_effect=False)
            for i, place in enumerate(places):
                builder.store(builder.extract_value(found, i), place)
            return context.get_dummy_value()

        return types.void(sums, types.int32, *[_word] * 6), codegen

    names = ("sums", "first", "a0", "a1", "a2", "a3", "b0", "b1")
    return declare(f"product_{kind}", names, 'PTX ISA, "mma", .m16n8k16.', lower)


permute = instruction(
    "permute",
    _word,
    {"low": _word, "high": _word, "selector": _word},
    "prmt.b32 $0, $1, $2, $3;",
    "=r,r,r,r",
    'Four of eight bytes, each named by four bits of `selector`.  PTX ISA, "prmt".',
    pure=True,
)

look_up = instruction(
    "look_up",
    _word,
    {"base": _word, "place": _word, "word": _word, "selector": _word},
    "{ .reg .b32 a; prmt.b32 a, $2, $3, $4; add.u32 a, a, $1; ld.shared.b32 $0, [a]; }",
    "=r,r,r,r,r",
    'Load from shared memory at `base` and the bytes that `selector` picks.  PTX ISA, "prmt", "ld".',
)


def subtract_pair(kind: str) -> Intrinsic:
    """Return the difference of two pairs of "f16" or "bf16" numbers, each rounded once."""
    text = {
        "f16": "sub.rn.f16x2 $0, $1, $2;",
        "bf16": "{ .reg .b32 m; mov.b32 m, 0xBF80BF80; fma.rn.bf16x2 $0, $2, m, $1; }",  # x - y = -1 y + x
    }
    return instruction(
        f"subtract_{kind}",
        _word,
        {"x": _word, "y": _word},
        text[kind],
        "=r,r,r",
        'PTX ISA, "sub" and "fma", .f16x2 and .bf16x2.',
        pure=True,
    )
