"""What every table of traffic shows besides its inputs: bytes, operations, and the time that bounds them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from cli.quantities import bytes_text, flop_text, time_text
from cli.result import Column, Row

if TYPE_CHECKING:
    from memsim.hardware import Hardware, Specification

__all__ = ["columns_of_traffic", "draw_traffic", "sources_of_card", "traffic_row", "varying"]

Number = int | Fraction
Work = tuple[Number, str]  # operations, and the number format whose peak rate holds for them


def traffic_row(read: Number, written: Number, work: Sequence[Work], card: Hardware | None) -> dict[str, Any]:
    """Return the outputs of a row: bytes, operations, and on a card the lower bounds of its time.

    >>> traffic_row(6, 2, [(16, "fp16")], None)["flop_per_byte"]
    2.0
    """
    total, operations = read + written, sum(count for count, _ in work)
    row: dict[str, Any] = {
        "read_bytes": read,
        "written_bytes": written,
        "traffic_bytes": total,
        "matmul_flop": operations,
        "flop_per_byte": _quotient(operations, total),
    }
    if card is not None:
        row["hbm_time_s"] = _quotient(total, card.hbm_bandwidth.value)
        row["matmul_time_s"] = sum(_quotient(count, card.peak(name).value) for count, name in work)
        row["bound"] = "hbm" if row["hbm_time_s"] >= row["matmul_time_s"] else "matmul"
    return row


def columns_of_traffic(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of what `traffic_row` gave."""
    columns = [
        Column("read_bytes", "read", right=True, text=bytes_text),
        Column("written_bytes", "written", right=True, text=bytes_text),
        Column("traffic_bytes", "HBM traffic", right=True, text=bytes_text),
        Column("matmul_flop", "matmul", right=True, text=flop_text),
    ]
    if rows and "bound" in rows[0]:
        columns += [
            Column("hbm_time_s", "HBM time", right=True, text=time_text),
            Column("matmul_time_s", "matmul time", right=True, text=time_text),
            Column("bound"),
        ]
    return columns


def sources_of_card(card: Hardware | None, formats: Sequence[str]) -> list[str]:
    """Return where the rates of a card are printed."""
    if card is None:
        return []
    used: list[Specification] = [card.hbm_bandwidth, *(card.peak(name) for name in formats)]
    return list(dict.fromkeys(item.source for item in used))


def varying(rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """Return the inputs that differ between rows.

    >>> varying([{"n": 1, "d": 2}, {"n": 3, "d": 2}], ("n", "d"))
    ['n']
    """
    return [key for key in keys if len({row[key] for row in rows}) > 1]


def draw_traffic(axes: Any, rows: Sequence[Row], x: str, xlabel: str, labels: Sequence[str]) -> None:
    """Draw the traffic against input `x`, a line for each combination of `labels`."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(", ".join(str(row[key]) for key in labels if key != x), []).append(row)
    for label, points in lines.items():
        points = sorted(points, key=lambda row: row[x])
        traffic = [float(row["traffic_bytes"]) for row in points]
        axes.plot([row[x] for row in points], traffic, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="HBM traffic / bytes")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()


def _quotient(numerator: Number, denominator: Number) -> float:
    return float(numerator / denominator) if denominator else float("nan")
