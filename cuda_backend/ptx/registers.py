"""What happens between registers: their number for a thread, rounding, exponentials, exchange within a warp.

Source: PTX ISA 8.7, "Miscellaneous Instructions: setmaxnreg", "Data Movement and Conversion Instructions",
"Floating Point Instructions", "Integer Arithmetic Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend.ptx.assembly import Intrinsic, Lowering, declare, instruction, passed, types

__all__ = [
    "any_lane",
    "exchange_float",
    "exchange_word",
    "exp2",
    "fresh",
    "from_lane",
    "fused_multiply_add",
    "give_registers",
    "largest_pair",
    "largest_word",
    "least_pair",
    "log2",
    "low_bytes",
    "maximum",
    "maximum_halves",
    "pack_pair",
    "pin",
    "quotient",
    "select_float",
    "select_int",
    "select_word",
    "successor",
    "take_registers",
    "thread",
    "uniform",
    "unpack_high",
    "unpack_low",
    "word_below",
]

_float, _int, _word = types.float32, types.int32, types.uint32


def give_registers(count: int) -> Intrinsic:
    """Return the instruction that lowers a warpgroup to `count` registers a thread, from 24 by 8s."""
    text = f"setmaxnreg.dec.sync.aligned.u32 {count};"
    return instruction("give_registers", types.void, {}, text, "", 'PTX ISA, "setmaxnreg", .dec.')


def take_registers(count: int) -> Intrinsic:
    """Return the one that raises a warpgroup to `count`; it waits until others have given theirs."""
    text = f"setmaxnreg.inc.sync.aligned.u32 {count};"
    return instruction("take_registers", types.void, {}, text, "", 'PTX ISA, "setmaxnreg", .inc.')


def pin(count: int) -> Intrinsic:
    """Return an empty instruction at which the first `count` numbers of a local array have their values."""

    def lower(array: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            passed(context, builder, signature.args[0], values[0], count, "")
            return context.get_dummy_value()

        return types.void(array), codegen

    return declare("pin", ("array",), "What was computed before stays before.", lower)


def pack_pair(kind: str) -> Intrinsic:
    """Return what rounds two float32 to `kind`, "f16" or "bf16", and puts the first in the low half."""
    return instruction(
        f"pack_{kind}",
        _word,
        {"low": _float, "high": _float},
        f"cvt.rn.{kind}x2.f32 $0, $2, $1;",
        "=r,f,f",
        'PTX ISA, "cvt": its first source goes to the upper half.',
        pure=True,
    )


def unpack_low(kind: str) -> Intrinsic:
    """Return what widens the "f16" or "bf16" in the low half of a word to float32, exactly."""
    widening = {
        "f16": "{ .reg .b16 low; cvt.u16.u32 low, $1; cvt.f32.f16 $0, low; }",
        "bf16": "{ .reg .b32 high; shl.b32 high, $1, 16; mov.b32 $0, high; }",
    }
    doc = 'PTX ISA, "cvt"; a bf16 is the upper half of its float32.'
    return instruction(f"unpack_{kind}", _float, {"word": _word}, widening[kind], "=f,r", doc, pure=True)


def unpack_high(kind: str) -> Intrinsic:
    """Return the same for the upper half."""
    widening = {
        "f16": "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, high; }",
        "bf16": "and.b32 $0, $1, 0xffff0000;",
    }
    doc = 'PTX ISA, "cvt"; a bf16 is the upper half of its float32.'
    return instruction(f"unpack_high_{kind}", _float, {"word": _word}, widening[kind], "=f,r", doc, pure=True)


exp2 = instruction(
    "exp2",
    _float,
    {"x": _float},
    "ex2.approx.ftz.f32 $0, $1;",
    "=f,f",
    '2**x within 2**-22 of it; -inf gives 0.  PTX ISA, "ex2".',
    pure=True,
)

log2 = instruction(
    "log2",
    _float,
    {"x": _float},
    "lg2.approx.ftz.f32 $0, $1;",
    "=f,f",
    'Logarithm to base 2; 0 gives -inf.  PTX ISA, "lg2".',
    pure=True,
)

maximum = instruction(
    "maximum",
    _float,
    {"x": _float, "y": _float},
    "max.f32 $0, $1, $2;",
    "=f,f,f",
    'The larger of two float32; NaN loses.  PTX ISA, "max".',
    pure=True,
)

maximum_halves = instruction(
    "maximum_halves",
    _word,
    {"x": _word, "y": _word},
    "max.u16x2 $0, $1, $2;",
    "=r,r,r",
    'The larger of the low and of the high halves, as integers.  PTX ISA, "max".',
    pure=True,
)


def _of_pairs(name: str, mnemonic: str, doc: str) -> Callable[[str], Intrinsic]:
    def made(kind: str) -> Intrinsic:
        text = f"{mnemonic}.NaN.{kind}x2 $0, $1, $2;"
        return instruction(f"{name}_{kind}", _word, {"x": _word, "y": _word}, text, "=r,r,r", doc, pure=True)

    return made


largest_pair = _of_pairs(
    "largest_pair", "max", 'Of "f16" or "bf16" in both halves; NaN wins.  PTX ISA, "max".'
)
least_pair = _of_pairs("least_pair", "min", 'The least of them; NaN wins, too.  PTX ISA, "min".')

largest_word = instruction(
    "largest_word",
    _word,
    {"word": _word},
    "redux.sync.max.u32 $0, $1, 0xffffffff;",
    "=r,r",
    'The largest word of the warp.  PTX ISA, "redux.sync".',
)

low_bytes = instruction(
    "low_bytes",
    _word,
    {"a": _word, "b": _word, "c": _word, "d": _word},
    "{ .reg .b32 x, y; prmt.b32 x, $1, $2, 0x0040; prmt.b32 y, $3, $4, 0x0040; prmt.b32 $0, x, y, 0x5410; }",
    "=r,r,r,r,r",
    'The low bytes of four words as one.  PTX ISA, "prmt".',
    pure=True,
)

fused_multiply_add = instruction(
    "fused_multiply_add",
    _float,
    {"x": _float, "y": _float, "z": _float},
    "fma.rn.ftz.f32 $0, $1, $2, $3;",
    "=f,f,f,f",
    'x * y + z, rounded once.  PTX ISA, "fma".',
    pure=True,
)

quotient = instruction(
    "quotient",
    _int,
    {"x": _int, "y": _int},
    "div.u32 $0, $1, $2;",
    "=r,r,r",
    'x // y of two integers that are not negative.  PTX ISA, "div".',
    pure=True,
)


def _select(name: str, kind: Any, letter: str) -> Intrinsic:
    typed = "f32" if letter == "f" else "b32"
    return instruction(
        name,
        kind,
        {"condition": _int, "then": kind, "otherwise": kind},
        f"{{ .reg .pred chosen; setp.ne.s32 chosen, $1, 0; selp.{typed} $0, $2, $3, chosen; }}",
        f"={letter},r,{letter},{letter}",
        '`then` where `condition` is not 0.  PTX ISA, "selp".',
        pure=True,
    )


select_float = _select("select_float", _float, "f")
select_int, select_word = _select("select_int", _int, "r"), _select("select_word", _word, "r")

fresh = instruction(
    "fresh",
    _int,
    {"x": _int},
    "mov.b32 $0, $1;",
    "=r,r",
    'x, here and now: what is made of it is not kept from one turn of a loop to the next.  PTX ISA, "mov".',
)

thread = instruction(
    "thread",
    _int,
    {},
    "mov.u32 $0, %tid.x;",
    "=r",
    'The number of the thread, asked again rather than kept.  PTX ISA, "%tid".',
)

successor = instruction(
    "successor",
    _int,
    {"x": _int},
    "add.s32 $0, $1, 1;",
    "=r,r",
    'x + 1, of which the compiler knows nothing: it does not unroll a loop that counts so.  PTX ISA, "add".',
    pure=True,
)

exchange_float = instruction(
    "exchange_float",
    _float,
    {"value": _float, "lane_mask": _int},
    "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;",
    "=f,f,r",
    'The value of the lane whose index differs by `lane_mask`.  PTX ISA, "shfl.sync", .bfly.',
)

exchange_word = instruction(
    "exchange_word",
    _word,
    {"value": _word, "lane_mask": _int},
    "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;",
    "=r,r,r",
    'The same for a 32-bit word.  PTX ISA, "shfl.sync", .bfly.',
)

from_lane = instruction(
    "from_lane",
    _word,
    {"value": _word, "lane": _int},
    "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
    "=r,r,r",
    'The word of lane `lane`.  PTX ISA, "shfl.sync", .idx.',
)

word_below = instruction(
    "word_below",
    _int,
    {"value": _int, "distance": _int},
    "shfl.sync.up.b32 $0, $1, $2, 0, 0xffffffff;",
    "=r,r,r",
    'The value of the lane `distance` below; in the lowest lanes, their own.  PTX ISA, "shfl.sync", .up.',
)

any_lane = instruction(
    "any_lane",
    _int,
    {"value": _int},
    "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.s32 $0, 1, 0, q; }",
    "=r,r",
    '1 if the value of any lane of the warp is not 0, else 0.  PTX ISA, "vote.sync", .any.',
)

uniform = instruction(
    "uniform",
    _int,
    {"value": _int},
    "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;",
    "=r,r",
    "Lane 0's value, which the compiler then knows to be the warp's.  PTX ISA, \"shfl.sync\", .idx.",
)
