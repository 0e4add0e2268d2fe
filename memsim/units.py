"""Units and printed digits: GB is 1e9 bytes, GiB is 2**30, and rounding is said aloud.

Numbers stay exact: an integer, or a `fractions.Fraction`.  A float stands for the decimal that it prints, so
``0.1`` is one tenth.

>>> parse_count("7.5B"), parse_bytes("192KiB"), parse_bytes("40GB")
(7500000000, 196608, 40000000000)
>>> format_quantity(16_640_625_000, "B")
'16.64 GB'
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from typing import SupportsIndex

from refimpl.errors import OptionError

__all__ = [
    "SCALES",
    "Number",
    "Quantity",
    "exact",
    "format_number",
    "format_quantity",
    "parse_bytes",
    "parse_count",
    "printed_decimals",
    "round_half_up",
    "truncate",
]

Number = int | Fraction
Quantity = int | float | Fraction | str | SupportsIndex

# What a printed unit is worth: the unit that models compute in, and how many of it.
SCALES: dict[str, tuple[str, Number]] = {
    "1": ("1", 1),
    "%": ("1", Fraction(1, 100)),
    "x": ("1", 1),
    "B": ("B", 1),
    "kB": ("B", 10**3),
    "KB": ("B", 10**3),
    "MB": ("B", 10**6),
    "GB": ("B", 10**9),
    "TB": ("B", 10**12),
    "KiB": ("B", 2**10),
    "MiB": ("B", 2**20),
    "GiB": ("B", 2**30),
    "TiB": ("B", 2**40),
    "elements": ("elements", 1),
    "B elements": ("elements", 10**9),
    "parameters": ("parameters", 1),
    "B parameters": ("parameters", 10**9),
    "M parameters": ("parameters", 10**6),
    "tokens": ("tokens", 1),
    "B tokens": ("tokens", 10**9),
    "T tokens": ("tokens", 10**12),
    "nats": ("nats", 1),
    "FLOP": ("FLOP", 1),
    "MFLOP": ("FLOP", 10**6),
    "GFLOP": ("FLOP", 10**9),
    "TFLOP": ("FLOP", 10**12),
    "s": ("s", 1),
    "ms": ("s", Fraction(1, 10**3)),
    "µs": ("s", Fraction(1, 10**6)),
    "min": ("s", 60),
    "days": ("s", 86400),
}
_COUNT_SUFFIXES: dict[str, int] = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_NUMBER = re.compile(r"\s*([-+]?\d[\d_]*(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*")
# The prefixes that `format_quantity` chooses from, largest first.
_LADDERS: dict[str, tuple[str, ...]] = {
    "B": ("TB", "GB", "MB", "kB", "B"),
    "FLOP": ("TFLOP", "GFLOP", "MFLOP", "FLOP"),
    "elements": ("B elements", "elements"),
    "parameters": ("B parameters", "parameters"),
    "tokens": ("T tokens", "B tokens", "tokens"),
    "s": ("days", "min", "s", "ms", "µs"),
}


def _simplest(value: Fraction) -> Number:
    return value.numerator if value.denominator == 1 else value


def exact(value: Quantity, name: str = "value") -> Number:
    """Return `value` as an integer or a Fraction, with nothing lost.

    Parameters
    ----------
    value : int, float, Fraction, str or NumPy integer
        A float means the decimal that ``repr`` prints; a string is read by `parse_count`.
    name : str
        What is read, for the error message.

    Returns
    -------
    int or Fraction

    Raises
    ------
    OptionError
        If `value` is NaN, infinite, a truth value or not a number.

    Examples
    --------
    >>> exact(7.5e9), exact(0.1), exact("1.5B")
    (7500000000, Fraction(1, 10), 1500000000)
    """
    if isinstance(value, str):
        return parse_count(value)
    if isinstance(value, bool):
        raise OptionError(f"{name}: expected a number; got {value!r}")
    if isinstance(value, Fraction):
        return _simplest(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OptionError(f"{name}: expected a finite number; got {value!r}")
        return _simplest(Fraction(repr(float(value))))
    try:
        return value.__index__()
    except AttributeError:
        raise OptionError(f"{name}: expected a number; got {value!r}") from None


def parse_count(text: str) -> Number:
    """Read a count such as ``"7.5B"``, ``"7.5e9"``, ``"1K"`` or ``"64"``; B is 1e9, as in model names.

    Raises
    ------
    OptionError
        If `text` is not a number with one of the suffixes K, M, B, G, T (powers of 1000).
    """
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].upper() not in _COUNT_SUFFIXES:
        raise OptionError(f"expected a count such as 7.5e9, 7.5B or 64; got {text!r}")
    return _simplest(Fraction(match[1].replace("_", "")) * _COUNT_SUFFIXES[match[2].upper()])


def parse_bytes(text: str) -> int:
    """Read a size such as ``"40GB"`` (1e9), ``"192KiB"`` (1024) or ``"512"``, in bytes.

    Raises
    ------
    OptionError
        If the unit is unknown or the size is not a whole number of bytes.
    """
    match = _NUMBER.fullmatch(text)
    unit, scale = SCALES.get((match[2] if match else "") or "B", ("", 0))
    if match is None or unit != "B":
        raise OptionError(f"expected a size such as 40GB, 192KiB or 512; got {text!r}")
    size = Fraction(match[1].replace("_", "")) * scale
    if size.denominator != 1:
        raise OptionError(f"expected a whole number of bytes; got {text!r}, {float(size)} bytes")
    return size.numerator


def round_half_up(value: Number, decimals: int) -> Decimal:
    """Return `value` rounded to `decimals` printed decimals, ties away from zero, as most tables are.

    Python's ``round`` sends 41.25 to 41.2; a printed table says 41.3.

    Examples
    --------
    >>> round_half_up(Fraction("41.25"), 1), truncate(Fraction("4187.5"), 0)
    (Decimal('41.3'), Decimal('4187'))
    """
    return _to_decimals(value, decimals, ROUND_HALF_UP)


def truncate(value: Number, decimals: int) -> Decimal:
    """Return `value` cut after `decimals` printed decimals, toward zero."""
    return _to_decimals(value, decimals, ROUND_DOWN)


def _to_decimals(value: Number, decimals: int, rounding: str) -> Decimal:
    scaled = Fraction(value) * Fraction(10) ** decimals
    whole, rest = divmod(abs(scaled.numerator), scaled.denominator)
    if rounding == ROUND_HALF_UP and 2 * rest >= scaled.denominator:
        whole += 1
    return (Decimal(whole) if scaled >= 0 else -Decimal(whole)).scaleb(-decimals)


def printed_decimals(printed: str) -> int:
    """Return how many decimals a printed number shows.

    >>> printed_decimals("1.88"), printed_decimals("4187")
    (2, 0)
    """
    return len(printed.partition(".")[2])


def format_number(value: Number) -> str:
    """Return an exact integer as a reader writes it in a formula, or a fraction as a decimal.

    >>> format_number(7_500_000_000), format_number(1024), format_number(Fraction(1, 8))
    ('7.5e9', '1024', '0.125')
    """
    if isinstance(value, Fraction):
        return _significant(value, 6)
    digits = str(abs(value))
    mantissa = digits.rstrip("0")
    if len(digits) < 7 or len(digits) - len(mantissa) < 4:
        return str(value)
    sign = "-" if value < 0 else ""
    return f"{sign}{mantissa[0]}{'.' if mantissa[1:] else ''}{mantissa[1:]}e{len(digits) - 1}"


def _significant(value: Number, digits: int) -> str:
    """Return `value` with at most `digits` significant digits, half up, without trailing zeros."""
    if value == 0:
        return "0"
    with localcontext() as context:
        context.prec = digits + 20
        magnitude = (Decimal(Fraction(value).numerator) / Decimal(Fraction(value).denominator)).adjusted()
    rounded = round_half_up(value, digits - 1 - magnitude)
    if rounded == rounded.to_integral_value():
        return str(int(rounded))
    return f"{rounded.normalize():f}"


def format_quantity(value: Number, unit: str, *, digits: int = 4) -> str:
    """Return `value` with the largest unit in which it is at least 1, rounded half up to `digits`.

    Parameters
    ----------
    value : int or Fraction
        The value in `unit`.
    unit : str
        ``"B"``, ``"FLOP"``, ``"s"``, ``"elements"``, ``"parameters"`` or ``"1"``.
    digits : int
        Significant digits.

    Examples
    --------
    >>> format_quantity(1_875_000_000, "B"), format_quantity(Fraction(3375, 4), "s")
    ('1.875 GB', '14.06 min')
    """
    ladder = _LADDERS.get(unit, (unit,))
    magnitude = max(value, -value)
    for name in ladder:
        scale: Number = SCALES[name][1] if name in SCALES else 1
        if magnitude >= scale or name == ladder[-1]:
            number = _significant(Fraction(value) / scale, digits)
            return number if name == "1" else f"{number} {name}"
    raise AssertionError("unreachable: every ladder ends")  # pragma: no cover
