"""``frugal validate``: every measured number beside the predicted one, and the bars on the errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.result import Column, Result, Row, View

if TYPE_CHECKING:
    from memsim.measured.validation import Bar, Checked, Summary

__all__ = ["command"]


def _percent(value: Any) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _signed(value: Any) -> str:
    return "" if value is None else f"{100 * value:+.2f} %"


def _amount(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _size(value: Any) -> str:
    return "" if value is None else f"{value / 1e9:.1f} GB"


def _met_style(text: str) -> str:
    return {"met": "green", "MISSED": "bold red"}.get(text, "")


ROWS = (
    Column("id"),
    Column("published", right=True),
    Column("predicted", right=True, text=_amount),
    Column("unit"),
    Column("error", right=True, text=_signed),
    Column("use"),
    Column("memory_bytes", "memory a rank", right=True, text=_size),
)
SUMMARIES = (
    Column("stack"),
    Column("hardware"),
    Column("use"),
    Column("rows", right=True),
    Column("mean", "mean |error|", right=True, text=_percent),
    Column("worst", right=True, text=_percent),
    Column("bias", "mean error", right=True, text=_signed),
)
BARS = (
    Column("name", "bar, rows held out"),
    Column("rows", right=True),
    Column("mean", "mean |error|", right=True, text=_percent),
    Column("mean_limit", "at most", right=True, text=_percent),
    Column("worst", right=True, text=_percent),
    Column("worst_limit", "at most", right=True, text=_percent),
    Column("infeasible", "ran, called infeasible", right=True),
    Column("verdict", "", style=_met_style),
    Column("source", "what sets it"),
)


@click.command(
    epilog="""\b
Examples:
  frugal validate                            every row, means of calibration and held-out rows apart, bars
  frugal validate --only 'megatron.table5.*'
  frugal validate --summary --plot parity.png
  frugal validate --strict --format json     exit code 1 if a bar is missed

\b
A row marked "calibration" is one of the few that efficiencies were fitted to, named before the fit
or, of the one number of the L2, chosen (memsim/data/validation); every other row is held out.  The error is
predicted / published - 1; where less than a megabyte was counted, it is in parts of a megabyte.""",
    short_help="Models against measurements.",
)
@click.option("--only", metavar="PATTERN", help="Only these rows, such as 'foundry.a100-80gb.*'.")
@click.option("--summary", is_flag=True, help="Leave the single rows out of the tables for people.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a bar is missed.")
@output_options(plot=True)
def command(only: str | None, summary: bool, strict: bool) -> Result:
    """Print what was measured, what the models predict, and the error.

    Times of training come from papers and from llm-foundry's tables, those of single kernels from `frugal
    calibrate`, traffic of HBM and L2 from hardware counters, peaks of memory from PyTorch's allocator.  A
    missed bar is printed; it fails the command with --strict only.
    """
    from memsim.measured.validation import bars, summaries, validate

    rows = validate(only=only)
    limits = bars(rows)
    missed = [bar.name for bar in limits if not bar.met]
    data = [_row(row) for row in rows]
    return Result(
        data,
        ROWS,
        totals={"rows": len(rows), "bars": len(limits), "bars_missed": len(missed)},
        sources=list(dict.fromkeys(row.source for row in rows)),
        views=_views(data, summaries(rows), limits, summary),
        details=_parameters({row.stack for row in rows}),
        problem=f"missed: {', '.join(missed)}" if strict and missed else "",
        exit_code=int(strict and bool(missed)),
        draw=lambda axes: _draw(axes, rows),
    )


def _row(row: Checked) -> dict[str, Any]:
    found = asdict(row)
    found["memory_bytes"] = found.pop("memory")
    return found


def _views(data: Sequence[Row], means: Sequence[Summary], limits: Sequence[Bar], summary: bool) -> list[View]:
    places: dict[str, list[Row]] = {}
    for row in data:
        places.setdefault(str(row["source"]), []).append(row)
    views = [] if summary else [View(place, ROWS, members) for place, members in places.items()]
    views.append(View("Errors", SUMMARIES, [mean._asdict() for mean in means]))
    if limits:
        views.append(View("Bars", BARS, [_limit(bar) for bar in limits]))
    return views


def _limit(bar: Bar) -> Row:
    verdict = "met" if bar.met else "MISSED"
    return {**bar._asdict(), "infeasible": len(bar.infeasible), "verdict": verdict}


def _parameters(used: set[str]) -> list[str]:
    """Return the efficiencies of the stacks, each fitted to its rows that calibrate."""
    from cli.commands.calibrate import numbers_text
    from memsim.measured.calibration import calibrations
    from memsim.planning.efficiency import efficiency, stacks

    lines = []
    for stack in stacks():
        shares = ", ".join(f"{name} {value:.2f}" for name, value in efficiency(stack).items())
        lines += [f"{stack}: {shares}"] * (stack in used)
    if any(stack.startswith("calibrated ") for stack in used):
        lines += [f"kernels on {found.hardware}: {numbers_text(found)}" for found in calibrations()]
    return ["efficiencies, fitted to the rows that calibrate", *lines] if lines else []


def _draw(axes: Any, rows: Sequence[Checked]) -> None:
    """Draw predicted over published against published; rows that calibrate are hollow."""
    for stack in dict.fromkeys(row.stack for row in rows):
        color = None
        for use, fill in (("held out", "full"), ("calibration", "none")):
            points = [
                (float(row.published), 1 + row.error) for row in rows if (row.stack, row.use) == (stack, use)
            ]
            if points:
                label = f"{stack}, {use} ({len(points)})"
                (line,) = axes.plot(
                    *zip(*points, strict=True), "o", ms=4, fillstyle=fill, label=label, color=color
                )
                color = line.get_color()
    axes.axhline(1, color="k", lw=0.8)
    axes.axhspan(0.9, 1.1, color="k", alpha=0.1, lw=0)
    axes.set(xscale="log", ylim=(0.5, 1.5), xlabel="published: s, ms, TFLOP/s, tokens/s/GPU or MB")
    axes.set(ylabel="predicted / published")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small", title="shaded: ±10 %", ncols=2)
