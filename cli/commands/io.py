"""``frugal io``: what attention moves between HBM and the chip, computed exactly, and how long that takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from cli.output import output_options
from cli.parameters import COUNTS, DTYPES, HARDWARE, PRECISIONS, SIZES, ListOf
from cli.quantities import bytes_text, flop_text, time_text
from cli.result import Column, Result, Row

if TYPE_CHECKING:
    from fractions import Fraction

    from memsim.estimate import Estimate
    from memsim.hardware import Hardware

__all__ = ["command"]

ALGORITHMS = ("standard", "flash1", "flash2")
DEFAULT_SRAM = 192 * 1024  # of one A100 multiprocessor: arXiv:2205.14135, section 2.1
_DIRECTIONS: dict[str, tuple[Literal["forward", "backward"], ...]] = {
    "fwd": ("forward",),
    "bwd": ("backward",),
    "both": ("forward", "backward"),
}


def _size_text(value: Any) -> str:
    """Return the size of an on-chip memory, which comes in powers of two.

    >>> _size_text(196608)
    '192 KiB'
    """
    return bytes_text(value) if value % 1024 else f"{value // 1024} KiB"


@dataclass(frozen=True, slots=True)
class Workload:
    """One combination of the options; `direction` is fwd, bwd or both."""

    n: int
    d: int
    heads: int
    batch: int
    dtype: str
    sram_bytes: int
    algorithm: Any
    direction: str
    accumulator_bytes: int | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return PRECISIONS[self.dtype][0]


def _traffic_options(workload: Workload) -> list[dict[str, Any]]:
    """Return the arguments of `memsim.attention_io` for each pass; its SRAM is in elements."""
    sram = None if workload.algorithm == "standard" else workload.sram_bytes // workload.itemsize
    return [
        {
            "algorithm": workload.algorithm,
            "direction": direction,
            "Tq": workload.n,
            "D": workload.d,
            "H": workload.heads,
            "B": workload.batch,
            "itemsize": workload.itemsize,
            "accumulator_itemsize": workload.accumulator_bytes or workload.itemsize,
            "sram": sram,
        }
        for direction in _DIRECTIONS[workload.direction]
    ]


def _flops(workload: Workload) -> list[Estimate]:
    from memsim.flops import attention_flops

    return [
        attention_flops(
            algorithm="standard" if workload.algorithm == "standard" else "flash",
            direction=direction,
            Tq=workload.n,
            D=workload.d,
            H=workload.heads,
            B=workload.batch,
        )
        for direction in _DIRECTIONS[workload.direction]
    ]


def _row(workload: Workload, card: Hardware | None, explain: bool) -> dict[str, Any]:
    from memsim.attention_io import attention_io, attention_traffic

    options, flops = _traffic_options(workload), _flops(workload)
    counters = [attention_traffic(**chosen) for chosen in options]
    read = sum(counter["bytes_read"] for counter in counters)
    written = sum(counter["bytes_written"] for counter in counters)
    total = read + written
    operations = sum(estimate.total for estimate in flops)
    row = asdict(workload)
    row["pass"] = row.pop("direction")
    row["accumulator_bytes"] = workload.accumulator_bytes or workload.itemsize
    row |= {
        "read_bytes": read,
        "written_bytes": written,
        "traffic_bytes": total,
        "matmul_flop": operations,
        "flop_per_byte": _float(operations, total),
    }
    if card is not None:
        peak = card.peak(PRECISIONS[workload.dtype][1])
        row["hbm_time_s"] = _float(total, card.hbm_bandwidth.value)
        row["matmul_time_s"] = _float(operations, peak.value)
        row["bound"] = "hbm" if row["hbm_time_s"] >= row["matmul_time_s"] else "matmul"
    if explain:
        traffic = [attention_io(**chosen) for chosen in options]
        row["explanation"] = [line for estimate in (*traffic, *flops) for line in estimate.explain()]
    return row


def _float(numerator: int | Fraction, denominator: int | Fraction) -> float:
    return float(numerator / denominator) if denominator else float("nan")


def _varying(rows: Sequence[Row]) -> list[str]:
    keys = ("n", "d", "heads", "batch", "dtype", "sram_bytes", "pass", "algorithm")
    return [key for key in keys if len({row[key] for row in rows}) > 1]


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Return what a table shows: always n, d and the algorithm, of the other options what varies."""
    shown = {"n", "d", "algorithm", "pass", *_varying(rows)}
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
    outputs = [
        Column("read_bytes", "read", right=True, text=bytes_text),
        Column("written_bytes", "written", right=True, text=bytes_text),
        Column("traffic_bytes", "HBM traffic", right=True, text=bytes_text),
        Column("matmul_flop", "matmul", right=True, text=flop_text),
    ]
    if rows and "bound" in rows[0]:
        outputs += [
            Column("hbm_time_s", "HBM time", right=True, text=time_text),
            Column("matmul_time_s", "matmul time", right=True, text=time_text),
            Column("bound"),
        ]
    return [column for column in inputs if column.key in shown] + outputs


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the traffic against what varies most naturally: the SRAM, or else the length."""
    varying = _varying(rows)
    x = "sram_bytes" if "sram_bytes" in varying else "n"
    lines: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(str(row[key]) for key in dict.fromkeys((*varying, "algorithm")) if key != x)
        lines.setdefault(label, []).append(row)
    for label, points in lines.items():
        points = sorted(points, key=lambda row: row[x])
        axes.plot(
            [row[x] for row in points],
            [float(row["traffic_bytes"]) for row in points],
            marker="o",
            label=label,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="on-chip SRAM / bytes" if x == "sram_bytes" else "sequence length",
        ylabel="HBM traffic / bytes",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()


@click.command(
    epilog="""\b
