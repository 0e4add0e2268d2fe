"""What every model returns: named terms, each with its value, unit, formula and source.

>>> states = estimate(
...     "model states",
...     [
...         term("parameters", "2Ψ", {"Ψ": 7_500_000_000}, "B", "ZeRO §3.1"),
...         term("everything else", "14Ψ/N", {"Ψ": 7_500_000_000, "N": 64}, "B", "ZeRO §5"),
...     ],
... )
>>> states.total, states["everything else"]
(16640625000, 1640625000)
>>> print(states.explain()[-1])
total: 2Ψ + 14Ψ/N = 2*7.5e9 + 14*7.5e9/64 = 16.64 GB
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memsim.formula import evaluate, substitute
from memsim.units import Number, format_quantity
from refimpl.errors import UnknownNameError

__all__ = ["Estimate", "Term", "estimate", "term"]


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of an estimate.

    Attributes
    ----------
    name : str
        What it is, for example ``"optimizer states"``.
    value : int or Fraction
        Its exact value in `unit`.
    unit : str
        ``"B"``, ``"elements"``, ``"FLOP"``, ``"s"``, ``"parameters"`` or ``"1"``.
    formula, substituted : str
        The formula that was evaluated, and the same with the numbers in it.
    source : str
        Where the formula stands.
    """

    name: str
    value: Number
    unit: str
    formula: str
    substituted: str
    source: str

    def explain(self) -> str:
        """Return ``name: formula = numbers = value``."""
        return f"{self.name}: {self.formula} = {self.substituted} = {format_quantity(self.value, self.unit)}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Named terms and their totals; a total is the sum of the terms of one unit.

    Attributes
    ----------
    name : str
        What is estimated.
    terms : tuple of Term
        The addends, in the order of the source.
    formula, substituted : str
        A shorter formula of the total, where the source prints one; otherwise empty.
    leaves_out : str
        What the estimate does not count.
    """

    name: str
    terms: tuple[Term, ...]
    formula: str = ""
    substituted: str = ""
    leaves_out: str = ""

    @property
    def totals(self) -> dict[str, Number]:
        """The sum of the terms of each unit, exact."""
        sums: dict[str, Number] = {}
        for item in self.terms:
            sums[item.unit] = sums.get(item.unit, 0) + item.value
        return sums

    @property
    def unit(self) -> str:
        """The one unit of all terms.

        Raises
        ------
        ValueError
            If the terms have several units: there is no one total then, see `totals`.
        """
        units = list(self.totals)
        if len(units) != 1:
            raise ValueError(f"{self.name}: terms of one unit have a total; got units {units}")
        return units[0]

    @property
    def total(self) -> Number:
        """The sum of all terms, exact; they must have one unit."""
        return self.totals[self.unit]

    def __getitem__(self, name: str) -> Number:
        """Return the value of the term called `name`."""
        for item in self.terms:
            if item.name == name:
                return item.value
        raise UnknownNameError("term", name, [item.name for item in self.terms])

    def explain(self) -> list[str]:
        """Return one line for each term and, if there are several of one unit, one for the total."""
        lines = [item.explain() for item in self.terms]
        if len(self.terms) > 1 and len(self.totals) == 1:
            formula = self.formula or " + ".join(item.formula for item in self.terms)
            numbers = self.substituted or " + ".join(item.substituted for item in self.terms)
            lines.append(f"total: {formula} = {numbers} = {format_quantity(self.total, self.unit)}")
        return lines


def term(name: str, formula: str, values: Mapping[str, Number], unit: str, source: str) -> Term:
    """Return the term whose value is `formula` evaluated at `values` (see `memsim.formula`)."""
    return Term(name, evaluate(formula, values), unit, formula, substitute(formula, values), source)


def estimate(
    name: str,
    terms: Iterable[Term],
    *,
    formula: str = "",
    values: Mapping[str, Number] | None = None,
    leaves_out: str = "",
) -> Estimate:
    """Return the estimate made of `terms`.

    Parameters
    ----------
    name : str
        What is estimated.
    terms : iterable of Term
        The addends.
    formula : str, optional
        The source's own formula of the total, evaluated at `values` and held to the sum of the terms.
    values : mapping of str to int or Fraction, optional
        Values of the names in `formula`.
    leaves_out : str
        What the estimate does not count.

    Raises
    ------
    ValueError
        If `formula` does not equal the sum of the terms: one of the two is wrong.
    """
    result = Estimate(
        name, tuple(terms), formula, substitute(formula, values or {}) if formula else "", leaves_out
    )
    if formula and evaluate(formula, values or {}) != result.total:
        raise ValueError(
            f"{name}: {formula} is not the sum of the terms {[item.formula for item in result.terms]}"
        )
    return result
