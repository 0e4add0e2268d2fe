"""From a line of PTX to a Numba intrinsic.

An intrinsic is declared by its name, its parameters and a function from the parameters' types to a
signature and the code behind it, which is one ``llvmlite.ir.InlineAsm``. Registers that an instruction
reads *and* writes (wgmma's accumulators) are held by the kernel in a ``cuda.local.array`` of constant size:
`passed` loads all of it, passes it through the asm with tied operands (constraint ``"0"``: the register of
output 0), and stores it back. LLVM's scalar replacement then removes the array, so it never reaches memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir

from cuda_backend import _numba
from refimpl.errors import BackendUnavailableError

__all__ = [
    "Intrinsic",
    "Lowering",
    "declare",
    "element_pointers",
    "emit",
    "instruction",
    "passed",
    "passed_at",
    "types",
]

types: Any = _numba.types

Intrinsic = Callable[..., Any]
Lowering = tuple[Any, Callable[..., Any]]  # signature and code

LLVM_TYPES = {
    types.void: ir.VoidType(),
    types.float32: ir.FloatType(),
    types.int32: ir.IntType(32),
    types.uint32: ir.IntType(32),
    types.uint64: ir.IntType(64),
}


def declare(name: str, parameters: Sequence[str], doc: str, lower: Callable[..., Lowering]) -> Intrinsic:
    """Return the intrinsic ``name(*parameters)``; `lower` gets the types of its arguments.

    In the simulator it imports, and raises BackendUnavailableError when called.
    """
    if _numba.SIMULATOR:

        def unavailable(*_: Any) -> Any:
            raise BackendUnavailableError(f"{name}: the simulator has no inline PTX; it needs a Hopper GPU")

        return unavailable

    def definition(_typing_context: Any, *kinds: Any) -> Lowering:
        return lower(*kinds)

    definition.__name__ = definition.__qualname__ = name
    definition.__doc__ = doc
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ("typing_context", *parameters)
    signature = inspect.Signature([inspect.Parameter(each, positional) for each in names])
    definition.__signature__ = signature  # type: ignore[attr-defined]
    made: Intrinsic = _numba.cuda.extending.intrinsic(definition)
    return made


def instruction(
    name: str,
    result: Any,
    arguments: Mapping[str, Any],
    text: str,
    constraints: str,
    doc: str,
    *,
    pure: bool = False,
) -> Intrinsic:
    """Return an instruction on scalars as an intrinsic.

    Parameters
    ----------
    name : str
        What kernels call it.
    result : Numba type
        ``types.void`` if there is none; otherwise operand ``$0``.
    arguments : mapping of str to Numba type
        Names and types, in the order of the operands.
    text, constraints : str
        As LLVM's inline assembly wants them.
    doc : str
        What it does, and where the PTX ISA says so.
    pure : bool
        It only computes: the compiler may move or drop it.  Others keep their order, and clobber memory.
    """
    if not pure:
        constraints = ",".join(filter(None, [constraints, "~{memory}"]))

    def codegen(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        value = emit(builder, LLVM_TYPES[result], values, text, constraints, side_effect=not pure)
        return context.get_dummy_value() if result is types.void else value

    return declare(name, tuple(arguments), doc, lambda *_: (result(*arguments.values()), codegen))


def emit(
    builder: Any, result: Any, values: Sequence[Any], text: str, constraints: str, *, side_effect: bool = True
) -> Any:
    """Insert one inline-asm call and return its value, a struct if `result` is one."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect), list(values))


def element_pointers(context: Any, builder: Any, kind: Any, array: Any, count: int) -> list[Any]:
    """Return pointers to the first `count` elements of a local array, by constant offsets."""
    data = context.make_array(kind)(context, builder, array).data
    return [builder.gep(data, [ir.Constant(ir.IntType(32), i)]) for i in range(count)]


def passed(
    context: Any,
    builder: Any,
    kind: Any,
    array: Any,
    count: int,
    text: str,
    others: Sequence[Any] = (),
    other_constraints: Sequence[str] = (),
    *,
    read: bool = True,
) -> None:
    """Pass the float32 or int32 registers of a local array through `text`, with read-only operands `others`.

    Operands: ``$0`` to ``$(count-1)`` are the array.  `others` begin at ``$(2*count)``, or at ``$count`` if
    the array is only written (`read` False).
    """
    pointers = element_pointers(context, builder, kind, array, count)
    passed_at(builder, kind.dtype, pointers, text, others, other_constraints, read=read)


def passed_at(
    builder: Any,
    dtype: Any,
    pointers: Sequence[Any],
    text: str,
    others: Sequence[Any] = (),
    other_constraints: Sequence[str] = (),
    *,
    read: bool = True,
) -> None:
    """Do as `passed` with registers of several arrays, by their `element_pointers`."""
    inputs = [builder.load(pointer) for pointer in pointers] if read else []
    tied = [str(i) for i in range(len(inputs))]
    output = "=f" if dtype == types.float32 else "=r"
    constraints = ",".join([output] * len(pointers) + tied + list(other_constraints) + ["~{memory}"])
    result = ir.LiteralStructType([LLVM_TYPES[dtype]] * len(pointers))
    out = emit(builder, result, [*inputs, *others], text, constraints)
    for i, pointer in enumerate(pointers):
        builder.store(builder.extract_value(out, i), pointer)
