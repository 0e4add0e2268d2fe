"""What share of its peaks a stack of hardware and software reaches: a few numbers for all shapes.

The numbers stand in ``memsim/data/validation/efficiencies.toml``, in hundredths, and `fit` finds them again
from the rows that calibrate.  Nothing depends on a row or on a model.

>>> megatron = efficiency("Megatron-LM on A100")
>>> megatron == fit("Megatron-LM on A100")  # from the times of one layer
True
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from memsim import data_files
from memsim.formula import Array
from memsim.measured.measurements import Measurement, predict, rows_of
from refimpl.errors import OptionError, UnknownNameError

__all__ = ["LETTERS", "efficiency", "efficiency_letters", "fit", "stacks"]

LETTERS = {"compute": "η_c", "attention": "η_a", "memory": "η_m", "network": "η_n", "overlap": "ω"}
_STEP, _LEAST = 0.06, {"overlap": 0.0}  # an efficiency is at least 0.1, or 0.01 in the end
_FINE = (0.03, 0.01, 0.01, 0.01, 0.01)


def stacks() -> list[str]:
    """Return the stacks that have a model of efficiency."""
    return list(data_files.read("efficiencies", "validation"))


def efficiency(stack: str) -> dict[str, float]:
    """Return the efficiencies of a stack; one that is not named is 1.

    Raises
    ------
    UnknownNameError
        If it has none.

    Examples
    --------
    >>> sorted(efficiency("llm-foundry on A100"))
    ['attention', 'compute', 'memory', 'overlap']
    """
    data = data_files.read("efficiencies", "validation")
    if stack not in data:
        raise UnknownNameError("stack", stack, data)
    return {name: float(data[stack][name]) for name in LETTERS if name in data[stack]}


def efficiency_letters(stack: str) -> dict[str, float]:
    """Return the efficiencies of a stack by their letters in the formulas of a step."""
    return {LETTERS[name]: value for name, value in efficiency(stack).items()}


def fit(stack: str) -> dict[str, float]:
    """Return the efficiencies that fit the rows of a stack that calibrate, in hundredths.

    Raises
    ------
    OptionError
        If no row of it calibrates.

    Notes
    -----
    Least squares of ``log(predicted / measured)``: everywhere on a grid with steps of 0.06, then around the
    best one with steps of 0.03 and 0.01.  It starts from nothing but the rows.
    """
    names = list(efficiency(stack))
    rows = rows_of(stack, "calibration")
    if len(rows) < len(names):
        raise OptionError(f"{stack}: expected at least {len(names)} rows that calibrate; got {len(rows)}")
    best = _best(rows, names, [np.arange(_LEAST.get(name, 0.1), 1.001, _STEP) for name in names])
    for step in _FINE:
        around = step * np.arange(-3, 4)
        best = _best(
            rows,
            names,
            [
                np.clip(np.round(value + around, 2), _LEAST.get(name, 0.01), 1)
                for name, value in zip(names, best, strict=True)
            ],
        )
    return {name: float(value) for name, value in zip(names, best, strict=True)}


def _best(rows: tuple[Measurement, ...], names: list[str], axes: list[Array]) -> Array:
    grid = np.array(list(product(*axes)))
    losses = []
    for part in np.array_split(grid, max(1, len(grid) // 20_000)):
        tried: Mapping[str, Array] = {LETTERS[name]: part[:, i : i + 1] for i, name in enumerate(names)}
        measured = np.array([row.measured for row in rows])
        losses.append((np.log(predict(rows, tried)["value"] / measured) ** 2).mean(axis=-1))
    found: Array = grid[np.concatenate(losses).argmin()]
    return found
