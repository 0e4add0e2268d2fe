"""``frugal parallel``: ranks at work, ideal scaling, and data against model parallelism."""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from cli.commands.env import why_not
from cli.commands.parallel_mesh import MOST_RANKS, TRAINED, mesh, pipeline
from cli.output import output_options, progress
from cli.parameters import COUNT, COUNTS, Count, ListOf, Number
from cli.processes import another_speaks, together
from cli.quantities import bytes_text, count_text, time_text
from cli.result import Column, Result

if TYPE_CHECKING:
    from memsim.estimate import Estimate

__all__ = ["command"]

RANKS: ListOf[int] = ListOf(Count(most=MOST_RANKS))
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


class _DeviceTime(click.ParamType):  # type: ignore[type-arg]
    """Time on one device, such as 10d, 36h, 90min or 20s."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from memsim.units import exact
        from refimpl.errors import OptionError

        text = str(value).strip()
        unit = text.lstrip("0123456789.eE+-").strip()
        try:
            number = exact(text.removesuffix(unit).strip(), "time") * SECONDS[unit]
        except (KeyError, OptionError):
            self.fail(f"expected a number and one of {', '.join(SECONDS)}; got {value!r}", param, ctx)
        if number <= 0:
            self.fail(f"expected a time above 0; got {value!r}", param, ctx)
        return number


@click.group(
    "parallel",
    epilog="Example: frugal parallel train --ranks 1,2,3,4,7",
    short_help="Ranks that train; ideal scaling; data or model parallelism.",
)
def command() -> None:
    """Train on ranks that divide the model states, and tell what parallelism promises."""


command.add_command(mesh)
command.add_command(pipeline)


def _each(values: list[int]) -> str:
    return f"{values[0]} each" if len(values) > 1 and len(set(values)) == 1 else ", ".join(map(str, values))


@command.command(
    "train",
    epilog="""\b
Examples:
  frugal parallel train --ranks 1,2,3,4,7
  frugal parallel train --ranks 3 --stage 2 --steps 5 --save states
  frugal parallel train --ranks 7 --stage 3 --steps 10 --resume states
  mpiexec -n 4 frugal parallel train --ranks 4 --backend mpi""",
    short_help="Train under ZeRO; count what ranks hold and send.",
)
@click.option("--ranks", type=RANKS, default="1,2,3,4,7", show_default=True, help="Numbers of ranks.")
@click.option(
    "--stage",
    "stages",
    type=ListOf(click.Choice(("1", "2", "3"))),
    default="1,2,3",
    show_default=True,
    help="ZeRO stages.",
)
@click.option("--steps", type=TRAINED, default=10, show_default=True, help="Steps in all.")
@click.option("--micro", type=TRAINED, default=1, show_default=True, help="Micro-batches a step.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of parameters and data.")
@click.option(
    "--backend",
    type=click.Choice(("numpy", "mpi")),
    default="numpy",
    show_default=True,
    help="Ranks are threads, or the processes that mpiexec started.",
)
@click.option(
    "--timeout",
    type=Number(0.1, 3600),
    default=30.0,
    show_default=True,
    help="Seconds without a message after which a run is given up.",
)
@click.option("--save", type=click.Path(), help="Save the sharded states in this new folder.")
@click.option("--resume", type=click.Path(exists=True, file_okay=False), help="Go on from saved states.")
@output_options()
def train(
    ranks: tuple[int, ...],
    stages: tuple[str, ...],
    steps: int,
    micro: int,
    seed: int,
    backend: str,
    timeout: float,
    save: str | None,
    resume: str | None,
) -> Result:
    """Train a small attention model with ZeRO in float64, and hold it to plain Adam and to the cost models.

    For every number of ranks and stage: the largest difference of a parameter to plain Adam on one device,
    the elements of the optimizer that exactly one rank owns, and, as counted on each rank and as the models
    say, the bytes of model states held and the bytes and messages sent.  The exit code is 1 if they
    differ, or if ranks stall.
    """
    if (save is not None or resume is not None) and len(ranks) * len(stages) > 1:
        raise click.UsageError("--save and --resume go with one number of ranks and one --stage")
    if save is not None and (Path(save).exists() or not Path(os.path.abspath(save)).parent.is_dir()):
        raise click.UsageError(f"--save makes a new folder in one that is there; got {save!r}")
    reason = why_not(backend)
    if reason is not None:
        from refimpl.errors import BackendUnavailableError

        raise BackendUnavailableError(f"backend {backend}: {reason}")
    rows: list[dict[str, Any]] = []
    with together(backend):
        from cli.training import Experiment
        from refimpl.parallel.comm import run_ranks

        start: Any = run_ranks
        if backend == "mpi":
            from refimpl.parallel import mpi

            start = mpi.run_ranks
        launch = partial(start, timeout=timeout)
        experiment = Experiment(steps=steps, micro=micro, seed=seed)
        jobs = list(itertools.product(ranks, map(int, stages)))
        for size, stage in progress(jobs, "train", lambda job: f"{job[0]} ranks, stage {job[1]}"):
            rows.append(experiment.run(size, stage, launch, save=save, resume=resume))
    wrong = sum(not row["agrees"] for row in rows)
    return Result(
        rows,
        (
            Column("ranks", right=True),
            Column("stage", right=True),
            Column("difference", "difference to Adam", right=True),
            Column("owned_once", "owned once", right=True),
            Column("held_bytes", "held (bytes)", right=True, text=_each),
            Column("model_held_bytes", "model", right=True, text=_each),
            Column("sent_bytes", "sent (bytes)", right=True, text=_each),
            Column("model_sent_bytes", "model", right=True, text=_each),
            Column("sent_messages", "messages", right=True, text=_each),
            Column("model_sent_messages", "model", right=True, text=_each),
            Column("over_data_parallel", "sent : DP", right=True),
            Column("agrees"),
        ),
        totals={"runs": len(rows), "disagree": wrong, "parameters": rows[0]["parameters"]},
        sources=["Rajbhandari et al. 2020, arXiv:1910.02054, sections 5 and 7"],
        problem=f"{wrong} of {len(rows)} runs differ from the models or from Adam by {experiment.tolerance:g}"
        if wrong
        else "",
        exit_code=1 if wrong else 0,
        silent=another_speaks(backend),
    )


@command.command(
    "scaling",
    epilog="""\b
