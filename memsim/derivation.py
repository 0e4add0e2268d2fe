"""Chains of formulas: each names a quantity that later ones use, and one text serves one case or a million.

A model of many quantities, such as the time of a training step, is a sequence of definitions in the order
in which they can be computed.  `derive` computes them exactly for one case and keeps the formula with the
numbers in it; `derive_arrays` computes the same formulas in float64 for arrays of cases.  What explains a
number and what searches a million of them thus cannot differ but by rounding.

>>> chain = (
...     Definition("m", "B/(d*b)", "1", "micro-batches of a step", "arXiv:2104.04473, section 2.2"),
...     Definition("bubble", "(p - 1)/m", "1", "idle over ideal time", "arXiv:2104.04473, section 2.2"),
... )
>>> derive(chain, {"B": 64, "d": 2, "b": 1, "p": 9})["bubble"].value
Fraction(1, 4)
>>> derive_arrays(chain, {"B": 64.0, "d": 2.0, "b": 1.0, "p": np.array([1.0, 9.0])})["bubble"]
array([0.  , 0.25])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np  # noqa: F401 (the doctest)

from memsim.estimate import Term, term
from memsim.formula import Array, evaluate_array, names_in
from memsim.units import Number

__all__ = ["Definition", "derive", "derive_arrays", "needed"]


class Definition(NamedTuple):
    """A quantity: its name in formulas, how it follows from others, unit, meaning, and where it stands."""

    name: str
    formula: str
    unit: str
    meaning: str
    source: str


def derive(definitions: Iterable[Definition], given: Mapping[str, Number]) -> dict[str, Term]:
    """Return every quantity as a term: exact value, formula, and the formula with the numbers in it.

    Raises
    ------
    KeyError
        If a formula uses a name that is neither given nor defined before it.
    """
    values = dict(given)
    found: dict[str, Term] = {}
    for name, formula, unit, meaning, source in definitions:
        found[name] = term(meaning, formula, values, unit, source)
        values[name] = found[name].value
    return found


def derive_arrays(
    definitions: Iterable[Definition], given: Mapping[str, float | Array]
) -> dict[str, float | Array]:
    """Return every quantity in float64; what is given may be arrays that broadcast against each other."""
    values = dict(given)
    for definition in definitions:
        values[definition.name] = evaluate_array(definition.formula, values)
    return values


def needed(definitions: Iterable[Definition], names: Iterable[str]) -> tuple[Definition, ...]:
    """Return those definitions, in order, from which the quantities called `names` follow.

    >>> chain = [Definition(name, text, "1", "", "") for name, text in (("a", "x"), ("b", "x"), ("c", "2a"))]
    >>> [definition.name for definition in needed(chain, ["c"])]
    ['a', 'c']
    """
    wanted, kept = set(names), []
    for definition in reversed(list(definitions)):
        if definition.name in wanted:
            wanted |= names_in(definition.formula)
            kept.append(definition)
    return tuple(reversed(kept))
