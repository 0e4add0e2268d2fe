"""How a table for people writes quantities: bytes, operations, seconds and counts, each with its scale."""

from __future__ import annotations

from typing import Any

__all__ = ["bytes_text", "count_text", "flop_text", "gib_text", "time_text"]


def bytes_text(value: Any) -> str:
    """Return a number of bytes.

    >>> bytes_text(16_640_625_000), bytes_text(None)
    ('16.64 GB', '')
    """
    return _text(value, "B")


def gib_text(value: Any) -> str:
    """Return a number of bytes in GiB, as the makers of estimators print them.

    >>> gib_text(2**30), gib_text(0)
    ('1.00 GiB', '0')
    """
    return "" if value is None else f"{float(value) / 2**30:.2f} GiB" if value else "0"


def flop_text(value: Any) -> str:
    """Return a number of floating-point operations.

    >>> flop_text(15_030_000_000)
    '15.03 GFLOP'
    """
    return _text(value, "FLOP")


def time_text(value: Any) -> str:
    """Return a number of seconds.

    >>> time_text(0.45)
    '450 ms'
    """
    return _text(value, "s")


def count_text(value: Any) -> str:
    """Return a count, in powers of ten where it is round.

    >>> count_text(7_500_000_000)
    '7.5e9'
    """
    from memsim.units import exact, format_number

    return "" if value is None else format_number(exact(value))


def _text(value: Any, unit: str) -> str:
    from memsim.units import exact, format_quantity

    return "" if value is None else format_quantity(exact(value), unit)
