"""Predicted against measured steps of training: efficiencies fitted on some rows, errors shown on the others.

The physics has no free number but the efficiencies of products, attention, memory and links.  `validate` fits
those four on the rows that a data file names, ``memsim/data/measured/*.toml``, and reports the error of the
rest, which took no part in it.  Attention with scores in memory counts as products like all others.

>>> found = validate("megatron-table1")  # fitted on another paper's eight times
>>> found.held_out_error < 0.079  # that of the best other simulator on these ten rows
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from memsim import data_files
from memsim.derivation import derive_arrays, needed
from memsim.division import Division
from memsim.division_memory import MEMORY
from memsim.division_time import TIME
from memsim.formula import Array, evaluate
from memsim.hardware import hardware
from memsim.model import Model, dense
from memsim.training_setting import Setting
from refimpl.errors import UnknownNameError

__all__ = [
    "Efficiencies",
    "Measured",
    "Validated",
    "Validation",
    "fit",
    "measured",
    "predicted",
    "sets",
    "validate",
]

_NEEDED = needed((*MEMORY, *TIME), ("step", "memory"))
# What is tried: products, attention, memory, links.
_GRID = (
    np.arange(30, 100, 5) / 100,
    np.arange(10, 100, 5) / 100,
    np.arange(20, 101, 10) / 100,
    np.array([0.5, 0.7, 0.9]),
)


class Efficiencies(NamedTuple):
    """Shares of their peaks that products, attention, memory and links reach."""

    compute: float
    scores: float
    memory: float
    network: float


class Measured(NamedTuple):
    """A step that somebody ran: what, how, what was printed, and the step's seconds that follow from it."""

    name: str
    setting: Setting
    division: Division
    printed: str
    unit: str
    seconds: float


class Validated(NamedTuple):
    """A measured step and its prediction.

    Attributes
    ----------
    step : Measured
        What was run.
    seconds, memory : float
        Predicted: of a step, and bytes of the fullest rank.
    deviation : float
        Predicted rate over the measured one, less 1.
    fitted : bool
        Whether the row took part in the fit.
    fits : bool
        Whether the prediction fits into memory, as the run did.
    """

    step: Measured
    seconds: float
    memory: float
    deviation: float
    fitted: bool
    fits: bool


class Validation(NamedTuple):
    """All rows of a set under the efficiencies that were fitted, and what others reached on it."""

    efficiencies: Efficiencies
    rows: tuple[Validated, ...]
    source: str
    others: str

    @property
    def held_out_error(self) -> float:
        """Mean of the absolute deviations of the rows that took no part in the fit; of all, if all did."""
        held = [row for row in self.rows if not row.fitted] or self.rows
        return float(np.mean([abs(row.deviation) for row in held]))


@lru_cache(maxsize=1)
def _sets() -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for file in data_files.names("measured"):
        data = data_files.read(file, "measured")
        found |= {entry["name"]: (data, entry) for entry in data["set"]}
    return found


def sets() -> list[str]:
    """Return the names of the sets of measured steps.

    >>> {"megatron-table1", "foundry-a100-80gb"} <= set(sets())
    True
    """
    return list(_sets())


def _model(data: Mapping[str, Any], name: str, sequence: int) -> Model:
    layers, width, heads = data["models"][name]
    shape = dict(data["model"])
    shape["ffn"] = shape["ffn"] * width
    return dense(layers=layers, width=width, heads=heads, **{"positions": sequence, **shape})


def measured(name: str) -> list[Measured]:
    """Return the steps of a set.

    Raises
    ------
    UnknownNameError
        If there is no such set.

    Examples
    --------
    >>> step = measured("megatron-table5")[3]
    >>> step.name, step.printed, step.division.interleave
    ('175B', '13.75', 3)
    """
    if name not in _sets():
        raise UnknownNameError("set of measured steps", name, sets())
    data, entry = _sets()[name]
    shared = {**{key: value for key, value in data.items() if key != "set"}, **entry}
    return [_step(shared, dict(zip(shared["columns"], row, strict=True))) for row in entry["rows"]]


def _step(data: Mapping[str, Any], row: dict[str, Any]) -> Measured:
    name, printed, sequence = row.pop("model"), row.pop("printed"), row.pop("sequence")
    ranks = row.pop("accelerators")
    data_ranks = ranks // (row.get("tensor", 1) * row.get("pipeline", 1))
    many = row.pop("accumulated", None)
    batch = row["micro_batch"] * data_ranks * many if many else row.pop("batch")
    model = _model(data, name, sequence)
    setting = Setting(model, data["hardware"], ranks, batch, sequence, **data["setting"])
    division = Division(data=data_ranks, precision=data.get("precision", "bf16"), **row)
    value = float(printed)
    match data["unit"]:
        case "s":
            seconds = value
        case "tokens/s/GPU":
            seconds = batch * sequence / (value * ranks)
        case _:
            operations = evaluate(data["work_done"], setting.letters())
            seconds = float(operations) / (value * 1e12 * ranks)
    return Measured(name, setting, division, printed, data["unit"], seconds)


def predicted(step: Measured, efficiencies: Sequence[float | Array]) -> tuple[float | Array, float]:
    """Return the seconds of a step at each of the efficiencies, arrays or numbers, and its memory."""
    exact = step.setting.letters() | step.division.letters(step.setting)
    letters: dict[str, float | Array] = {key: float(value) for key, value in exact.items()}
    letters |= dict(zip(("η_c", "η_a", "η_m", "η_n"), efficiencies, strict=True))
    found = derive_arrays(_NEEDED, letters)
    return found["step"], float(np.max(found["memory"]))


def fit(steps: Sequence[Measured]) -> Efficiencies:
    """Return the efficiencies, of a grid, at which the mean absolute deviation of the steps is least."""
    compute, scores, memory, network = np.meshgrid(*_GRID, indexing="ij")
    if any(step.setting.attention == "standard" for step in steps):
        scores = compute
    total = np.zeros(compute.shape)
    for step in steps:
        seconds, _ = predicted(step, (compute, scores, memory, network))
        total += np.abs(step.seconds / seconds - 1)
    best = int(np.argmin(total))
    return Efficiencies(*(float(axis.flat[best]) for axis in (compute, scores, memory, network)))


def validate(name: str, efficiencies: Efficiencies | None = None) -> Validation:
    """Return the predictions of a set, at the efficiencies fitted as its data file says.

    Parameters
    ----------
    name : str
        One of `sets`.
    efficiencies : Efficiencies, optional
        Take these and fit nothing.

    Raises
    ------
    UnknownNameError
        If there is no such set.
    """
    steps = measured(name)
    data, entry = _sets()[name]
    every = entry.get("fit_every", 0) if efficiencies is None else 0
    chosen = [bool(every) and place % every == 0 for place in range(len(steps))]
    if efficiencies is None:
        if "fit_on" in entry:
            efficiencies = fit(measured(entry["fit_on"]))
        else:
            efficiencies = fit([step for step, used in zip(steps, chosen, strict=True) if used])
    rows = []
    for step, used in zip(steps, chosen, strict=True):
        seconds, memory = predicted(step, efficiencies)
        capacity = hardware(step.setting.hardware).hbm.value
        deviation = step.seconds / float(seconds) - 1
        rows.append(Validated(step, float(seconds), memory, deviation, used, memory <= capacity))
    source = f"{data['work']}, {data['identifier']}, {data['locator']}"
    return Validation(efficiencies, tuple(rows), source, entry.get("others", ""))
