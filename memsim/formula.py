"""Formulas that are evaluated as they are printed, so an explanation cannot drift from the number.

A formula is written as the field writes it, ``2Ψ + 14Ψ/N``: a number in front of a letter or a parenthesis
multiplies, ``·`` multiplies, ``²`` squares.  Besides that it is Python's arithmetic: ``+ - * / % **``,
parentheses, ``ceil``, ``max`` and ``min``, and a choice, ``a if x > y else b``.  Division is exact.

>>> evaluate("2Ψ + 14Ψ/N", {"Ψ": 7_500_000_000, "N": 64})
16640625000
>>> substitute("2Ψ + 14Ψ/N", {"Ψ": 7_500_000_000, "N": 64})
'2*7.5e9 + 14*7.5e9/64'
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from memsim.units import Number, format_number

__all__ = ["Array", "evaluate", "evaluate_array", "evaluate_real", "names_in", "substitute"]

Array = npt.NDArray[np.float64]

_FACTOR = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?=[^\W\d]|\()")  # the 14 of 14Ψ, but not the 2 of x2
_NAME = re.compile(r"[^\W\d]\w*")


def _divide(a: Number, b: Number) -> Number:
    quotient = Fraction(a) / Fraction(b)
    return quotient.numerator if quotient.denominator == 1 else quotient


def _power(a: Number, b: Number) -> Number:
    if not isinstance(b, int) or b < 0:
        raise ValueError(f"a formula takes whole powers only; got {b}")
    return a**b


_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_REAL_OPERATORS: dict[type[ast.operator], Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {"ceil": math.ceil, "max": max, "min": min}
_WORDS = frozenset((*_FUNCTIONS, "if", "else"))


def _spell_out(formula: str) -> str:
    """Return `formula` with every multiplication written."""
    return _FACTOR.sub(r"\1*", formula.replace("²", "**2").replace("·", "*"))


@lru_cache(maxsize=1024)
def _parse(formula: str) -> ast.expr:
    return ast.parse(_spell_out(formula), mode="eval").body


def evaluate(formula: str, values: Mapping[str, Number]) -> Number:
    """Return the exact value of `formula` with the names in `values`.

    Raises
    ------
    KeyError
        If a name has no value.
    ValueError
        If the formula holds anything but arithmetic.

    Examples
    --------
    >>> evaluate("ceil(M/(4d))", {"M": 98304, "d": 64})
    384
    """

    def value_of(node: ast.expr) -> Number:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Constant(value=float(number)):
                return Fraction(repr(number))
            case ast.Name(id=name):
                return values[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value_of(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                result = _OPERATORS[type(op)](value_of(left), value_of(right))
                return result.numerator if result.denominator == 1 else result
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(value_of, arguments))
            case ast.IfExp(
                test=ast.Compare(left=left, ops=[comparison], comparators=[right]), body=body, orelse=orelse
            ) if type(comparison) in _COMPARISONS:
                true = _COMPARISONS[type(comparison)](value_of(left), value_of(right))
                return value_of(body if true else orelse)
        raise ValueError(f"not arithmetic: {ast.unparse(node)!r} in {formula!r}")

    return value_of(_parse(formula))


_ARRAY_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate_array(formula: str, values: Mapping[str, float | Array]) -> float | Array:
    """Return `formula` in float64 for many values at once, arrays that broadcast against each other.

    The branches of a choice are both computed.

    Raises
    ------
    KeyError
        If a name has no value.
    ValueError
        If the formula holds anything but arithmetic.

    Examples
    --------
    >>> evaluate_array("max(M, 4d) if M > 1 else 0", {"M": np.array([1.0, 2.0, 9.0]), "d": 1.0})
    array([0., 4., 9.])
    """

    def value_of(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number) | float(number)):
                return float(number)
            case ast.Name(id=name):
                return values[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value_of(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARRAY_OPERATORS:
                return _ARRAY_OPERATORS[type(op)](value_of(left), value_of(right))
            case ast.Call(func=ast.Name(id="ceil"), args=[argument], keywords=[]):
                return np.ceil(value_of(argument))
            case ast.Call(func=ast.Name(id="max" | "min" as name), args=arguments, keywords=[]):
                larger = np.maximum if name == "max" else np.minimum
                return reduce(larger, map(value_of, arguments))
            case ast.IfExp(
                test=ast.Compare(left=left, ops=[comparison], comparators=[right]), body=body, orelse=orelse
            ) if type(comparison) in _COMPARISONS:
                true = _COMPARISONS[type(comparison)](value_of(left), value_of(right))
                return np.where(true, value_of(body), value_of(orelse))
        raise ValueError(f"not arithmetic: {ast.unparse(node)!r} in {formula!r}")

    result: float | Array = value_of(_parse(formula))
    return result


def evaluate_real(formula: str, values: Mapping[str, Number]) -> Number:
    """Return `formula` with any powers, such as ``(N_c/N)**α``, rounded correctly to a float64, exactly.

    The arithmetic has 40 digits, so that the last one of a float64 does not depend on who computes it.

    Raises
    ------
    KeyError
        If a name has no value.
    ValueError
        If the formula holds anything but ``+ - * / **``.

    Examples
    --------
    >>> float(evaluate_real("(N_c/N)**α", {"N_c": 16, "N": 1, "α": Fraction(1, 4)}))
    2.0
    """

    def value_of(node: ast.expr) -> Decimal:
        match node:
            case ast.Constant(value=int(number)):
                return Decimal(number)
            case ast.Constant(value=float(number)):
                return Decimal(repr(number))
            case ast.Name(id=name):
                ratio = Fraction(values[name])
                return Decimal(ratio.numerator) / Decimal(ratio.denominator)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _REAL_OPERATORS:
                return _REAL_OPERATORS[type(op)](value_of(left), value_of(right))
        raise ValueError(f"not arithmetic: {ast.unparse(node)!r} in {formula!r}")

    with localcontext() as context:
        context.prec = 40
        nearest = Fraction(float(value_of(_parse(formula))))
    return nearest.numerator if nearest.denominator == 1 else nearest


def names_in(formula: str) -> set[str]:
    """Return the names whose values a formula needs.

    >>> sorted(names_in("max(M, 4d) if M > 1 else 0"))
    ['M', 'd']
    """
    return {node.id for node in ast.walk(_parse(formula)) if isinstance(node, ast.Name)} - set(_FUNCTIONS)


def substitute(formula: str, values: Mapping[str, Number]) -> str:
    """Return `formula` with every name replaced by its value."""

    def number(match: re.Match[str]) -> str:
        name = match[0]
        return name if name in _WORDS else format_number(values[name])

    return _NAME.sub(number, _spell_out(formula))
