"""Loads, stores and atomics by address, with widths that Numba's arrays do not give.

Addresses of global memory are uint64, of shared memory uint32.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions", "atom".
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cuda_backend.ptx.assembly import LLVM_TYPES, Intrinsic, Lowering, declare, emit, instruction, types

__all__ = [
    "add_global_16",
    "fetch_add",
    "fetch_increment",
    "load_8",
    "load_16",
    "load_byte",
    "load_float",
    "load_half",
    "load_shared_8",
    "load_shared_16",
    "load_shared_float",
    "load_shared_word",
    "load_warp_word",
    "load_word",
    "load_word_fresh",
    "prefetch",
    "reduce_add",
    "shared_address",
    "store_global_8",
    "store_global_16",
    "store_global_16_where",
    "store_global_byte",
    "store_global_float",
    "store_global_half",
    "store_global_word",
    "store_shared_8",
    "store_shared_16",
    "store_shared_byte",
    "store_shared_float",
    "store_shared_half",
    "store_shared_word",
    "store_shared_words",
    "words_loader",
]


def _lower_shared_address(array: Any) -> Lowering:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        address = builder.ptrtoint(data, ir.IntType(64))
        text = "{ .reg .u64 a; cvta.to.shared.u64 a, $1; cvt.u32.u64 $0, a; }"
        return emit(builder, ir.IntType(32), [address], text, "=r,l", side_effect=False)

    return types.uint32(array), codegen


shared_address = declare(
    "shared_address",
    ("array",),
    'The 32-bit shared address of a shared array\'s first byte.  PTX ISA, "cvta".',
    _lower_shared_address,
)

_SPACES = {"global": (types.uint64, "l"), "shared": (types.uint32, "r")}  # of addresses: type, constraint
_VECTORS = {1: "", 2: ".v2", 4: ".v4"}


def _letter(kind: Any) -> str:
    return "f" if kind is types.float32 else "r"


def _load(name: str, space: str, typed: str, kind: Any, what: str, *, order: str = "") -> Intrinsic:
    """Return the load of one number; `typed` is what the instruction calls it, `kind` what kernels get."""
    address, place = _SPACES[space]
    text = f"ld{order}.{space}.{typed} $0, [$1];"
    doc = f'Load {what} from {space} memory.  PTX ISA, "ld"{order and ", .relaxed"}.'
    return instruction(name, kind, {"address": address}, text, f"={_letter(kind)},{place}", doc)


def _store(name: str, space: str, typed: str, kind: Any, what: str, count: int = 1) -> Intrinsic:
    """Return the store of one number, or of two or four side by side."""
    address, place = _SPACES[space]
    values = "abcd"[:count] if count > 1 else ["value"]
    numbers = ", ".join(f"${i + 1}" for i in range(count))
    text = f"st.{space}{_VECTORS[count]}.{typed} [$0], {f'{{{numbers}}}' if count > 1 else numbers};"
    constraints = ",".join([place] + [_letter(kind)] * count)
    operands = {"address": address, **dict.fromkeys(values, kind)}
    doc = f'Store {what} in {space} memory.  PTX ISA, "st".'
    return instruction(name, types.void, operands, text, constraints, doc)


def _store_half(name: str, space: str) -> Intrinsic:
    """Return the store of the low half of a word."""
    address, place = _SPACES[space]
    text = f"{{ .reg .b16 low; cvt.u16.u32 low, $1; st.{space}.b16 [$0], low; }}"
    doc = f'Store the low half of a word in {space} memory.  PTX ISA, "st".'
    operands = {"address": address, "value": types.uint32}
    return instruction(name, types.void, operands, text, f"{place},r", doc)


_float, _int, _word = types.float32, types.int32, types.uint32

load_float = _load("load_float", "global", "f32", _float, "one float32")
load_word = _load("load_word", "global", "b32", _int, "one 32-bit word")
load_half = _load("load_half", "global", "u16", _word, "16 bits, into the low half of a word,")
load_byte = _load("load_byte", "global", "s8", _int, "one signed byte")
load_shared_word = _load("load_shared_word", "shared", "b32", _int, "one 32-bit word")
load_shared_float = _load("load_shared_float", "shared", "f32", _float, "one float32")
load_word_fresh = _load(
    "load_word_fresh", "global", "b32", _int, "what other blocks have written, past the L1 cache,",
    order=".relaxed.gpu",
)  # fmt: skip

store_global_float = _store("store_global_float", "global", "f32", _float, "one float32")
store_global_word = _store("store_global_word", "global", "b32", _word, "one 32-bit word")
store_global_byte = _store("store_global_byte", "global", "b8", _word, "the low byte of a word")
store_global_half = _store_half("store_global_half", "global")
store_global_8 = _store("store_global_8", "global", "b32", _word, "two words, at a multiple of 8,", 2)
store_global_16 = _store("store_global_16", "global", "b32", _word, "four words, at a multiple of 16,", 4)
store_shared_float = _store("store_shared_float", "shared", "f32", _float, "one float32")
store_shared_word = _store("store_shared_word", "shared", "b32", _int, "one 32-bit word")
store_shared_byte = _store("store_shared_byte", "shared", "b8", _word, "the low byte of a word")
store_shared_half = _store_half("store_shared_half", "shared")
store_shared_8 = _store("store_shared_8", "shared", "b32", _word, "two words, at a multiple of 8,", 2)
store_shared_16 = _store("store_shared_16", "shared", "f32", _float, "four float32, at a multiple of 16,", 4)
store_shared_words = _store(
    "store_shared_words", "shared", "b32", _word, "four words, at a multiple of 16,", 4
)

store_global_16_where = instruction(
    "store_global_16_where",
    types.void,
    {"condition": types.int32, "address": types.uint64, **dict.fromkeys("abcd", types.uint32)},
    "{ .reg .pred chosen; setp.ne.s32 chosen, $0, 0; @chosen st.global.v4.b32 [$1], {$2, $3, $4, $5}; }",
    "r,l,r,r,r,r",
    'As `store_global_16` where `condition` is not 0.  PTX ISA, "st".',
)


def words_loader(name: str, count: int, text: str, constraint: str, doc: str) -> Intrinsic:
    """Return an instruction that loads `count` words at once into a local array, from element `first` on.

    The words are operands ``$0`` on of `text`, the address is the next: "r" in shared, "l" in global memory.
    """

    def lower(words: Any, _first: Any, _address: Any) -> Lowering:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kind, array, start = signature.args[0], values[0], values[1]
            letter, constraints = "r", f",{constraint},~{{memory}}"
            word = LLVM_TYPES[kind.dtype]
            if kind.dtype == types.float32:
                letter = "f"
            result = ir.LiteralStructType([word] * count)
            constraints = ",".join([f"={letter}"] * count) + constraints
            found = emit(builder, result, values[2:], text, constraints)
            data = context.make_array(kind)(context, builder, array).data
            for i in range(count):
                place = builder.gep(data, [builder.add(start, ir.Constant(ir.IntType(32), i))])
                builder.store(builder.extract_value(found, i), place)
            return context.get_dummy_value()

        return types.void(words, types.int32, types.uint32 if constraint == "r" else types.uint64), codegen

    return declare(name, ("words", "first", "address"), doc, lower)


def _load_words(name: str, count: int, space: str, constraint: str) -> Intrinsic:
    """Return the load of two or four words that lie side by side."""
    places = ", ".join(f"${i}" for i in range(count))
    text = f"ld.{space}.v{count}.b32 {{{places}}}, [${count}];"
    return words_loader(name, count, text, constraint, 'PTX ISA, "ld", .v2 and .v4.')


load_8 = _load_words("load_8", 2, "global", "l")
load_16 = _load_words("load_16", 4, "global", "l")
load_shared_8 = _load_words("load_shared_8", 2, "shared", "r")
load_shared_16 = _load_words("load_shared_16", 4, "shared", "r")

prefetch = instruction(
    "prefetch",
    types.void,
    {"address": types.uint64},
    "prefetch.global.L2 [$0];",
    "l",
    "Ask for what lies there in the L2 cache; what is written to it later is seen all the same.  PTX ISA, "
    '"prefetch".',
)

load_warp_word = instruction(
    "load_warp_word",
    types.int32,
    {"address": types.uint32, "lane": types.int32},
    "{ .reg .pred first; .reg .b32 word; setp.eq.s32 first, $2, 0; mov.b32 word, 0; "
    "@first ld.shared.b32 word, [$1]; shfl.sync.idx.b32 $0, word, 0, 31, 0xffffffff; }",
    "=r,r,r",
    "Load one word of shared memory for a whole warp.  Lane 0 alone reads, who alone says later that the "
    'place may be written again (`barrier.arrive_warp`).  PTX ISA, "ld", "shfl.sync".',
)

reduce_add = instruction(
    "reduce_add",
    types.void,
    {"address": types.uint64, "value": types.int32},
    "red.global.add.s32 [$0], $1;",
    "l,r",
    'Add to a word of global memory.  PTX ISA, "red", .add.',
)

add_global_16 = instruction(
    "add_global_16",
    types.void,
    {"address": types.uint64, **dict.fromkeys("abcd", types.float32)},
    "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};",
    "l,f,f,f,f",
    'Add four float32 to global memory, at a multiple of 16.  PTX ISA, "red", .v4.',
)

fetch_add = instruction(
    "fetch_add",
    types.int32,
    {"address": types.uint64, "value": types.int32},
    "atom.global.add.u32 $0, [$1], $2;",
    "=r,l,r",
    'Add to a word of global memory; its old value.  PTX ISA, "atom", .add.',
)

fetch_increment = instruction(
    "fetch_increment",
    types.int32,
    {"address": types.uint64, "bound": types.int32},
    "atom.global.inc.u32 $0, [$1], $2;",
    "=r,l,r",
    'Increment a word of global memory, from `bound` to 0; its old value.  PTX ISA, "atom", .inc.',
)
