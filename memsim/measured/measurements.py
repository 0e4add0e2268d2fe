"""Measured times of training, as data, and what the formulas of a step say of each.

The rows stand in ``memsim/data/validation/*.toml``: the digits as printed, what was trained and how it was
divided, and whether the row calibrates (`memsim.planning.efficiency`) or is held out.

>>> row = measurement("megatron.table5.175B.full")
>>> row.printed, row.unit, row.use, row.division.pipeline
('18.13', 's', 'held out', 8)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from memsim import data_files
from memsim.derivation import Definition, derive_arrays
from memsim.formula import Array, evaluate_array
from memsim.hardware import hardware
from memsim.model import dense
from memsim.parameters import parameters
from memsim.planning.division import Division
from memsim.planning.division_memory import MEMORY
from memsim.planning.division_time import TIME
from memsim.planning.training_setting import Setting
from memsim.units import Number
from memsim.waves import in_waves
from refimpl.errors import UnknownNameError

__all__ = ["QUANTITIES", "SOURCES", "Measurement", "measurement", "measurements", "predict", "rows_of"]

# What is measured, from the quantities of a step; a time of a layer is the mean over a stage's layers.
QUANTITIES: dict[str, str] = {
    "step": "step",
    "tokens/s/GPU": "B*s/(step*G)",
    "hardware rate": "hfu*R_x",
    "layer forward": "(forward + tensor_f)*p/L",
    "layer backward": "(gradient + again + tensor - tensor_f)*p/L",
}
_SCALES = {"s": 1.0, "ms": 1e3, "TFLOP/s": 1e-12, "tokens/s/GPU": 1.0}
SOURCES = ("megatron", "llm_foundry")
_CHAIN: tuple[Definition, ...] = (*MEMORY, *in_waves(TIME))
_SETTING = {field.name for field in fields(Setting)} - {"model", "accelerators"}
_DIVISION = {field.name for field in fields(Division)}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured number.

    Attributes
    ----------
    id, source, printed, unit : str
        Its name, where it stands, its digits and unit.
    quantity : str
        A key of `QUANTITIES`.
    stack : str
        Hardware and software that share a model of efficiency.
    use : {"calibration", "held out"}
        Whether efficiencies may be fitted to it.
    belongs : str
        The set of rows that a bar is about, or nothing.
    setting, division : Setting, Division
        What was trained, with every efficiency 1, and how it was divided.
    """

    id: str
    source: str
    printed: str
    unit: str
    quantity: str
    stack: str
    use: Literal["calibration", "held out"]
    belongs: str
    setting: Setting
    division: Division

    @property
    def measured(self) -> float:
        """The printed number, in `unit`."""
        return float(self.printed)

    @property
    def is_step(self) -> bool:
        """Whether a whole step ran, which must then have fitted into memory."""
        return not self.quantity.startswith("layer")


@lru_cache(maxsize=1)
def measurements() -> tuple[Measurement, ...]:
    """Return every measured time, in the order of the data."""
    return tuple(row for name in SOURCES for row in _read(name))


def measurement(name: str) -> Measurement:
    """Return the measurement called `name`.

    Raises
    ------
    UnknownNameError
        If there is none.
    """
    known = {row.id: row for row in measurements()}
    if name not in known:
        raise UnknownNameError("measurement", name, known)
    return known[name]


def rows_of(stack: str, use: str | None = None) -> tuple[Measurement, ...]:
    """Return the measurements of a stack, of one use or all."""
    return tuple(row for row in measurements() if row.stack == stack and use in (None, row.use))


def _read(name: str) -> Iterator[Measurement]:
    data = data_files.read(name, "validation")
    for group in data["group"]:
        shared = {**data["settings"], **{key: value for key, value in group.items() if key != "rows"}}
        for row in group["rows"]:
            yield _measurement(data, {**shared, **row})


def _measurement(data: Mapping[str, Any], row: dict[str, Any]) -> Measurement:
    shape = data["shapes"][row["shape"]]
    described = dense(
        **shape, ffn=4 * shape["width"], vocabulary=row["vocabulary"], positions=row["sequence"]
    )
    counted = parameters(model=described).total
    if row.get("parameters", counted) != counted:
        raise ValueError(f"{row['id']}: {row['parameters']} parameters are printed; the shape has {counted}")
    setting = Setting(
        replace(described, name=row["shape"]),
        accelerators=row["gpus"],
        **{key: value for key, value in row.items() if key in _SETTING},
    )
    sizes = {key: value for key, value in row.items() if key in _DIVISION}
    ranks = row["gpus"] // (sizes.get("tensor", 1) * sizes.get("pipeline", 1))
    work, identifier = (row.get(key, data.get(key)) for key in ("work", "identifier"))
    return Measurement(
        id=row["id"],
        source=f"{work}, {identifier}, {row['locator']}",
        printed=row["printed"],
        unit=row.get("unit", row["quantity"]),
        quantity=row["quantity"],
        stack=row["stack"],
        use=row["use"],
        belongs=row.get("set", ""),
        setting=setting,
        division=Division(data=ranks, **sizes),
    )


def predict(rows: Sequence[Measurement], efficiencies: Mapping[str, float | Array]) -> dict[str, Array]:
    """Return what the formulas of a step say of each row.

    Parameters
    ----------
    rows : sequence of Measurement
        All of one stack.
    efficiencies : mapping of str to float or ndarray
        Values of letters that take the place of the settings' own, such as ``{"η_c": 0.8}``; arrays of shape
        (k, 1) try k values at once.

    Returns
    -------
    dict of str to ndarray
        ``"value"`` in each row's unit, ``"memory"`` in bytes and ``"fits"``, of shape (rows,) or (k, rows).
    """
    letters = [_letters(row) for row in rows]
    given: dict[str, float | Array] = {
        name: np.array([float(values[name]) for values in letters]) for name in letters[0]
    }
    found = derive_arrays(_CHAIN, given | dict(efficiencies))
    value = np.stack(
        np.broadcast_arrays(*(evaluate_array(formula, found) for formula in QUANTITIES.values()))
    )
    chosen = [list(QUANTITIES).index(row.quantity) for row in rows]
    scale = np.array([_SCALES[row.unit] for row in rows])
    picked = np.moveaxis(value, 0, -1)[..., np.arange(len(rows)), chosen] * scale
    capacity = np.array([float(hardware(row.setting.hardware).hbm.value) for row in rows])
    memory = np.broadcast_to(np.asarray(found["memory"]), picked.shape)
    return {"value": picked, "memory": memory, "fits": memory <= capacity}


def _letters(row: Measurement) -> dict[str, Number]:
    card = hardware(row.setting.hardware)
    return row.setting.letters() | row.division.letters(row.setting) | {"S": card.sms.value}
