"""``frugal roofline``: every operator of a layer, its operations and bytes, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from cli.output import output_options
from cli.parameters import AXES, AxisValue
from cli.quantities import bytes_text, flop_text, time_text
from cli.result import Column, Result, Row
from cli.step_options import division_of, setting_of, setting_options

__all__ = ["command"]


@click.command(
    "roofline",
    epilog="""\b
Examples:
  frugal roofline --model llama-2-7b --gpus 1 --batch 1 --sequence 4096
  frugal roofline --model gpt3-175b --gpus 64 --batch 64 --sequence 2048 --attention standard \\
      --division tensor=8,pipeline=8,sequence_parallel=true --plot roofline.svg""",
    short_help="Operators of a layer: FLOPs, bytes, bound.",
)
@setting_options
@click.option("--division", type=AXES, help="tensor=8,pipeline=8.  [default: data parallelism]")
@output_options(plot=True)
def command(division: dict[str, AxisValue] | None, **options: Any) -> Result:
    """Give operations, bytes and time of one micro-batch in one stage of a rank, operator by operator.

    Time is the longer of operations over the peak rate and bytes over the bandwidth of the memory, each times
    its efficiency; with --calibration that of kernels.  The head is on the last stage only.
    """
    from memsim.planning.training_step import training_step
    from memsim.roofline import roofline

    setting = setting_of(options)
    chosen = division_of(division if division is not None else {"data": setting.accelerators})
    step = training_step(setting, chosen)
    rows = [row._asdict() for row in roofline(step.quantities)]
    return Result(
        rows,
        (
            Column("operator"),
            Column("flop", "operations", right=True, text=flop_text),
            Column("moved_bytes", "bytes", right=True, text=bytes_text),
            Column("intensity", "FLOP/B", right=True, text=lambda value: f"{value:.4g}"),
            Column("forward_s", "forward", right=True, text=time_text),
            Column("backward_s", "backward", right=True, text=time_text),
            Column("bound"),
        ),
        totals={
            "forward_s": float(step.value("forward")),
            "backward_s": float(step.value("gradient")),
            "again_s": float(step.value("again")),
            "head_s": float(step.value("head")),
        },
        sources=list(dict.fromkeys(step.quantities[f"FLOP_{row['name']}"].source for row in rows)),
        draw=lambda axes: _draw(axes, rows, setting.letters() | chosen.letters(setting)),
    )


def _draw(axes: Any, rows: Sequence[Row], letters: Any) -> None:
    """Draw the roof, and every operator below it."""
    import numpy as np

    peak, bandwidth = float(letters["R_x"]), float(letters["M"])
    xs = np.logspace(-1, 5, 200)
    axes.plot(xs, np.minimum(peak, xs * bandwidth), "k-")
    for row in rows:
        if row["flop"]:
            axes.plot(row["intensity"], row["flop"] / row["forward_s"], "o", label=row["operator"])
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="FLOP / s")
    axes.legend(fontsize="small")
