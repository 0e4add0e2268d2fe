"""Models against measurements: every row with its error, and the bars that the errors are held to.

>>> rows = validate("table 5")
>>> len(rows), {row.use for row in rows}, max(abs(row.error) for row in rows) < 0.05
(8, {'held out'}, True)
>>> [bar.met for bar in bars(rows)]
[True]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from memsim import data_files, tile_schedules
from memsim.efficiency import efficiency_letters, stacks
from memsim.hardware import hardware
from memsim.measurements import SOURCES, predict, rows_of
from memsim.replay import replay
from refimpl.errors import UnknownNameError

__all__ = ["Bar", "Checked", "Summary", "bars", "summaries", "traffic_rows", "validate"]

HBM = "hbm"


@dataclass(frozen=True, slots=True)
class Checked:
    """One measured number beside the predicted one.

    Attributes
    ----------
    id, source, published, unit : str
        Its name, where it stands, its digits and their unit.
    predicted, error : float
        In `unit`, and ``predicted / published - 1``.
    use : {"calibration", "held out"}
        Whether efficiencies were fitted to it.
    stack, hardware, belongs : str
        What ran it, on what, and the set of rows that a bar is about.
    memory : float or None
        Bytes that the fullest rank is predicted to hold.
    fits : bool or None
        Whether they are there: it ran, so anything but True is wrong.
    """

    id: str
    source: str
    published: str
    unit: str
    predicted: float
    error: float
    use: str
    stack: str
    hardware: str
    belongs: str
    memory: float | None = None
    fits: bool | None = None


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


def validate(belongs: str | None = None) -> list[Checked]:
    """Return every measured number beside the predicted one, or those of one set.

    Raises
    ------
    UnknownNameError
        If there is no such set.
    """
    rows = [row for stack in stacks() for row in _times(stack)]
    if belongs is None or belongs not in {row.belongs for row in rows}:
        rows += traffic_rows()
    if belongs is None:
        return rows
    chosen = [row for row in rows if row.belongs == belongs]
    if not belongs or not chosen:
        known = sorted({row.belongs for row in rows} - {""})
        raise UnknownNameError("set of measurements", belongs, known)
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


def traffic_rows() -> list[Checked]:
    """Return the bytes between L2 and HBM that were counted, beside those of the replayed schedules.

    Each kernel starts with an empty cache, as the profiler makes it.
    """
    data = data_files.read(HBM, "validation")
    card = hardware(data["hardware"])
    cache = card.l2.value // data["partitions"]["value"]
    rows = []
    for group in data["group"]:
        shape = tile_schedules.AttentionShape(**group["shape"])
        kernels, arrays = getattr(tile_schedules, group["schedule"])(shape, **group["tiles"])
        named = {kernel.name: replay([kernel], arrays, cache=cache)[0] for kernel in kernels}
        for row in group["rows"]:
            predicted = getattr(named[row["kernel"]], row["counter"]) / 1e6
            rows.append(
                Checked(
                    id=row["id"],
                    source=f"{group['work']}, {group['identifier']}, {group['locator']}",
                    published=row["printed"],
                    unit="MB",
                    predicted=predicted,
                    error=predicted / float(row["printed"]) - 1,
                    use="held out",
                    stack=group["stack"],
                    hardware=card.name,
                    belongs=group["stack"],
                )
            )
    return rows


def summaries(rows: Iterable[Checked]) -> list[Summary]:
    """Return the errors of each stack on each card, rows that calibrate apart from those held out."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.stack, row.hardware, row.use), []).append(row.error)
    return [Summary(*key, len(errors), *_size(errors), sum(errors) / len(errors)) for key, errors in groups.items()]


def bars(rows: Sequence[Checked]) -> list[Bar]:
    """Return the bars whose rows are all among `rows`, and whether they are met; rows that calibrate count not."""
    found = []
    for name in (*SOURCES, HBM):
        for limit in data_files.read(name, "validation")["bar"]:
            held = [row for row in rows if row.belongs == limit["rows"] and row.use == "held out"]
            if held:
                found.append(_bar(limit, held))
    return found


def _bar(limit: dict[str, Any], held: Sequence[Checked]) -> Bar:
    mean, worst = _size([row.error for row in held])
    most = {key: _share(limit[key]) if key in limit else None for key in ("mean", "worst")}
    infeasible = tuple(row.id for row in held if limit.get("feasible") and not row.fits)
    within = (
        (most["mean"] is None or mean <= most["mean"]) and (most["worst"] is None or worst <= most["worst"])
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
