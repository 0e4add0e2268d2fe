"""Values that stand for numbers while a function of the user's is traced: each knows its code and its range.

Numba computes with integers in 64 bits, and in double precision where one meets a float.  Where the range of
an integer fits 32 bits, so does the code here; floats are float32, as they are in a kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LONGEST", "Array", "Trace", "UndecidedError", "UntraceableError", "Value"]

LONGEST = 1 << 24  # of an axis: float32 still counts so far
_INT32 = 1 << 31
SCALES = frozenset(("scale", "inverse"))
_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


class UntraceableError(Exception):
    """The function asks for what is not written here: Numba is to compile it as it is."""


class UndecidedError(Exception):
    """The function asks whether a value is true: what follows depends on it."""

    def __init__(self, value: Value) -> None:
        self.value = value


class Trace:
    """Lines of code, made while a function runs on values.

    `decisions` are the answers to the questions whether a value is true, in their order.
    """

    def __init__(self, decisions: tuple[bool, ...]) -> None:
        self.decisions, self.asked, self.lines = decisions, 0, [""]
        # Of integers that there are in float32, too, exactly: what `_in_float` makes code of.
        self.floats: dict[str, tuple[str, int, int]] = {}
        self.needs: dict[str, frozenset[str]] = {}  # of a name: what, of a score, it depends on
        # Of floats: a factor that all scores of a head have alike, the other, what is added, also alike.
        self.products: dict[str, tuple[Value, Value, Value | None]] = {}
        self.sums: dict[str, tuple[str, Value, Value]] = {}  # of floats: the sign and both terms
        self.fresh = 0  # lines that belong before the last decision

    def named(self, code: str, kind: str, low: int = 0, high: int = 0) -> Value:
        """Return the value of an expression, which gets a name."""
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {code}")
        self.needs[name] = self.depends(code)
        return Value(self, name, kind, low, high)

    def depends(self, code: str) -> frozenset[str]:
        """Return what, of a score, a piece of code depends on."""
        return frozenset().union(*(self.needs.get(word, ()) for word in re.findall(r"[a-z_]\w*", code)))

    def integer(self, code: str, low: int, high: int) -> Value:
        """Return an integer of a range, in 32 bits if it fits."""
        if max(abs(low), abs(high)) >= 1 << 62:
            raise UntraceableError("more than 64 bits")
        return self.named(f"int32({code})" if _narrow(low, high) else code, "int", low, high)

    def of(self, number: Any) -> Value:
        """Return a number as a value."""
        if isinstance(number, Value):
            return number
        if isinstance(number, bool | np.bool_):
            return Value(self, str(bool(number)), "bool", 0, 1)
        if isinstance(number, int | np.integer):
            return Value(self, f"({int(number)})", "int", int(number), int(number))
        if isinstance(number, float | np.floating) and math.isfinite(number):
            return Value(self, f"float32({float(number)!r})", "float", 0, 0)
        if isinstance(number, float) and math.isinf(number):
            return Value(self, f"({'-' * (number < 0)}infinity)", "float", 0, 0)
        raise UntraceableError(f"a value of {type(number).__name__}")

    def choose(self, value: Value) -> bool:
        """Return whether `value` is true on this path."""
        if self.asked == len(self.decisions):
            raise UndecidedError(value)
        self.asked += 1
        if self.asked == len(self.decisions):
            self.fresh = len(self.lines)
        return self.decisions[self.asked - 1]


def _narrow(low: int, high: int) -> bool:
    return low >= -_INT32 and high < _INT32


def _in_float(base: str, rows: int, columns: int) -> str:
    """Return the code of an integer in float32: `base`, and so many times `r` and `c`, all of it exact.

    Row and column within a tile are numbers when it is compiled: so is what is made of both, which may be
    the same for several scores.
    """
    terms = [f"float32({n}) * {name}" for n, name in ((rows, "r"), (columns, "c")) if n]
    return f"float32({base} + float32({' + '.join(terms)}))" if terms else base


class Value:
    """A number: "int" with a range, "bool", or "float" for float32."""

    __array_ufunc__ = None  # NumPy's scalars leave operators to this class
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: Trace, code: str, kind: str, low: int = 0, high: int = 0) -> None:
        self.trace, self.code, self.kind, self.low, self.high = trace, code, kind, low, high

    def as_int(self) -> Value:
        """Return a truth value as 0 or 1; an integer as it is."""
        if self.kind == "float":
            raise UntraceableError("a float where an integer is wanted")
        return self if self.kind == "int" else self.trace.named(f"int32({self.code})", "int", 0, 1)

    def as_float(self) -> Value:
        """Return the number in float32, if that is exact."""
        if self.kind == "float":
            return self
        number = self.as_int()
        if max(abs(number.low), abs(number.high)) > LONGEST:
            raise UntraceableError("an integer that float32 cannot hold")
        if number.code in self.trace.floats:
            return self.trace.named(_in_float(*self.trace.floats[number.code]), "float")
        return self.trace.named(f"float32({number.code})", "float")

    def index(self) -> str:
        """Return the code of an index; unsigned where it is not negative, so that nobody asks."""
        number = self.as_int()
        fits = number.low >= 0 and _narrow(number.low, number.high)
        return f"uint32({number.code})" if fits else number.code

    def __bool__(self) -> bool:
        return self.trace.choose(self)

    def __abs__(self) -> Value:
        if self.kind == "float":
            return self.trace.named(f"float32(abs({self.code}))", "float")
        number = self.as_int()
        ends = abs(number.low), abs(number.high)
        least = 0 if number.low <= 0 <= number.high else min(ends)
        made = self.trace.integer(f"abs({number.code})", least, max(ends))
        if number.code in self.trace.floats:
            self.trace.floats[made.code] = f"float32(abs({_in_float(*self.trace.floats[number.code])}))", 0, 0
        return made

    def __neg__(self) -> Value:
        return _arithmetic("-", lambda a, b: a - b)(self.trace.of(0), self)

    def __pos__(self) -> Value:
        return self

    def __invert__(self) -> Value:
        if self.kind != "bool":
            raise UntraceableError("~ of a number")
        return self.trace.named(f"not {self.code}", "bool", 0, 1)


class Array(NamedTuple):
    """One of the arrays of `aux`, some of whose axes are indexed already."""

    trace: Trace
    code: str
    dtype: str
    ndim: int
    indices: tuple[str, ...] = ()

    def __getitem__(self, key: Any) -> Any:
        given = key if isinstance(key, tuple) else (key,)
        indices = *self.indices, *(self.trace.of(index).index() for index in given)
        if len(indices) < self.ndim:
            return self._replace(indices=indices)
        if len(indices) > self.ndim:
            raise UntraceableError("too many indices")
        code = f"{self.code}[{', '.join(indices)}]"
        if self.dtype == "float32":
            return self.trace.named(code, "float")
        if self.dtype == "bool":
            return self.trace.named(code, "bool", 0, 1)
        limits = np.iinfo(self.dtype)
        if limits.max >= 1 << 62:
            # A number that is compared, or an index.
            return self.trace.named(code, "int", -(1 << 61), 1 << 61)
        return self.trace.integer(code, int(limits.min), int(limits.max))


def _arithmetic(sign: str, reach: Callable[..., int]) -> Callable[[Value, Value], Value]:
    """Return + - or * of two values."""

    def apply(x: Value, y: Value) -> Value:
        if "float" in (x.kind, y.kind):
            x, y = x.as_float(), y.as_float()
            if sign == "*":
                return _product(x, y)
            made = x.trace.named(f"float32({x.code} {sign} {y.code})", "float")
            x.trace.sums[made.code] = sign, x, y
            return made
        x, y = x.as_int(), y.as_int()
        ends = [reach(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
        made, known = x.trace.integer(f"{x.code} {sign} {y.code}", min(ends), max(ends)), x.trace.floats
        if sign in "+-" and x.code in known and y.code in known and max(map(abs, ends)) <= LONGEST:
            (left, *m), (right, *n) = known[x.code], known[y.code]
            rows, columns = (reach(a, b) for a, b in zip(m, n, strict=True))
            known[made.code] = f"float32({left} {sign} {right})", rows, columns
        return made

    return apply


def _product(x: Value, y: Value) -> Value:
    """Return a product of floats: what all scores of a head have alike is multiplied first, once for all.

    A rounding differs from the order in which the user multiplies, and no other: sums are left as they are,
    but for those of `products`, where a number is added.  A mask is left as it is: its roundings decide.
    """
    trace = x.trace
    if trace.depends(y.code) <= SCALES:
        x, y = y, x
    if "score" not in trace.products or not trace.depends(x.code) <= SCALES:
        return trace.named(f"float32({x.code} * {y.code})", "float")
    factor, y, addend = trace.products.get(y.code, (None, y, None))
    if addend is not None:
        addend = trace.named(f"float32({addend.code} * {x.code})", "float")
    if factor is not None:
        x = trace.named(f"float32({factor.code} * {x.code})", "float")
    code = f"{x.code} * {y.code}" + (f" + {addend.code}" if addend is not None else "")
    made = trace.named(f"float32({code})", "float")
    trace.products[made.code] = x, y, addend
    return made


def _divided(sign: str) -> Callable[[Value, Value], Value]:
    """Return // or % by a positive integer."""

    def apply(x: Value, y: Value) -> Value:
        x, y = x.as_int(), y.as_int()
        if y.low <= 0:
            raise UntraceableError("a divisor that may be 0 or negative")
        code = f"{x.code} {sign} {y.code}"
        if x.low >= 0 and _narrow(x.low, x.high) and _narrow(y.low, y.high):
            code = f"uint32({x.code}) {sign} uint32({y.code})"
        if sign == "%":
            return x.trace.integer(code, 0, min(x.high, y.high - 1) if x.low >= 0 else y.high - 1)
        ends = [a // b for a in (x.low, x.high) for b in (y.low, y.high)]
        return x.trace.integer(code, min(ends), max(ends))

    return apply


def _quotient(x: Value, y: Value) -> Value:
    """Return x / y of floats; by a number it is a product with the reciprocal, a rounding more."""
    if x.kind == y.kind == "int":
        raise UntraceableError("a quotient of integers is a double")
    code = y.code.removeprefix("float32(").removesuffix(")")
    if y.code.startswith("float32(") and float(code) != 0.0:
        return _product(x.as_float(), x.trace.of(1.0 / float(code)))
    return x.trace.named(f"float32({x.as_float().code} / {y.as_float().code})", "float")


def _logical(sign: str) -> Callable[[Value, Value], Value]:
    """Return & | or ^ of truth values."""

    def apply(x: Value, y: Value) -> Value:
        if not x.kind == y.kind == "bool":
            raise UntraceableError("bits of numbers")
        return x.trace.named(f"bool({x.code} {sign} {y.code})", "bool", 0, 1)

    return apply


def _compared(sign: str) -> Callable[[Value, Value], Value]:
    def apply(x: Value, y: Value) -> Value:
        if "float" in (x.kind, y.kind):
            x, y = x.as_float(), y.as_float()
        return x.trace.named(f"{x.code} {sign} {y.code}", "bool", 0, 1)

    return apply


def _install(name: str, apply: Callable[[Value, Value], Value]) -> None:
    """Give `Value` an operator and, unless it compares, its reflection."""
    setattr(Value, f"__{name}__", lambda x, y: apply(x, x.trace.of(y)))
    if name not in _COMPARED:
        setattr(Value, f"__r{name}__", lambda x, y: apply(x.trace.of(y), x))


for _name, _apply in {
    "add": _arithmetic("+", lambda a, b: a + b), "sub": _arithmetic("-", lambda a, b: a - b),
    "mul": _arithmetic("*", lambda a, b: a * b), "truediv": _quotient,
    "floordiv": _divided("//"), "mod": _divided("%"),
    "and": _logical("&"), "or": _logical("|"), "xor": _logical("^"),
    **{name: _compared(sign) for name, sign in _COMPARED.items()},
}.items():  # fmt: skip
    _install(_name, _apply)