Examples:
  frugal parallel scaling --time 10d --devices 1,8,64,1024
  frugal parallel scaling --time 10d --devices 1,8,64,1024 --serial 0,0.001,0.01 --plot speed-up.svg""",
    short_help="Time of a job on many devices, ideally and with serial work.",
)
@click.option("--time", "work", type=_DeviceTime(), required=True, help="Time on one device: 10d, 36h, 20s.")
@click.option("--devices", type=COUNTS, default="1,8,64,1024", show_default=True, help="How many devices.")
@click.option(
    "--serial",
    "shares",
    type=ListOf(Number(0, 1)),
    default="0",
    show_default=True,
    help="Share of the work that cannot be spread (Amdahl); 0 is ideal.",
)
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options(plot=True)
def scaling(work: Any, devices: tuple[int, ...], shares: tuple[float, ...], explain: bool) -> Result:
    """Give the time on p devices: T/p ideally, and with a serial share σ of the work T(σ + (1 - σ)/p)."""
    from memsim.parallelism import amdahl_scaling, ideal_scaling

    rows: list[dict[str, Any]] = []
    estimates: list[Estimate] = []
    for share, count in itertools.product(shares, devices):
        found = (
            amdahl_scaling(device_seconds=work, devices=count, serial=share)
            if share
            else ideal_scaling(device_seconds=work, devices=count)
        )
        estimates.append(found)
        speed_up = work / found.total
        rows.append(
            {
                "devices": count,
                "serial_share": share,
                "time_s": float(found.total),
                "speed_up": float(speed_up),
                "efficiency": float(speed_up / count),
            }
        )
    return Result(
        rows,
        (
            Column("devices", right=True),
            Column("serial_share", "serial share", right=True),
            Column("time_s", "time", right=True, text=time_text),
            Column("speed_up", "speed-up", right=True),
            Column("efficiency", right=True),
        ),
        sources=list(dict.fromkeys(term.source for found in estimates for term in found.terms)),
        details=[line for found in estimates for line in found.explain()] if explain else [],
        draw=lambda axes: _draw(axes, rows),
    )


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the speed-up against the devices, a line for each serial share."""
    for share in dict.fromkeys(row["serial_share"] for row in rows):
        points = sorted((row["devices"], row["speed_up"]) for row in rows if row["serial_share"] == share)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"serial share {share:g}")
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="speed-up")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()


@command.command(
    "compare",
    epilog="""\b
Example:
  frugal parallel compare --params 7.5B --ranks 8 --hidden 4096 --layers 36 --sequence 2048 --batch 1,8""",
    short_help="Data against model parallelism: copies, memory, communication.",
)
@click.option("--params", type=COUNT, required=True, help="Parameters of the model.")
@click.option("--ranks", type=COUNTS, default="8", show_default=True, help="How many ranks.")
@click.option("--batch", type=COUNTS, default="1", show_default=True, help="Sequences b of a micro-batch.")
@click.option("--sequence", type=COUNT, required=True, help="Tokens s of a sequence; K is 1000.")
@click.option("--hidden", type=COUNT, required=True, help="Width h of the model.")
@click.option("--layers", type=COUNT, required=True, help="Layers L.")
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options()
def compare(
    params: int,
    ranks: tuple[int, ...],
    batch: tuple[int, ...],
    sequence: int,
    hidden: int,
    layers: int,
    explain: bool,
) -> Result:
    """Give copies of the model, model states of a rank, and elements that it sends in a step.

    Data parallelism sends gradients, however large the batch; model (tensor) parallelism sends activations.
    The batch from which it sends more is among the totals.
    """
    from memsim.parallelism import crossover_batch, data_vs_model_parallel

    block = {"parameters": params, "sequence": sequence, "hidden": hidden, "layers": layers}
    rows: list[dict[str, Any]] = []
    estimates: list[Estimate] = []
    for count, size in itertools.product(ranks, batch):
        both = data_vs_model_parallel(ranks=count, batch=size, **cast("dict[str, Any]", block))
        estimates += both
        rows += [
            {
                "strategy": found.name,
                "ranks": count,
                "batch": size,
                "copies": found["copies"],
                "memory_bytes": found["memory"],
                "sent_elements": found["communication"],
            }
            for found in both
        ]
    return Result(
        rows,
        (
            Column("strategy"),
            Column("ranks", right=True),
            Column("batch", right=True),
            Column("copies", right=True),
            Column("memory_bytes", "memory a rank", right=True, text=bytes_text),
            Column("sent_elements", "sent a rank and step (elements)", right=True, text=count_text),
        ),
        totals={"crossover_batch": float(crossover_batch(**cast("dict[str, Any]", block)).total)},
        sources=list(dict.fromkeys(term.source for found in estimates for term in found.terms)),
        details=[
            line
            for row, found in zip(rows, estimates, strict=True)
            for line in ("", f"{found.name}, {row['ranks']} ranks, batch {row['batch']}", *found.explain())
        ]
        if explain
        else [],
    )
