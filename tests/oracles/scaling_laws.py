"""Oracles of scaling laws: powers decided by comparing whole powers of fractions, without any logarithm."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle


def nearest_root(power: Fraction, degree: int) -> Fraction:
    """Return the float64 nearest to the root: the one whose neighbours' midpoints enclose it."""
    guess = math.exp((math.log(power.numerator) - math.log(power.denominator)) / degree)
    for _ in range(64):
        above, below = math.nextafter(guess, math.inf), math.nextafter(guess, 0)
        if ((Fraction(guess) + Fraction(above)) / 2) ** degree < power:
            guess = above
        elif ((Fraction(guess) + Fraction(below)) / 2) ** degree > power:
            guess = below
        else:
            return Fraction(guess)
    raise AssertionError("the first guess was far off")


def as_total(unit: str, value: Fraction) -> dict[str, Any]:
    return {unit: np.asarray(value.numerator if value.denominator == 1 else value, dtype=object)}


@oracle("cost.kaplan")
def kaplan_by_roots(*, parameters: int = 0, tokens: int = 0, compute: int = 0) -> Any:
    """(c/x)**(p/q) is the q-th root of (c/x)**p."""
    if parameters and tokens:
        raise NotImplementedError("a power of a sum of powers has no such root")
    if parameters:
        ratio, exponent = Fraction(88 * 10**12, parameters), Fraction(76, 1000)
    elif tokens:
        ratio, exponent = Fraction(54 * 10**12, tokens), Fraction(95, 1000)
    else:
        ratio, exponent = Fraction(31 * 10**7 * 864 * 10**17, compute), Fraction(5, 100)
    return as_total("nats", nearest_root(ratio**exponent.numerator, exponent.denominator))


@oracle("cost.chinchilla")
def chinchilla_by_roots(*, parameters: int, tokens: int, fit: str) -> Any:
    """A/N**(17/50) is the 50th root of A**50/N**17, B/D**(7/25) the 25th of B**25/D**7."""
    if fit != "hoffmann":
        raise NotImplementedError("exponents of five digits")
    # The parts are rounded to a float64 each, E as well.
    size = nearest_root(Fraction("406.4") ** 50 / parameters**17, 50)
    data = nearest_root(Fraction("410.7") ** 25 / tokens**7, 25)
    return as_total("nats", Fraction(1.69) + size + data)


@oracle("cost.chinchilla.optimal")
def optimum_by_roots(*, compute: int, fit: str) -> Any:
    """With α + β = 31/50: N**31 = (αA/βB)**50 (C/6)**14, D**31 = (βB/αA)**50 (C/6)**17."""
    if fit != "hoffmann":
        raise NotImplementedError("exponents of five digits")
    ratio = Fraction("0.34") * Fraction("406.4") / (Fraction("0.28") * Fraction("410.7"))
    n = nearest_root(ratio**50 * Fraction(compute, 6) ** 14, 31)
    d = nearest_root(ratio**-50 * Fraction(compute, 6) ** 17, 31)
    return {"parameters.parameters": as_total("p", n)["p"], "tokens.tokens": as_total("t", d)["t"]}


@oracle("cost.pruning_tokens")
def counted_tokens(*, steps: int, batch: int, length: int) -> Any:
    """Step after step."""
    return as_total("tokens", Fraction(sum(itertools.repeat(batch * length, steps))))
