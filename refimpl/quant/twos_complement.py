"""Two's complement: what a pattern of bits means as a signed integer.

The lecture's table of 2 bits, 01 is 1, 00 is 0, 11 is -1 and 10 is -2, is `twos_complement` of all four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import DTypeError, OptionError
from refimpl.numerics import Array, IntArray
from refimpl.registry import Case, Source, law, technique
from refimpl.testing import require
from refimpl.validation import as_array

__all__ = ["twos_complement"]


def _sample(rng: np.random.Generator, *, n: int, bits: int) -> Case:
    return Case((rng.integers(0, 2**bits, n),), {"bits": bits})


@technique(
    "quant.twos_complement",
    entries=(69,),
    kind="data",
    source=Source("Jacob et al. 2018", "arXiv:1712.05877", "section 2.1: codes are B-bit integers"),
    axes={"n": (1, 12), "bits": (2, 8)},
    edges=({"n": 0}, {"n": 1, "bits": 2}),
    sample=_sample,
    exact=True,
)
def twos_complement(patterns: IntArray, /, *, bits: int = 2) -> IntArray:
    """Return the signed integers that patterns of bits stand for: the highest bit weighs -2**(bits-1).

    Parameters
    ----------
    patterns : ndarray of int, any shape
        Patterns read as unsigned integers, each below 2**bits.
    bits : int
        Width, 2 to 8.

    Returns
    -------
    ndarray of int8
        In [-2**(bits-1), 2**(bits-1) - 1].

    Raises
    ------
    DTypeError
        If the patterns are no integers.
    OptionError
        If `bits` is out of range, or a pattern does not fit.

    Examples
    --------
    >>> twos_complement(np.array([0b01, 0b00, 0b11, 0b10]))
    array([ 1,  0, -1, -2], dtype=int8)
    """
    array = as_array("patterns", patterns)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"patterns: expected integers, got {array.dtype}")
    if bits not in range(2, 9):
        raise OptionError(f"bits: expected 2 to 8, got {bits}")
    wide = array.astype(np.int64)
    if np.any((wide < 0) | (wide >= 2**bits)):
        raise OptionError(f"patterns: expected numbers in [0, {2**bits}), got {array.tolist()}")
    values: IntArray = (wide - ((wide >> (bits - 1)) << bits)).astype(np.int8)
    return values


def _values(case: Case, f: Callable[..., Any], patterns: Array, bits: int) -> Array:
    return np.asarray(case.replace(patterns, bits=bits).call(f)).astype(np.int64)


@law("quant.twos_complement")
def adding_patterns_adds_values(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Patterns add modulo 2**bits as their values do."""
    bits, (a,) = case.kwargs["bits"], case.args
    b = a[::-1]
    total = _values(case, f, (a + b) % 2**bits, bits)
    require((total - _values(case, f, a, bits) - _values(case, f, b, bits)) % 2**bits == 0, "sums differ")


@law("quant.twos_complement")
def all_patterns_make_the_range(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """The patterns in order stand for 0, 1, ... up to the largest value, then the most negative up to -1."""
    bits = case.kwargs["bits"]
    half = 2 ** (bits - 1)
    got = _values(case, f, np.arange(2 * half), bits).tolist()
    require(got == [*range(half), *range(-half, 0)], f"{bits} bits stand for {got}")


@law("quant.twos_complement")
def repeating_the_sign_bit_keeps_the_value(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """A pattern extended by its own highest bit stands for the same integer."""
    bits, (a,) = case.kwargs["bits"], case.args
    if bits < 8:
        extended = a | (a >> (bits - 1)) << bits
        require(_values(case, f, extended, bits + 1) == _values(case, f, a, bits), "sign extension")


@law("quant.twos_complement")
def complement_plus_one_negates(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Inverting all bits and adding 1 negates, except for the most negative value, which it leaves."""
    bits, (a,) = case.kwargs["bits"], case.args
    values = _values(case, f, a, bits)
    negated = _values(case, f, (~a + 1) % 2**bits, bits)
    require((negated == -values) | (values == -(2 ** (bits - 1))) & (negated == values), "negation")
