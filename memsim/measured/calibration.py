"""What one card reaches of its peaks: a few kernels timed on it, kept in a dated file apart from the physics.

Four numbers follow, for all shapes: shares of the memory bandwidth, of the rate of products and of attention,
and the seconds that a kernel takes to start.  The problems that calibrate are named here, before anything is
measured; the others show how far the numbers carry, and a file may lack them.

>>> truth = {"compute": 0.5, "scores": 0.5, "memory": 0.5, "start": 5e-6}
>>> times = [{**problem, "seconds": predicted_seconds(problem, "h200", **truth)} for problem in PROBLEMS]
>>> calibrated({"hardware": "h200", "date": "2026-11-29", "problem": times}).numbers() == truth
True
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsim.hardware import hardware
from memsim.kernel_times import KERNELS, Parts, kernel_parts
from memsim.measured.measured_files import of_kind, read_file
from refimpl.errors import OptionError

__all__ = [
    "KIND", "PROBLEMS", "Calibration", "calibrated", "calibrations", "predicted_seconds", "read_calibration",
    "use_of",
]  # fmt: skip

KIND = "calibration"
_SHARES = {"product": "compute", "attention": "scores", "gradient": "scores"}
# What is timed; of each kind the first ones calibrate: two copies, whose times differ by what they move.
_TIMED: dict[str, tuple[int, tuple[tuple[int, ...], ...]]] = {
    "copy": (2, ((1 << 30,), (1 << 28,), (1 << 31,), (1 << 26,), (1 << 22,))),
    "product": (
        2,
        (
            (8192, 8192, 8192), (16384, 4096, 4096), (4096, 4096, 4096), (2048, 2048, 2048),
            (8192, 12288, 4096), (8192, 4096, 11008), (8192, 1536, 1536), (2048, 28672, 8192),
            (1024, 1024, 1024), (4096, 4096, 1024), (512, 8192, 8192),
        ),
    ),
    "attention": (
        1,
        (
            (4, 16, 4096, 128), (1, 16, 16384, 128), (16, 16, 1024, 128), (8, 16, 4096, 64),
            (64, 16, 1024, 64), (8, 16, 2048, 128), (32, 16, 512, 128), (2, 16, 16384, 64),
        ),
    ),
    "gradient": (
        0,
        (
            (4, 16, 4096, 128), (1, 16, 16384, 128), (16, 16, 1024, 128), (8, 16, 4096, 64),
            (64, 16, 1024, 64),
        ),
    ),
}  # fmt: skip


def _problems(calibrate: bool) -> list[dict[str, Any]]:
    return [
        {"kind": kind, **dict(zip(KERNELS[kind].sizes, sizes, strict=True))}
        for kind, (fitted, listed) in _TIMED.items()
        for sizes in (listed[:fitted] if calibrate else listed)
    ]


PROBLEMS, _CALIBRATE = _problems(calibrate=False), _problems(calibrate=True)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a card reaches, and what each timed problem takes by that.

    Attributes
    ----------
    hardware, date : str
        Its name, and when it was measured.
    compute, scores, memory, start : float
        As of `memsim.planning.training_setting.Setting`.
    rows : tuple of mapping
        The problems with ``"seconds"``, ``"use"``, ``"predicted_s"`` and ``"error"``.
    """

    hardware: str
    date: str
    compute: float
    scores: float
    memory: float
    start: float
    rows: tuple[Mapping[str, Any], ...]

    def numbers(self) -> dict[str, float]:
        """Return the four numbers by their names in a setting."""
        return {name: getattr(self, name) for name in ("compute", "scores", "memory", "start")}


def use_of(problem: Mapping[str, Any]) -> str:
    """Return whether a problem is one of the few that calibrate, or is held out.

    >>> use_of({"kind": "copy", "bytes": 1 << 28}), use_of({"kind": "copy", "bytes": 3})
    ('calibration', 'held out')
    """
    sizes = {name: problem[name] for name in ("kind", *KERNELS[problem["kind"]].sizes)}
    return "calibration" if sizes in _CALIBRATE else "held out"


