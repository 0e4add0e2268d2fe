"""Functions of the user's for the Hopper kernels: run on stand-ins for numbers, and written down in 32 bits.

A kernel asks them once for every score, so what an integer or a tangent costs is what attention costs.  Every
path through a function is followed, `if` and `and` included.  What cannot be followed (loops over scores,
integer bits, functions of other libraries) is compiled as it is: right all the same, only slower.
"""

from __future__ import annotations

import builtins
import math
from types import CellType, FunctionType
from typing import Any

import numpy as np

from cuda_backend._numba import SIMULATOR, device_function
from cuda_backend.attention.traced_values import (
    LONGEST,
    SCALES,
    Array,
    Trace,
    UndecidedError,
    UntraceableError,
    Value,
)
from cuda_backend.attention.user_device import mask_on_device, score_on_device
from cuda_backend.ptx import registers
from cuda_backend.ptx.assembly import instruction, types
from refimpl.attention.user_functions import Mod

__all__ = ["folds", "is_short", "source_of", "traced_mask", "traced_score"]

PATHS, SHORT = 32, 20
LOG2_E = math.log2(math.e)  # a number: on the device `math` would compute it for every score
NAMES = "b", "h", "i", "j"
Arrays = tuple[tuple[str, int], ...]
float32 = types.float32

reciprocal = instruction(
    "reciprocal",
    types.float32,
    {"x": types.float32},
    "rcp.approx.ftz.f32 $0, $1;",
    "=f,f",
    '1 / x within one unit in the last place.  PTX ISA, "rcp".',
    pure=True,
)


def traced_mask(mod: Mod | None, arrays: Arrays) -> Any:
    """Return ``f(b, h, i, j, aux)`` for kernels, as `mask_on_device` does."""
    source = None if mod is None or SIMULATOR else source_of(mod, arrays, "bool")
    return mask_on_device(mod) if source is None else _compiled(source)


def traced_score(mod: Mod | None, arrays: Arrays, folded: bool = False) -> Any:
    """Return ``f(product, scales, b, h, i, j, x, y, r, c, aux)`` for kernels.

    `scales` are the scale and 1 over it; the score of a product is returned, or `folded` that score over the
    scale.  x + r and y + c are i and j in float, r and c numbers when it is compiled: turning an integer into
    a float costs as much as several products do, adding to a float does not, and where i - j is wanted, what
    differs by rows and columns alone is found once.
    """
    source = None if mod is None or SIMULATOR else source_of(mod, arrays, "folded" if folded else "float")
    if source is not None:
        return _compiled(source)
    given = score_on_device(mod)

    def asked(
        product: Any, scales: Any, b: Any, h: Any, i: Any, j: Any,
        _x: Any, _y: Any, _r: Any, _c: Any, aux: Any,
    ) -> Any:  # fmt: skip
        return given(product * scales[0], b, h, i, j, aux)

    return device_function(asked)


def folds(mod: Mod | None, arrays: Arrays) -> bool:
    """Return whether the scale may go into factors of what is added to a score."""
    return mod is not None and not SIMULATOR and source_of(mod, arrays, "folded") is not None


def is_short(mod: Mod | None, arrays: Arrays) -> bool:
    """Return whether a mask is so little code, without loads, that it may stand there for each score."""
    source = None if mod is None or SIMULATOR else source_of(mod, arrays, "bool")
    return source is not None and "aux[" not in source and source.count("\n") <= SHORT and "if " not in source


def _compiled(source: str) -> Any:
    scope = {
        "int32": types.int32, "uint32": types.uint32, "float32": types.float32,
        "infinity": np.float32(np.inf), "math": math, "exp2": registers.exp2, "reciprocal": reciprocal,
    }  # fmt: skip
    exec(source, scope)
    return device_function(scope["traced"])


def source_of(mod: Mod, arrays: Arrays, result: str) -> str | None:
    """Return the source of function ``traced``, which computes what `mod` does; None if that is unknown.

    Parameters
    ----------
    mod : Mod
        A mask, or a score, as `result` says.
    arrays : tuple
        Dtype and axes of each array of `aux`.
    result : str
        ``"bool"`` for a mask, ``"float"`` for a score, ``"folded"`` for a score over the scale, if that
        saves a product: it goes into the factors of what is added to the score.

    Examples
    --------
    >>> from refimpl.attention.user_functions import as_mod
    >>> print(source_of(as_mod("mask_mod", lambda b, h, i, j: (j <= i) & (i - j < 8)), (), "bool"))
    def traced(b, h, i, j, aux):
        t1 = j <= i
        t2 = int32(i - j)
        t3 = t2 < (8)
        t4 = bool(t1 & t3)
        return t4
    """
    leading = ("score",) if result != "bool" else ()
    lines: list[str] = []
    left, gains = PATHS, False

    def follow(decisions: tuple[bool, ...], indent: str) -> None:
        """Write what happens after the last of some decisions."""
        nonlocal left, gains
        left -= 1
        if left < 0:
            raise UntraceableError("too many paths")
        trace = Trace(decisions)
        given: list[Any] = [_score(trace) for _ in leading]
        given += [Value(trace, name, "int", 0, LONGEST) for name in NAMES]
        if mod.takes_aux:
            given.append(tuple(Array(trace, f"aux[{n}]", *kind) for n, kind in enumerate(arrays)))
        try:
            found = trace.of(_with_stand_ins(mod.function, trace)(*given))
        except UndecidedError as question:
            condition = _truth(question.value)
            lines.extend(indent + line for line in trace.lines[max(trace.fresh, 1) :])
            lines.append(f"{indent}if {condition}:")
            follow((*decisions, True), indent + "    ")
            lines.append(f"{indent}else:")
            follow((*decisions, False), indent + "    ")
            return
        if result == "float":
            found = found.as_float()
        elif result == "folded":
            gains = gains or _gains(found.as_float(), trace)
            found = _folded(found.as_float(), trace)
        elif found.kind != "bool":
            raise UntraceableError("a mask that is no truth value")
        lines.extend(indent + line for line in trace.lines[max(trace.fresh, 1) :])
        lines.append(f"{indent}return {found.code}")

    try:
        follow((), "    ")
    except Exception:  # whatever is wrong with the function, Numba says it with the line
        return None
    if result == "folded" and not gains:
        return None
    names = ", ".join(NAMES)
    if not leading:
        return "\n".join([f"def traced({names}, aux):", *lines])
    head = f"def traced(product, scales, {names}, x, y, r, c, aux):"
    return "\n".join([head, "    scale, inverse = scales", "    score = float32(product * scale)", *lines])


