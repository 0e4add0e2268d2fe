"""Formulas that are evaluated as they are printed, so an explanation cannot drift from the number.

A formula is written as the field writes it, ``2Ψ + 14Ψ/N``: a number in front of a letter or a parenthesis
multiplies, ``·`` multiplies, ``²`` squares.  Besides that it is Python's arithmetic: ``+ - * / **``,
parentheses, ``ceil``, ``max`` and ``min``.  Division is exact.

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
from functools import lru_cache

from memsim.units import Number, format_number

__all__ = ["evaluate", "evaluate_real", "substitute"]

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
    ast.Pow: _power,
}
_REAL_OPERATORS: dict[type[ast.operator], Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {"ceil": math.ceil, "max": max, "min": min}


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
        raise ValueError(f"not arithmetic: {ast.unparse(node)!r} in {formula!r}")

    return value_of(_parse(formula))


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


def substitute(formula: str, values: Mapping[str, Number]) -> str:
    """Return `formula` with every name replaced by its value."""

    def number(match: re.Match[str]) -> str:
        name = match[0]
        return name if name in _FUNCTIONS else format_number(values[name])

    return _NAME.sub(number, _spell_out(formula))
