"""What Nsight Compute counted: its CSV read into bytes, kernel by kernel.

Run as ``ncu --csv --page raw --clock-control none --metrics ...``; other lines that programs print are passed
over.  Numbers come with a unit, which a row below the header names, and with commas between thousands.

>>> report = '''"ID","Kernel Name","Grid Size","dram__bytes_read.sum"
... "","","","Mbyte"
... "0","copy","(8, 1, 1)","1,402.5"
... '''
>>> (launch,) = parse_report(report)
>>> launch
Launch(kernel='copy', grid=(8, 1, 1), bytes={'dram_read': 1402500000})
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from refimpl.errors import OptionError

__all__ = ["METRICS", "Launch", "between_markers", "parse_report"]

# What is counted, and the metrics whose sum it is: bytes between L2 and HBM, and between multiprocessors and
# L2.  The slices of the L2 move more: what fills the cache, and what crosses between its halves; and fewer
# requests reach them than multiprocessors make, for Hopper merges equal ones of several multiprocessors.
METRICS = {
    "dram_read": ("dram__bytes_read.sum",),
    "dram_write": ("dram__bytes_write.sum",),
    "l2": ("l1tex__m_xbar2l1tex_read_bytes.sum", "l1tex__m_l1tex2xbar_write_bytes.sum"),
    "slices": ("lts__t_bytes.sum",),
}
_UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}


class Launch(NamedTuple):
    """One kernel that ran: its name, its blocks, and bytes by the counters of `METRICS` that were read."""

    kernel: str
    grid: tuple[int, ...]
    bytes: dict[str, int]


def parse_report(text: str) -> list[Launch]:
    """Return the launches of a CSV report in the order in which they ran.

    Parameters
    ----------
    text : str
        Standard output of ``ncu --csv --page raw``, or what it logged; lines before the header may be
        anything, and lines that start with ``==`` anywhere.

    Raises
    ------
    OptionError
        If there is no header, or a row, unit or number is not of that format.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("==")]
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise OptionError('Nsight Compute: expected a header that starts with "ID"; is it a CSV report?')
    header, *rows = csv.reader(lines[start:])
    missing = {"Kernel Name", "Grid Size"} - set(header)
    if missing or not rows:
        raise OptionError(f"Nsight Compute: expected columns {sorted(missing)} and rows; got {header[:8]}")
    units = dict(zip(header, rows[0], strict=False))
    return [_launch(dict(zip(header, row, strict=False)), units) for row in _of_kernels(rows[1:], header)]


def _of_kernels(rows: Iterable[Sequence[str]], header: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the rows with a number for a name; whatever else a program printed in between is shorter."""
    for row in rows:
        if len(row) == len(header) and row[0].isdigit():
            yield row
        elif row and row[0].isdigit():
            raise OptionError(f"Nsight Compute: expected {len(header)} columns; got {len(row)}: {row[:3]}")


def _launch(row: dict[str, str], units: dict[str, str]) -> Launch:
    found = {}
    for counter, metrics in METRICS.items():
        texts = [row.get(metric, "").replace(",", "") for metric in metrics]
        if all(text and text != "n/a" for text in texts):
            parts = zip(texts, metrics, strict=True)
            found[counter] = sum(_bytes(text, units[metric], metric) for text, metric in parts)
    grid = tuple(int(part) for part in row["Grid Size"].strip("() ").split(","))
    return Launch(row["Kernel Name"], grid, found)


def _bytes(number: str, unit: str, metric: str) -> int:
    if unit not in _UNITS:
        raise OptionError(f"Nsight Compute: {metric}: expected bytes; got the unit {unit!r}")
    try:
        return round(Fraction(number) * _UNITS[unit])
    except ValueError:
        raise OptionError(f"Nsight Compute: {metric}: expected a number; got {number!r}") from None


def between_markers(launches: Iterable[Launch], marker: str) -> dict[int, list[Launch]]:
    """Return the launches after each kernel whose name has `marker` in it, by the first size of its grid.

    >>> ran = [Launch(*one, {}) for one in (("mark", (1,)), ("a", (7,)), ("b", (7,)), ("mark", (3,)))]
    >>> {key: [launch.kernel for launch in found] for key, found in between_markers(ran, "mark").items()}
    {1: ['a', 'b'], 3: []}

    Raises
    ------
    OptionError
        If a marker comes twice.
    """
    found: dict[int, list[Launch]] = {}
    current: list[Launch] = []  # what ran before the first marker belongs to nothing
    for launch in launches:
        if marker in launch.kernel:
            if launch.grid[0] in found:
                raise OptionError(f"Nsight Compute: expected each marker once; got {launch.grid[0]} twice")
            current = found.setdefault(launch.grid[0], [])
        else:
            current.append(launch)
    return found