def predicted_seconds(
    problem: Mapping[str, Any],
    card: str,
    *,
    compute: float = 1,
    scores: float = 1,
    memory: float = 1,
    start: float = 0,
) -> float:
    """Return the seconds that a problem takes on a card: fp16, attention causal.

    Parameters
    ----------
    problem : mapping
        Its ``"kind"`` and sizes, as in `PROBLEMS`.
    card : str
        Its name.
    compute, scores, memory, start : float
        As of a `Calibration`; by default the card reaches its peaks.

    Raises
    ------
    OptionError
        If memsim does not know how many exponentials the card has a second.
    """
    shares = {"compute": compute, "scores": scores, "": 1.0}
    share = shares[_SHARES.get(problem["kind"], "")]
    return kernel_parts(problem["kind"], problem, hardware(card)).seconds(share, memory, start)


def calibrated(document: Mapping[str, Any]) -> Calibration:
    """Return the numbers that the problems of a file give.

    Raises
    ------
    OptionError
        If a kind lacks its problems that calibrate, or one is not of that format.

    Notes
    -----
    Memory's share and the start are those with which both copies that calibrate take the time they took.  Of
    the other kinds the share is the geometric mean over those that calibrate, of what is left of their times.
    """
    card = hardware(document["hardware"])
    timed = [(_checked(row), row["seconds"]) for row in document.get("problem", ())]
    chosen: dict[str, list[tuple[Parts, float]]] = {kind: [] for kind in _TIMED}
    for row, seconds in timed:
        if use_of(row) == "calibration":
            chosen[row["kind"]].append((kernel_parts(row["kind"], row, card), seconds))
    for kind, (fitted, _) in _TIMED.items():
        if len(chosen[kind]) != fitted:
            raise OptionError(
                f"calibration: expected the {kind} problems that calibrate, {fitted}; "
                f"the file has {len(chosen[kind])} of them"
            )
    memory, start = _line([(parts.moved, seconds) for parts, seconds in chosen["copy"]])
    compute, scores = (_share(chosen[kind], memory, start) for kind in ("product", "attention"))
    numbers = {"compute": compute, "scores": scores, "memory": memory, "start": start}
    rows = []
    for row, seconds in timed:
        predicted = predicted_seconds(row, card.name, **numbers)
        error = predicted / seconds - 1
        rows.append({**row, "use": use_of(row), "predicted_s": predicted, "error": error})
    return Calibration(card.name, document["date"], **numbers, rows=tuple(rows))


def _line(copies: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return memory's share and the seconds of a start, of two copies."""
    (less, short), (more, long) = sorted(copies)
    if long <= short:
        raise OptionError(f"calibration: expected the larger copy to take longer; got {short} s and {long} s")
    share = min(1.0, round((more - less) / (long - short), 3))
    return share, max(0.0, round(short - less / share, 7))


def _share(timed: Iterable[tuple[Parts, float]], memory: float, start: float) -> float:
    logs = []
    for parts, seconds in timed:
        left = seconds - parts.starts * start - parts.exposed / memory
        logs.append(math.log(parts.computed / left) if left > 0 else 0.0)
    return min(1.0, round(math.exp(sum(logs) / len(logs)), 3))


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return kind, sizes and seconds of a row of a file."""
    kind, seconds = row.get("kind"), row.get("seconds")
    if kind not in KERNELS:
        raise OptionError(f"calibration: expected one of {', '.join(KERNELS)}; got {dict(row)}")
    sizes = KERNELS[kind].sizes
    if not all(type(row.get(name)) is int and row[name] > 0 for name in sizes):
        raise OptionError(f"calibration: expected whole sizes {', '.join(sizes)}; got {dict(row)}")
    if not isinstance(seconds, float) or not 0 < seconds < math.inf:
        raise OptionError(f"calibration: expected seconds above 0; got {seconds!r} of {dict(row)}")
    return {name: row[name] for name in ("kind", *sizes, "seconds")}


def calibrations() -> list[Calibration]:
    """Return the calibrations that memsim ships with."""
    return [calibrated(document) for document in of_kind(KIND)]


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
