"""What one card reaches of its peaks: a few kernels timed on it, kept in a dated file apart from the physics.

Three shares follow: of the memory bandwidth by copies, of the peak rate by matrix products, whose waves of
tiles the formulas count, and by attention.  The problems that calibrate are named here, before anything is
measured; the others show how far the shares carry.

>>> times = [{**problem, "seconds": 2 * float(least_seconds(problem, "h200"))} for problem in PROBLEMS]
>>> found = calibrated({"hardware": "h200", "problem": times})
>>> found.shares()
{'compute': 0.5, 'scores': 0.5, 'memory': 0.5}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsim.formula import evaluate
from memsim.hardware import hardware
from memsim.measured.measured_files import read_file
from memsim.units import Number
from memsim.waves import extra
from refimpl.errors import OptionError

__all__ = ["KIND", "PROBLEMS", "Calibration", "calibrated", "least_seconds", "read_calibration"]

KIND = "calibration"
_SHARES = {"product": "compute", "attention": "scores", "copy": "memory"}
_SIZES = {"product": ("M", "N", "K"), "attention": ("B", "H", "N", "D"), "copy": ("bytes",)}


def _problems() -> list[dict[str, Any]]:
    """Return what is timed; of each kind the first ones calibrate."""
    sizes: dict[str, tuple[int, list[tuple[int, ...]]]] = {
        "copy": (1, [(1 << 30,), (1 << 28,), (1 << 31,)]),
        "product": (
            2,
            [
                (8192, 8192, 8192), (16384, 4096, 4096), (4096, 4096, 4096), (2048, 2048, 2048),
                (8192, 12288, 4096), (8192, 4096, 11008), (8192, 1536, 1536), (2048, 28672, 8192),
            ],
        ),
        "attention": (
            1,
            [
                (4, 16, 4096, 128), (1, 16, 16384, 128), (16, 16, 1024, 128), (8, 16, 4096, 64),
                (64, 16, 1024, 64),
            ],
        ),
    }  # fmt: skip
    return [
        {"kind": kind, "use": "calibration" if place < fitted else "held out"}
        | dict(zip(_SIZES[kind], values, strict=True))
        for kind, (fitted, listed) in sizes.items()
        for place, values in enumerate(listed)
    ]


PROBLEMS = _problems()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Shares of its peaks that a card reaches, and what each timed problem takes by them.

    Attributes
    ----------
    hardware : str
        Its name.
    compute, scores, memory : float
        As of `memsim.planning.training_setting.Setting`.
    rows : tuple of mapping
        The problems with ``"seconds"``, ``"predicted_s"`` and ``"error"``.
    """

    hardware: str
    compute: float
    scores: float
    memory: float
    rows: tuple[Mapping[str, Any], ...]

    def shares(self) -> dict[str, float]:
        """Return the shares by their names in a setting."""
        return {"compute": self.compute, "scores": self.scores, "memory": self.memory}


def least_seconds(problem: Mapping[str, Any], card: str) -> Number:
    """Return the seconds that a problem takes where every share is 1: fp16, attention causal.

    A copy reads and writes; a product computes whole waves of tiles, also where part of them is not wanted.
    """
    found = hardware(card)
    if problem["kind"] == "copy":
        return evaluate("2*n/M", {"n": problem["bytes"], "M": found.hbm_bandwidth.value})
    rate = found.peak("fp16").value
    if problem["kind"] == "attention":
        sizes = {name: problem[name] for name in "BHND"}
        return evaluate("2B*H*N*N*D/R", {**sizes, "R": rate})
    sizes = {name: problem[name] for name in "MNK"}
    waves = extra(str(problem["M"]), str(problem["N"]))
    return evaluate(f"2M*N*K/R*({waves})", {**sizes, "R": rate, "S": found.sms.value})


def calibrated(document: Mapping[str, Any]) -> Calibration:
    """Return the shares that the problems of a file give, geometric means over those that calibrate.

    Raises
    ------
    OptionError
        If a kind has no problem that calibrates, or one is not of that format.
    """
    least = [(row, _least(row, document["hardware"])) for row in document.get("problem", ())]
    shares = {}
    for kind, name in _SHARES.items():
        logs = [
            math.log(seconds / row["seconds"])
            for row, seconds in least
            if (row["kind"], row["use"]) == (kind, "calibration")
        ]
        if not logs:
            raise OptionError(f"calibration: expected a {kind} that calibrates; the file has none")
        shares[name] = min(1.0, round(math.exp(sum(logs) / len(logs)), 3))
    rows = []
    for row, seconds in least:
        predicted = seconds / shares[_SHARES[row["kind"]]]
        rows.append({**row, "predicted_s": predicted, "error": predicted / row["seconds"] - 1})
    return Calibration(document["hardware"], **shares, rows=tuple(rows))


def _least(row: Mapping[str, Any], card: str) -> float:
    kind, seconds = row.get("kind"), row.get("seconds")
    if kind not in _SIZES or row.get("use") not in ("calibration", "held out"):
        raise OptionError(f"calibration: expected one of {', '.join(_SIZES)} and its use; got {dict(row)}")
    if not all(isinstance(row.get(name), int) and row[name] > 0 for name in _SIZES[kind]):
        raise OptionError(f"calibration: expected whole sizes {', '.join(_SIZES[kind])}; got {dict(row)}")
    if not isinstance(seconds, float) or not 0 < seconds < math.inf:
        raise OptionError(f"calibration: expected seconds above 0; got {seconds!r} of {dict(row)}")
    return float(least_seconds(row, card))


def read_calibration(path: str | Path) -> Calibration:
    """Return the calibration of a file that `frugal calibrate` wrote.

    Raises
    ------
    OptionError, UnknownNameError
        If it is no such file, or of hardware that memsim does not know.
    OSError
        If it cannot be read.
    """
    return calibrated(read_file(path, KIND))
