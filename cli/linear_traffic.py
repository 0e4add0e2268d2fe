"""``frugal io --op linear``: a linear layer in floating point and in int8."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cli.parameters import PRECISIONS
from cli.result import Column, Result, Row
from cli.roofline import columns_of_traffic, draw_traffic, sources_of_card, traffic_row, varying

if TYPE_CHECKING:
    from memsim.hardware import Hardware

__all__ = ["ALGORITHMS", "Linear", "linear_result"]

ALGORITHMS = ("fp16", "int8", "int8_fused")
_INPUTS = ("tokens", "in_features", "out_features", "outliers", "dtype", "algorithm")


@dataclass(frozen=True, slots=True)
class Linear:
    """One combination of the options; `outliers` None: nobody looks for any."""

    tokens: int
    in_features: int
    out_features: int
    outliers: int | None
    dtype: str
    algorithm: Any

    def work(self) -> list[tuple[int, str]]:
        """Return the operations and in which format they run: outliers stay in floating point."""
        product = 2 * self.tokens * self.in_features * self.out_features
        floating = PRECISIONS[self.dtype][1]
        if self.algorithm == "fp16":
            return [(product, floating)]
        return [(product, "int8"), (2 * self.tokens * (self.outliers or 0) * self.out_features, floating)]

    def shape(self) -> dict[str, Any]:
        """Return the arguments that `memsim.linear_io` and `linear_flops` share."""
        return {
            "algorithm": self.algorithm,
            "T": self.tokens,
            "K": self.in_features,
            "N": self.out_features,
        }


def linear_result(workloads: Iterable[Linear], card: Hardware | None, explain: bool) -> Result:
    """Return what ``frugal io --op linear`` says of `workloads`."""
    workloads = list(workloads)
    rows = [_row(workload, card, explain) for workload in workloads]
    formats = [name for workload in workloads for count, name in workload.work() if count]
    details = []
    for row in rows if explain else ():
        details += ["", f"{row['algorithm']}, {row['tokens']} x {row['in_features']} x {row['out_features']}"]
        details += [f"  {line}" for line in row["explanation"]]
    return Result(
        rows,
        _columns(rows),
        sources=["Dettmers et al. 2022, arXiv:2208.07339, eq. 8", *sources_of_card(card, formats)],
        details=details,
        draw=lambda axes: _draw(axes, rows),
    )


def _row(workload: Linear, card: Hardware | None, explain: bool) -> dict[str, Any]:
    from memsim.linear_io import linear_flops, linear_io, linear_traffic

    options = {
        **workload.shape(),
        "outliers": workload.outliers,
        "itemsize": PRECISIONS[workload.dtype][0],
    }
    counted = linear_traffic(**options)
    row = {
        "op": "linear",
        **asdict(workload),
        **traffic_row(counted["bytes_read"], counted["bytes_written"], workload.work(), card),
    }
    if explain:
        flops = linear_flops(**workload.shape(), outliers=workload.outliers or 0)
        row["explanation"] = [*linear_io(**options).explain(), *flops.explain()]
    return row


def _columns(rows: Sequence[Row]) -> list[Column]:
    shown = {"tokens", "in_features", "out_features", "algorithm", *varying(rows, _INPUTS)}
    inputs = [
        Column("tokens", right=True),
        Column("in_features", "in", right=True),
        Column("out_features", "out", right=True),
        Column("outliers", right=True),
        Column("dtype"),
        Column("algorithm"),
    ]
    return [column for column in inputs if column.key in shown] + columns_of_traffic(rows)


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the traffic against what varies most naturally: the tokens, or else a width."""
    different = varying(rows, _INPUTS)
    x = next(
        (key for key in ("tokens", "in_features", "out_features", "outliers") if key in different), "tokens"
    )
    draw_traffic(axes, rows, x, x.replace("_", " "), list(dict.fromkeys((*different, "algorithm"))))
