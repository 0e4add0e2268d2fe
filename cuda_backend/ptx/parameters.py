"""A block of bytes among a kernel's parameters, for which Numba has no type.

The copy engine wants its descriptors in constant or in global memory.  Parameters are constant memory, and
travel with the launch itself: nothing is copied before it, and a captured graph keeps its own.

Numba passes scalars, and pointers to memory; LLVM's attribute ``byval`` says that what a pointer parameter
points to is itself the parameter.  `block_address` sets it on the first parameter of its kernel.

Source: PTX ISA 8.7, "State Spaces: Kernel Function Parameters", "cvta"; LLVM Language Reference, "Parameter
Attributes".
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cuda_backend.ptx.assembly import Lowering, declare, emit, types

__all__ = ["block", "block_address"]

ALIGNMENT = 64  # what descriptors need


def block(size: int) -> Any:
    """Return the type of a kernel's first parameter: `size` bytes, a multiple of 8, aligned to 64."""
    return types.CPointer(types.UniTuple(types.uint64, size // 8))


def _lower_block_address(kind: Any) -> Lowering:
    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        kernel = builder.function
        first = kernel.args[1]  # before it stands Numba's pointer to a result, which kernels lose
        if first.type != values[0].type:
            raise TypeError("block_address is to be called in a kernel, for its first parameter")
        # With the blank llvmlite leaves out the pointee's type, which NVVM's older LLVM does not know.
        set.add(first.attributes, "byval ")
        first.attributes.align = ALIGNMENT
        # By name: taken from the pointer, the address would be that of a copy in local memory.
        text = f"{{ .reg .b64 a; mov.b64 a, {kernel.name}_param_0; cvta.param.u64 $0, a; }}"
        return emit(builder, ir.IntType(64), [], text, "=l", side_effect=False)

    return types.uint64(kind), codegen


block_address = declare(
    "block_address",
    ("first_parameter",),
    'The generic address of the block of a kernel.  PTX ISA, "cvta", .param.',
    _lower_block_address,
)