def _score(trace: Trace) -> Value:
    """Return the score, of which a trace gets to know what it is, and its indices in float."""
    for names, what in (("score product", "score"), ("i x r", "i"), ("j y c", "j")):
        trace.needs |= {name: frozenset((what,)) for name in names.split()}
    trace.needs |= {name: frozenset((name,)) for name in SCALES}
    trace.floats["i"] = "x", 1, 0
    trace.floats["j"] = "y", 0, 1
    trace.products["score"] = Value(trace, "scale", "float"), Value(trace, "product", "float"), None
    return Value(trace, "score", "float")


def _folded(value: Any, trace: Trace) -> Any:
    """Return a score over the scale, of the product itself, if it is a sum with the score."""
    if value.code == "score":
        return Value(trace, "product", "float")
    if "score" not in trace.depends(value.code):
        return value * Value(trace, "inverse", "float")
    if value.code not in trace.sums:
        raise UntraceableError("more than a sum with the score")
    sign, x, y = trace.sums[value.code]
    x, y = _folded(x, trace), _folded(y, trace)
    return x + y if sign == "+" else x - y


def _gains(value: Any, trace: Trace) -> bool:
    """Return whether a term of a sum is a product whose factor the scale may go into."""
    if "score" not in trace.depends(value.code):
        return value.code in trace.products
    return value.code in trace.sums and any(_gains(x, trace) for x in trace.sums[value.code][1:])


def _truth(value: Value) -> str:
    return value.code if value.kind == "bool" else f"{value.code} != 0"


def _with_stand_ins(function: Any, trace: Trace) -> Any:
    """Return a copy of a function that finds stand-ins for what takes only numbers."""

    def value(item: Any) -> Any:
        if item is math or item is np:
            return _Module(trace)
        return (
            _with_stand_ins(item, trace) if isinstance(item, FunctionType) and item is not function else item
        )

    cells = tuple(CellType(value(cell.cell_contents)) for cell in function.__closure__ or ())
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    scope = {name: value(function.__globals__[name]) for name in names}
    scope["__builtins__"] = {**vars(builtins), "min": _chosen("<"), "max": _chosen(">"), "float": _as_float}
    return FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)


def _as_float(number: Any) -> Any:
    return number.as_float() if isinstance(number, Value) else float(number)


def _chosen(sign: str) -> Any:
    """Return min or max of two numbers."""

    def chosen(x: Any, y: Any) -> Any:
        if not isinstance(x, Value) and not isinstance(y, Value):
            return min(x, y) if sign == "<" else max(x, y)
        trace: Trace = (x if isinstance(x, Value) else y).trace
        x, y = trace.of(x), trace.of(y)
        if "float" in (x.kind, y.kind):
            x, y = x.as_float(), y.as_float()
            return trace.named(f"{y.code} if {y.code} {sign} {x.code} else {x.code}", "float")
        x, y = x.as_int(), y.as_int()
        pick = min if sign == "<" else max
        code = f"{y.code} if {y.code} {sign} {x.code} else {x.code}"
        return trace.integer(code, pick(x.low, y.low), pick(x.high, y.high))

    return chosen


class _Module:
    """What stands for `math` and `numpy`."""

    pi, e, inf = math.pi, math.e, math.inf

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def tanh(self, x: Any) -> Any:
        """Return the tangent, 1 - 2 / (exp(2 x) + 1), within 2**-22: as exact as a score."""
        trace: Trace = self._trace
        half: Any = trace.of(x).as_float()
        grown = half * (2.0 * LOG2_E)
        r = trace.named(f"reciprocal(float32(exp2({grown.code}) + float32(1.0)))", "float")
        made = trace.named(f"float32(float32(1.0) - float32(2.0) * {r.code})", "float")
        trace.products[made.code] = trace.of(-2.0), r, trace.of(1.0)
        return made

    def exp(self, x: Any) -> Any:
        """Return e**x, with a relative error that grows with x as that of x * log2(e) in float32."""
        given: Any = self._trace.of(x).as_float()
        return self._trace.named(f"exp2({(given * LOG2_E).code})", "float")

    def float32(self, x: Any) -> Any:
        """Return the number in float32."""
        return self._trace.of(x).as_float()