Examples:
  frugal io --n 1024 --d 64 --heads 16 --batch 64 --hardware a100-40gb
  frugal io --n 1024 --d 64 --sram-bytes 48KiB,96KiB,192KiB --algorithm flash1 --plot io.svg
  frugal io --n 1K --d 64 --algorithm flash1 --explain""",
    short_help="HBM traffic of attention.",
)
@click.option("--n", type=COUNTS, default="1024", show_default=True, help="Sequence length; K is 1000.")
@click.option("--d", type=COUNTS, default="64", show_default=True, help="Width of a head.")
@click.option("--heads", type=COUNTS, default="16", show_default=True, help="Query heads.")
@click.option("--batch", type=COUNTS, default="1", show_default=True, help="Sequences.")
@click.option("--dtype", type=DTYPES, default="float16", show_default=True, help="Format of Q, K, V and O.")
@click.option(
    "--sram-bytes",
    type=SIZES,
    help="On-chip memory that sets the block sizes.  [default: that of the hardware, else 192KiB]",
)
@click.option(
    "--algorithm",
    type=ListOf(click.Choice(ALGORITHMS)),
    default=",".join(ALGORITHMS),
    show_default=True,
    help="standard: Algorithms 0 and 3; flash1: 1 and 4 of FlashAttention; flash2: of FlashAttention-2, "
    "a formula that no reference counts.",
)
@click.option(
    "--pass",
    "direction",
    type=click.Choice(tuple(_DIRECTIONS)),
    default="both",
    show_default=True,
    help="Which.",
)
@click.option(
    "--accumulator",
    type=click.Choice(("input", "float32", "float64")),
    default="input",
    show_default=True,
    help="Format of O and dQ between tiles: that of Q, as in the paper, or wider, as in the first kernels.",
)
@click.option("--hardware", type=HARDWARE, help="Also give times on this card.")
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options(plot=True)
def command(
    n: tuple[int, ...],
    d: tuple[int, ...],
    heads: tuple[int, ...],
    batch: tuple[int, ...],
    dtype: tuple[str, ...],
    sram_bytes: tuple[int, ...] | None,
    algorithm: tuple[str, ...],
    direction: str,
    accumulator: str,
    hardware: str | None,
    explain: bool,
) -> Result:
    """Count the bytes that attention moves between HBM and the chip, exactly as the algorithm is printed.

    Options take lists; every combination gives a row.  Caches are not modelled, and a causal mask skips
    nothing, so counters on a GPU stay below.  Times are lower bounds: bytes at full bandwidth, and matrix
    products at peak.
    """
    from memsim.attention_io import attention_io

    card = None
    if hardware is not None:
        from memsim.hardware import hardware as find_hardware

        card = find_hardware(hardware)
    sizes = sram_bytes or (card.sram_per_sm.value if card else DEFAULT_SRAM,)
    wide = {"input": None, "float32": 4, "float64": 8}[accumulator]
    combinations = itertools.product(n, d, heads, batch, dtype, sizes, algorithm, (direction,), (wide,))
    rows = [_row(Workload(*combination), card, explain) for combination in combinations]
    sources = dict.fromkeys(
        term.source
        for choice in algorithm
        for options in _traffic_options(Workload(1, 1, 1, 1, "float16", 8, choice, direction))
        for term in attention_io(**options).terms
    )
    if card is not None:
        sources |= dict.fromkeys(
            [card.hbm_bandwidth.source, *(card.peak(PRECISIONS[name][1]).source for name in dtype)]
        )
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
