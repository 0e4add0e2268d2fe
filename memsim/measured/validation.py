"""Models against measurements: every row with its error, and the bars that the errors are held to.

>>> rows = validate("table 5")
>>> len(rows), {row.use for row in rows}, max(abs(row.error) for row in rows) < 0.05
(8, {'held out'}, True)
>>> [bar.met for bar in bars(rows)]
[True]
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from memsim import data_files
from memsim.measured.checked import Checked
from memsim.measured.counted_traffic import traffic_ids, traffic_rows
from memsim.measured.kernel_rows import kernel_rows
from memsim.measured.measurements import SOURCES, predict, rows_of
from memsim.measured.peak_memory import memory_rows
from memsim.planning.efficiency import efficiency_letters, stacks
from refimpl.errors import UnknownNameError

__all__ = ["Bar", "Checked", "Summary", "bars", "summaries", "validate"]

HBM, PEAKS = "hbm", "memory"


class Summary(NamedTuple):
    """Mean of the absolute errors of some rows, the largest one, and the mean with its sign."""

    stack: str
    hardware: str
    use: str
    rows: int
    mean: float
    worst: float
    bias: float


class Bar(NamedTuple):
    """What the rows of a set are held to: limits of mean and worst error, and that all fit into memory."""

    name: str
    source: str
    rows: int
    mean: float
    mean_limit: float | None
    worst: float
    worst_limit: float | None
    infeasible: tuple[str, ...]
    met: bool


def validate(belongs: str | None = None, only: str | None = None) -> list[Checked]:
    """Return measured numbers beside the predicted ones.

    Parameters
    ----------
    belongs : str, optional
        The set of rows that a bar is about; all rows by default.
    only : str, optional
        An id, or a pattern such as ``"foundry.a100-80gb.*"``.

    Returns
    -------
    list of Checked
        In the order of the data.

    Raises
    ------
    UnknownNameError
        If there is no such set, or no row fits `only`.
    """
    rows = [*(row for stack in stacks() for row in _times(stack)), *kernel_rows(), *memory_rows()]
    if belongs is not None:
        rows = [row for row in (*rows, *traffic_rows()) if row.belongs == belongs]
        if not belongs or not rows:
            known = [
                bar["rows"]
                for name in (*SOURCES, HBM, PEAKS)
                for bar in data_files.read(name, "validation")["bar"]
            ]
            raise UnknownNameError("set of measurements", belongs, known)
    elif only is None or any(fnmatch.fnmatchcase(name, only) for name in traffic_ids()):
        rows += traffic_rows()
    chosen = [row for row in rows if only is None or fnmatch.fnmatchcase(row.id, only)]
    if not chosen:
        raise UnknownNameError("measured row", str(only), [*(row.id for row in rows), *traffic_ids()])
    return chosen


def _times(stack: str) -> list[Checked]:
    rows = rows_of(stack)
    found = predict(rows, efficiency_letters(stack))
    return [
        Checked(
            id=row.id,
            source=row.source,
            published=row.printed,
            unit=row.unit,
            predicted=float(value),
            error=float(value) / row.measured - 1,
            use=row.use,
            stack=stack,
            hardware=row.setting.hardware,
            belongs=row.belongs,
            memory=float(memory) if row.is_step else None,
            fits=bool(fits) if row.is_step else None,
        )
        for row, value, memory, fits in zip(rows, found["value"], found["memory"], found["fits"], strict=True)
    ]


def summaries(rows: Iterable[Checked]) -> list[Summary]:
    """Return the errors of each stack on each card, rows that calibrate apart from those held out."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.stack, row.hardware, row.use), []).append(row.error)
    return [
        Summary(*key, len(errors), *_size(errors), sum(errors) / len(errors))
        for key, errors in groups.items()
    ]


def bars(rows: Sequence[Checked]) -> list[Bar]:
    """Return the bars whose held-out rows are all among `rows`, and whether they are met."""
    found = []
    for name in (*SOURCES, HBM, PEAKS):
        data = data_files.read(name, "validation")
        known = _sets(name, data)
        for limit in data["bar"]:
            held = [row for row in rows if row.belongs == limit["rows"] and row.use == "held out"]
            if held and len(held) == known.count(limit["rows"]):
                found.append(_bar(limit, held))
    return found


def _sets(name: str, data: dict[str, Any]) -> list[str]:
    """Return for each held-out row of a file of data, or of what was measured here, the set that it is in."""
    if name == HBM:
        return list(traffic_ids().values())
    if name == PEAKS:
        return [row.belongs for row in memory_rows()]
    return [row.get("set", group.get("set", "")) for group in data["group"] for row in group["rows"]]


def _bar(limit: dict[str, Any], held: Sequence[Checked]) -> Bar:
    mean, worst = _size([row.error for row in held])
    most = {key: _share(limit[key]) if key in limit else None for key in ("mean", "worst")}
    infeasible = tuple(row.id for row in held if limit.get("feasible") and not row.fits)
    within = (most["mean"] is None or mean <= most["mean"]) and (
        most["worst"] is None or worst <= most["worst"]
    )
    return Bar(
        limit["name"], limit["source"], len(held), mean, most["mean"], worst, most["worst"], infeasible,
        within and not infeasible,
    )  # fmt: skip


def _share(text: str) -> float:
    return float(Fraction(text.removesuffix("%")) / 100)


def _size(errors: Sequence[float]) -> tuple[float, float]:
    """Return mean and largest of the absolute errors."""
    sizes = [abs(error) for error in errors]
    return sum(sizes) / len(sizes), max(sizes)
