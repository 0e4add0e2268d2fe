"""``frugal timeline``: a step of training played out, rank by rank, with what overlaps and what does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options, say, writable, write_whole
from cli.parameters import AXES, AxisValue
from cli.quantities import time_text
from cli.result import Column, Result
from cli.step_options import division_of, division_row, scores_note, setting_of, setting_options

if TYPE_CHECKING:
    from memsim.planning.training_step import TrainingStep
    from memsim.step_timeline import StepTimeline
    from memsim.streams import Event, Task

__all__ = ["command"]

MOST_TASKS = 1_000_000  # a minute
PIXELS = 900  # of a picture, in time
COLORS = {
    "forward": "tab:blue",
    "backward": "tab:cyan",
    "head": "tab:purple",
    "optimizer": "tab:gray",
    "links": "tab:red",
    "send": "tab:orange",
    "weights": "tab:olive",
    "gradients": "tab:green",
}


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
@click.option(
    "--trace",
    metavar="FILE",
    callback=writable,
    help="Also write the events, for chrome://tracing or Perfetto.",
)
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
    from memsim.planning.training_step import training_step
    from memsim.step_timeline import step_timeline
    from memsim.streams import chrome_trace, usage
    from refimpl.errors import OptionError

    chosen = division_of(division)
    setting = setting_of(options)
    step = training_step(setting, chosen)
    tasks = 2 * chosen.pipeline * setting.batch // (chosen.data * chosen.micro_batch)
    if tasks > MOST_TASKS:
        raise OptionError(f"{tasks} passes of micro-batches: expected at most {MOST_TASKS} steps to play")
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
    plain = division_row(type(chosen)())
    return Result(
        rows,
        (
            Column("rank", "stage", right=True),
            Column("computing_s", "computing", right=True, text=time_text),
            Column("exposed_s", "exposed communication", right=True, text=time_text),
            Column("idle_s", "bubble", right=True, text=time_text),
        ),
        totals={
            **{name: value for name, value in division_row(chosen).items() if value != plain[name]},
            "time_s": float(played.time),
            "closed_form_s": float(step.time.total),
            "bubble_share": float(played.bubble),
            "exposed_share": float(played.exposed),
            "mfu": float(played.mfu),
            "hfu": float(played.hfu),
        },
        sources=list(dict.fromkeys(item.source for item in step.time.terms)),
        details=["", _summary(played, step), *scores_note(setting)],
        draw=lambda axes: _draw(axes, played.events),
    )


def _summary(played: StepTimeline, step: TrainingStep) -> str:
    """Return the step in a line for people."""
    shares = {"bubble": played.bubble, "exposed": played.exposed, "MFU": played.mfu, "HFU": played.hfu}
    return (
        f"a step: {time_text(float(played.time))}, by the closed form {time_text(float(step.time.total))}; "
        + ", ".join(f"{name} {100 * float(share):.1f} %" for name, share in shares.items())
    )


def _draw(axes: Any, events: Sequence[Event]) -> None:
    """Draw a bar for every task, a row for each stream of each rank: a Gantt chart.

    What takes less than a pixel is drawn as wide as one, or it would come and go with the width of the
    picture.
    """
    from matplotlib.patches import Patch

    lanes = sorted({(event.task.rank, event.task.stream) for event in events})
    least = max((float(event.end) for event in events), default=0.0) / PIXELS
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for event in events:
        if event.task.duration:
            lane = lanes.index((event.task.rank, event.task.stream))
            span = float(event.start), max(float(event.task.duration), least)
            bars.setdefault((lane, kind_of(event.task)), []).append(span)
    for (lane, kind), spans in bars.items():
        axes.broken_barh(
            spans,
            (lane - 0.4, 0.8),
            facecolors=COLORS[kind],
            edgecolor="white",
            linewidth=0.2 * (len(spans) < 100),
            snap=False,
        )
    axes.set(
        xlabel="time / s",
        yticks=range(len(lanes)),
        yticklabels=[f"{rank} {stream}" for rank, stream in lanes],
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(3, 8 - len(lanes) // 12))
    shown = {kind for _, kind in bars}
    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in shown]
    axes.legend(
        handles=handles, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False
    )


def kind_of(task: Task) -> str:
    """Return what a task is in the legend."""
    first = task.name.split(",")[0].split(" ")[0]
    return first if task.stream in ("compute", "data") else task.stream.split(" ")[0]
