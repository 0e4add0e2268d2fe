"""``frugal io --op attention``: the rows, the table and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from cli.parameters import PRECISIONS
from cli.quantities import bytes_text
from cli.result import Column, Result, Row
from cli.roofline import columns_of_traffic, draw_traffic, sources_of_card, traffic_row, varying

if TYPE_CHECKING:
    from memsim.estimate import Estimate
    from memsim.hardware import Hardware

__all__ = ["ALGORITHMS", "DEFAULT_SRAM", "DIRECTIONS", "Attention", "attention_result"]

ALGORITHMS = ("standard", "flash1", "flash2")
DEFAULT_SRAM = 192 * 1024  # of one A100 multiprocessor: arXiv:2205.14135, section 2.1
DIRECTIONS: dict[str, tuple[Literal["forward", "backward"], ...]] = {
    "fwd": ("forward",),
    "bwd": ("backward",),
    "both": ("forward", "backward"),
}
_INPUTS = ("n", "d", "heads", "batch", "dtype", "sram_bytes", "pass", "algorithm")


@dataclass(frozen=True, slots=True)
class Attention:
    """One combination of the options; `direction` is fwd, bwd or both."""

    n: int
    d: int
    heads: int
    batch: int
    dtype: str
    sram_bytes: int
    algorithm: Any
    direction: str
    accumulator_bytes: int

    def traffic_options(self) -> list[dict[str, Any]]:
        """Return the arguments of `memsim.attention_io` for each pass; its SRAM is in elements."""
        itemsize = PRECISIONS[self.dtype][0]
        return [
            {
                "algorithm": self.algorithm,
                "direction": direction,
                "Tq": self.n,
                "D": self.d,
                "H": self.heads,
                "B": self.batch,
                "itemsize": itemsize,
                "accumulator_itemsize": self.accumulator_bytes,
                "sram": None if self.algorithm == "standard" else self.sram_bytes // itemsize,
            }
            for direction in DIRECTIONS[self.direction]
        ]

    def flops(self) -> list[Estimate]:
        """Return the matrix products of each pass."""
        from memsim.flops import attention_flops

        return [
            attention_flops(
                algorithm="standard" if self.algorithm == "standard" else "flash",
                direction=direction,
                Tq=self.n,
                D=self.d,
                H=self.heads,
                B=self.batch,
            )
            for direction in DIRECTIONS[self.direction]
        ]


def attention_result(workloads: Iterable[Attention], card: Hardware | None, explain: bool) -> Result:
    """Return what ``frugal io`` says of `workloads`."""
    from memsim.attention_io import attention_io

    workloads = list(workloads)
    rows = [_row(workload, card, explain) for workload in workloads]
    sources = dict.fromkeys(
        term.source
        for workload in {one.algorithm: one for one in workloads}.values()
        for options in workload.traffic_options()
        for term in attention_io(**options).terms
    )
    formats = [PRECISIONS[workload.dtype][1] for workload in workloads]
    sources |= dict.fromkeys(sources_of_card(card, formats))
    details = []
    for row in rows if explain else ():
        details += ["", f"{row['algorithm']}, n {row['n']}, d {row['d']}, SRAM {row['sram_bytes']} B"]
        details += [f"  {line}" for line in row["explanation"]]
    return Result(
        rows,
        _columns(rows),
        sources=list(sources),
        details=details,
        draw=lambda axes: _draw(axes, rows),
    )


def _row(workload: Attention, card: Hardware | None, explain: bool) -> dict[str, Any]:
    from memsim.attention_io import attention_io, attention_traffic

    options, flops = workload.traffic_options(), workload.flops()
    counters = [attention_traffic(**chosen) for chosen in options]
    row = {"op": "attention", **asdict(workload)}
    row["pass"] = row.pop("direction")
    row |= traffic_row(
        sum(counter["bytes_read"] for counter in counters),
        sum(counter["bytes_written"] for counter in counters),
        [(sum(estimate.total for estimate in flops), PRECISIONS[workload.dtype][1])],
        card,
    )
    if explain:
        traffic = [attention_io(**chosen) for chosen in options]
        row["explanation"] = [line for estimate in (*traffic, *flops) for line in estimate.explain()]
    return row


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Return what a table shows: always n, d and the algorithm, of the other options what varies."""
    shown = {"n", "d", "algorithm", "pass", *varying(rows, _INPUTS)}
    inputs = [
        Column("n", right=True),
        Column("d", right=True),
        Column("heads", right=True),
        Column("batch", right=True),
        Column("dtype"),
        Column("sram_bytes", "SRAM", right=True, text=_size_text),
        Column("algorithm"),
        Column("pass"),
    ]
    return [column for column in inputs if column.key in shown] + columns_of_traffic(rows)


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the traffic against what varies most naturally: the SRAM, or else the length."""
    different = varying(rows, _INPUTS)
    labels = list(dict.fromkeys((*different, "algorithm")))
    if "sram_bytes" in different:
        draw_traffic(axes, rows, "sram_bytes", "on-chip SRAM / bytes", labels)
    else:
        draw_traffic(axes, rows, "n", "sequence length", labels)


def _size_text(value: Any) -> str:
    """Return the size of an on-chip memory, which comes in powers of two.

    >>> _size_text(196608)
    '192 KiB'
    """
    return bytes_text(value) if value % 1024 else f"{value // 1024} KiB"
