"""Published numbers beside the ones computed here: what derives, what does not, and why.

Every number is data (``memsim/data/published/*.toml``): the string as printed, where it stands, the model
call that recomputes it and how its digits were made.  A verdict says what the comparison is worth, and a
formula is never bent to hit a print:

- ``derives``: the model gives the print; a difference fails the run.
- ``derives under a stated reading``: the same, with the reading named; a difference fails the run.
- ``fitted``: a reading chosen because it hits; it is never evidence and never fails.
- ``does not derive``: no consistent reading gives it, with the reason.
- ``measurement``: somebody measured it; shown only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from memsim import data_files
from memsim.estimate import Estimate, estimate, term
from memsim.units import SCALES, Number, exact, printed_decimals, round_half_up, truncate
from refimpl.errors import UnknownNameError
from refimpl.registry import resolve

__all__ = ["RULES", "VERDICTS", "Row", "load", "recompute", "reproduce", "sections"]

VERDICTS = ("derives", "derives under a stated reading", "fitted", "does not derive", "measurement")
# How a printed number came from the exact one; a `tolerance` such as "5%" stands in place of a rule.
RULES = ("half-up", "truncate", "below", "at most")


@dataclass(frozen=True, slots=True)
class Row:
    """One published number and ours.

    Attributes
    ----------
    id, source : str
        Its name here, and the work with the place in it.
    published : str
        The number as printed.
    ours : float or None
        The value computed here, in `unit`; None for a measurement.
    unit : str
        The printed unit: ``"GB"`` is 1e9 bytes.
    deviation : float or None
        ``ours / published - 1``.
    tolerance : str
        What counts as equal: ``"half-up"``, ``"truncate"`` to the printed digits, ``"below"``, ``"at most"``,
        or a relative deviation such as ``"5%"``.
    verdict : str
        One of `VERDICTS`.
    reason : str
        The reading, or why the number does not derive.
    ok : bool
        False if the verdict says that it derives and it does not.
    """

    id: str
    source: str
    published: str
    ours: float | None
    unit: str
    deviation: float | None
    tolerance: str
    verdict: str
    reason: str
    ok: bool


def sections() -> list[str]:
    """Return the names of the sections, one for each data file.

    >>> {"arithmetic", "flash_attention", "zero"} <= set(sections())
    True
    """
    return data_files.names("published")


def load(section: str) -> list[dict[str, Any]]:
    """Return the published numbers of `section`, each with what its group says for all of its numbers.

    Raises
    ------
    UnknownNameError
        If there is no such section.

    Examples
    --------
    >>> entry = load("zero")[3]
    >>> entry["id"], entry["printed"], entry["inputs"]
    ('zero.table1.7.5B.n4.stage1', '52.5', {'parameters': '7.5B', 'ranks': 4, 'stage': 1})
    """
    data = data_files.read(section, "published", "section")
    entries = []
    for group in data["group"]:
        shared = {key: value for key, value in group.items() if key != "numbers"}
        for number in group["numbers"]:
            entry = {"reason": "", "inputs": {}, **shared, **number}
            entry["inputs"] = {**entry["inputs"], **entry.pop("with", {})}
            work = data["works"][entry["work"]]
            entry["source"] = f"{work['work']}, {work['identifier']}, {entry['locator']}"
            entries.append(entry)
    return entries


def recompute(entry: Mapping[str, Any], **changed: Any) -> Estimate:
    """Return the estimate of a published number: its model called, or its formula evaluated."""
    inputs = {**entry["inputs"], **changed}
    if "model" in entry:
        result: Estimate = resolve(entry["model"])(**inputs)
        return result
    values = {name: exact(value, name) for name, value in inputs.items()}
    unit = SCALES[entry["unit"]][0]
    return estimate(entry["id"], [term(entry["id"], entry["formula"], values, unit, entry["source"])])


def _value(entry: Mapping[str, Any]) -> Number:
    """Return our exact value of `entry` in its printed unit."""
    found = recompute(entry)
    value = found[entry["term"]] if "term" in entry else found.total
    unit, scale = SCALES[entry["unit"]]
    if "over" in entry:
        return exact(Fraction(value) / Fraction(recompute(entry, **entry["over"]).total) / Fraction(scale))
    if found.unit != unit:
        raise ValueError(f"{entry['id']}: the model computes {found.unit}, the print is in {entry['unit']}")
    return exact(Fraction(value) / Fraction(scale))


def _agrees(ours: Number, printed: str, tolerance: str) -> bool:
    """Return whether `ours` gives the printed digits, by the rule or within the relative `tolerance`."""
    decimals, target = printed_decimals(printed), Fraction(printed)
    match tolerance:
        case "half-up":
            return round_half_up(ours, decimals) == Decimal(printed)
        case "truncate":
            return truncate(ours, decimals) == Decimal(printed)
        case "below":
            return ours < target
        case "at most":
            return ours <= target
    share = Fraction(tolerance.removesuffix("%")) / 100
    return abs(Fraction(ours) - target) <= share * abs(target)


def _row(entry: Mapping[str, Any]) -> Row:
    shown = {key: entry[key] for key in ("id", "source", "unit", "verdict", "reason")}
    if entry["verdict"] == "measurement":
        return Row(published=entry["printed"], ours=None, deviation=None, tolerance="", ok=True, **shown)
    ours = _value(entry)
    tolerance = entry["tolerance"] if "tolerance" in entry else entry["rule"]
    must = entry["verdict"] in VERDICTS[:2]
    return Row(
        published=entry["printed"],
        ours=float(ours),
        deviation=float(Fraction(ours) / Fraction(entry["printed"]) - 1),
        tolerance=tolerance,
        ok=not must or _agrees(ours, entry["printed"], tolerance),
        **shown,
    )


def _entries(section: str | None) -> Iterator[dict[str, Any]]:
    for name in sections() if section is None else [section]:
        yield from load(name)


def reproduce(section: str | None = None, only: str | None = None) -> list[Row]:
    """Return every published number beside the one computed here.

    Parameters
    ----------
    section : str, optional
        One of `sections`; all by default.
    only : str, optional
        An id, or a pattern such as ``"zero.table1.*"``.

    Returns
    -------
    list of Row
        In the order of the data.  The run fails if a row is not `ok`.

    Raises
    ------
    UnknownNameError
        If there is no such section, or no number fits `only`.

    Examples
    --------
    >>> row, = reproduce(only="zero.table1.7.5B.n64.stage2")
    >>> row.published, row.ours, row.verdict, row.ok
    ('16.6', 16.640625, 'derives', True)
    """
    entries = list(_entries(section))
    if only is not None:
        chosen = [entry for entry in entries if fnmatch.fnmatchcase(entry["id"], only)]
        if not chosen:
            raise UnknownNameError("published number", only, [entry["id"] for entry in entries])
        entries = chosen
    return [_row(entry) for entry in entries]
