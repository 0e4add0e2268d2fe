"""Loads, stores and atomics by address, with widths that Numba's arrays do not give.

Addresses of global memory are uint64, of shared memory uint32.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions", "atom".
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cuda_backend.ptx.assembly import Lowering, declare, emit, instruction, types

__all__ = [
    "fetch_add",
    "fetch_increment",
    "load_shared_word",
    "shared_address",
    "store_global_16",
    "store_global_float",
    "store_global_word",
    "store_shared_word",
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

store_global_16 = instruction(
    "store_global_16",
    types.void,
    {"address": types.uint64, **dict.fromkeys("abcd", types.uint32)},
    "st.global.v4.b32 [$0], {$1, $2, $3, $4};",
    "l,r,r,r,r",
    'Store four words at a global address that is a multiple of 16.  PTX ISA, "st".',
)

store_global_float = instruction(
    "store_global_float",
    types.void,
    {"address": types.uint64, "value": types.float32},
    "st.global.f32 [$0], $1;",
    "l,f",
    'Store one float32 in global memory.  PTX ISA, "st".',
)

store_global_word = instruction(
    "store_global_word",
    types.void,
    {"address": types.uint64, "value": types.uint32},
    "st.global.b32 [$0], $1;",
    "l,r",
    'Store one 32-bit word in global memory.  PTX ISA, "st".',
)

store_shared_word = instruction(
    "store_shared_word",
    types.void,
    {"address": types.uint32, "value": types.int32},
    "st.shared.b32 [$0], $1;",
    "r,r",
    'Store one 32-bit word in shared memory.  PTX ISA, "st".',
)

load_shared_word = instruction(
    "load_shared_word",
    types.int32,
    {"address": types.uint32},
    "ld.shared.b32 $0, [$1];",
    "=r,r",
    'Load one 32-bit word from shared memory.  PTX ISA, "ld".',
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
