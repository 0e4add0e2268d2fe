"""``frugal validate``: predicted against measured steps of training, on rows that nothing was fitted on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.parameters import ListOf
from cli.quantities import bytes_text, time_text
from cli.result import Column, Result

if TYPE_CHECKING:
    from memsim.validation import Validation

__all__ = ["command"]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


@click.command(
    "validate",
    epilog="""\b
Examples:
  frugal validate
  frugal validate --set megatron-table1 --rows
  frugal validate --set foundry-a100-80gb --rows --plot foundry.svg""",
    short_help="Predicted against measured steps of training.",
)
@click.option("--set", "names", type=ListOf(click.STRING), help="Sets of measured steps.  [default: all]")
@click.option("--rows", "every", is_flag=True, help="Every step instead of a line for each set.")
@output_options(plot=True)
def command(names: tuple[str, ...] | None, every: bool) -> Result:
    """Fit four efficiencies on some measured steps, and show how far the others are off.

    The efficiencies are those of products, attention, memory and links; nothing else is free.  The mean error
    is over the steps that took no part in the fit.  Every step ran: a prediction that does not fit is wrong.
    """
    from memsim.validation import sets, validate

    found = {name: validate(name) for name in names or sets()}
    rows = [row for name, one in found.items() for row in (_steps(name, one) if every else [_set(name, one)])]
    return Result(
        rows,
        _STEPS if every else _SETS,
        totals={
            "steps": sum(len(one.rows) for one in found.values()),
            "said_not_to_fit": sum(not row.fits for one in found.values() for row in one.rows),
        },
        sources=list(dict.fromkeys(one.source for one in found.values())),
        details=["", *(f"{name}: {one.others}" for name, one in found.items() if one.others)],
        draw=lambda axes: _draw(axes, found),
    )


def _set(name: str, one: Validation) -> dict[str, Any]:
    held = [row for row in one.rows if not row.fitted]
    return {
        "set": name,
        "hardware": one.rows[0].step.setting.hardware,
        "steps": len(one.rows),
        "held_out": len(held),
        "mean_error": one.held_out_error,
        "worst_error": max((row.deviation for row in held or one.rows), key=abs),
        **one.efficiencies._asdict(),
        "said_not_to_fit": sum(not row.fits for row in one.rows),
    }


def _steps(name: str, one: Validation) -> list[dict[str, Any]]:
    return [
        {
            "set": name,
            "model": row.step.name,
            "sequence": row.step.setting.sequence,
            "accelerators": row.step.setting.accelerators,
            "micro_batch": row.step.division.micro_batch,
            "recompute": row.step.division.recompute,
            "published": row.step.printed,
            "unit": row.step.unit,
            "measured_s": row.step.seconds,
            "predicted_s": row.seconds,
            "deviation": row.deviation,
            "fitted": row.fitted,
            "memory_bytes": row.memory,
        }
        for row in one.rows
    ]


_SETS = (
    Column("set"),
    Column("steps", right=True),
    Column("held_out", "held out", right=True),
    Column("mean_error", "mean error", right=True, text=_percent),
    Column("worst_error", "worst", right=True, text=_percent),
    Column("compute", "products", right=True),
    Column("scores", "attention", right=True),
    Column("memory", right=True),
    Column("network", "links", right=True),
    Column("said_not_to_fit", "said not to fit", right=True),
)
_STEPS = (
    Column("set"),
    Column("model"),
    Column("sequence", right=True),
    Column("accelerators", "GPUs", right=True),
    Column("micro_batch", "micro", right=True),
    Column("recompute"),
    Column("published", right=True),
    Column("unit"),
    Column("measured_s", "measured", right=True, text=time_text),
    Column("predicted_s", "predicted", right=True, text=time_text),
    Column("deviation", "rate off by", right=True, text=_percent),
    Column("fitted"),
    Column("memory_bytes", "memory", right=True, text=bytes_text),
)


def _draw(axes: Any, found: dict[str, Validation]) -> None:
    """Draw predicted against measured seconds, held-out steps only, and where both are equal."""
    ends: list[float] = []
    for name, one in found.items():
        held = [row for row in one.rows if not row.fitted] or one.rows
        points = [(row.step.seconds, row.seconds) for row in held]
        ends += [value for point in points for value in point]
        axes.plot(*zip(*points, strict=True), ".", label=f"{name}, mean error {_percent(one.held_out_error)}")
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], "k-", linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlabel="measured / s", ylabel="predicted / s")
    axes.legend(fontsize="small")
