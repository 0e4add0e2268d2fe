"""``frugal timeline``: a step of training played out, rank by rank, with what overlaps and what does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options, say, write_whole
from cli.parameters import AXES, AxisValue
from cli.quantities import time_text
from cli.result import Column, Result
from cli.step_options import division_of, division_row, setting_of, setting_options

if TYPE_CHECKING:
    from memsim.streams import Event

__all__ = ["command"]

_COLORS = {"compute": "tab:blue", "links": "tab:red", "send": "tab:orange", "send back": "tab:orange"}


@click.command(
    "timeline",
    epilog="""\b
Examples:
  frugal timeline --model llama-2-7b --gpus 8 --batch 64 --sequence 4096 --division data=8,zero=3
  frugal timeline --model gpt3-175b --gpus 64 --batch 64 --sequence 2048 --trace step.json --plot step.svg \\
      --division tensor=8,pipeline=8,interleave=3,sequence_parallel=true""",
    short_help="A step of training, played on streams.",
)
@setting_options
@click.option(
    "--division", type=AXES, required=True, help="tensor=8,pipeline=8,zero=1; as `frugal plan` names."
)
@click.option(
    "--schedule",
    type=click.Choice(("gpipe", "1f1b", "interleaved")),
    help="Of the pipeline.  [default: 1f1b, interleaved with several chunks]",
)
@click.option("--prefetch", type=click.IntRange(0), default=1, help="Layers gathered ahead by ZeRO 3.")
@click.option("--trace", metavar="FILE", help="Also write the events, for chrome://tracing or Perfetto.")
@output_options(plot=True)
def command(
    division: dict[str, AxisValue],
    schedule: str | None,
    prefetch: int,
    trace: str | None,
    **options: Any,
) -> Result:
    """Play a step: computation, what it waits for, sends, gathered weights, reduced gradients.

    A row stands for the ranks of one pipeline stage.  Totals hold the closed form beside the time played:
    sends hide behind computation here, and the first gather and last reduction show.
    """
    from memsim.step_timeline import step_timeline
    from memsim.streams import chrome_trace, usage
    from memsim.training_step import training_step

    chosen = division_of(division)
    step = training_step(setting_of(options), chosen)
    played = step_timeline(step, chosen, schedule=schedule, prefetch=prefetch)  # type: ignore[arg-type]
    if trace is not None:
        write_whole(trace, json.dumps(chrome_trace(played.events)).encode())
        say(f"wrote {len(played.events)} events to {trace}")
    rows = [
        {
            "rank": rank,
            "computing_s": float(spent.computing),
            "exposed_s": float(spent.exposed),
            "idle_s": float(spent.idle),
        }
        for rank, spent in enumerate(usage(played.events))
    ]
    return Result(
        rows,
        (
            Column("rank", "stage", right=True),
            Column("computing_s", "computing", right=True, text=time_text),
            Column("exposed_s", "exposed communication", right=True, text=time_text),
            Column("idle_s", "bubble", right=True, text=time_text),
        ),
        totals={
            **{name: value for name, value in division_row(chosen).items() if value not in (1, 0, False)},
            "time_s": float(played.time),
            "closed_form_s": float(step.time.total),
            "bubble_share": float(played.bubble),
            "exposed_share": float(played.exposed),
            "mfu": float(played.mfu),
            "hfu": float(played.hfu),
        },
        sources=list(dict.fromkeys(item.source for item in step.time.terms)),
        draw=lambda axes: _draw(axes, played.events),
    )


def _draw(axes: Any, events: Sequence[Event]) -> None:
    """Draw a bar for every task, a row for each stream of each rank: a Gantt chart."""
    lanes = sorted({(event.task.rank, event.task.stream) for event in events})
    bars: dict[tuple[int, str, bool], list[tuple[float, float]]] = {}
    for event in events:
        lane = lanes.index((event.task.rank, event.task.stream))
        back = event.task.name.startswith("backward")
        bars.setdefault((lane, event.task.stream, back), []).append(
            (float(event.start), float(event.task.duration))
        )
    for (lane, stream, back), spans in bars.items():
        color = "tab:cyan" if back else _COLORS.get(stream, "tab:green")
        axes.broken_barh(
            spans, (lane - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.2 * (len(spans) < 100)
        )
    axes.set(
        xlabel="time / s",
        yticks=range(len(lanes)),
        yticklabels=[f"{rank} {stream}" for rank, stream in lanes],
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(3, 8 - len(lanes) // 12))
