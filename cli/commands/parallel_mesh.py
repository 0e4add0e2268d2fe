"""``frugal parallel mesh`` and ``pipeline``: a decoder on ranks in three dimensions; schedules in time."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import click

from cli.commands.env import why_not
from cli.output import output_options, progress
from cli.parameters import COUNT, COUNTS, Count, ListOf, Number
from cli.processes import another_speaks, together
from cli.result import Column, Result, View

__all__ = ["MOST_RANKS", "TRAINED", "mesh", "pipeline"]

NAMES = ("gpipe", "1f1b", "interleaved")
SCHEDULES = ListOf(click.Choice(NAMES))
MOST_STEPS = 1_000_000
MOST_RANKS = 256  # of a run, whose time grows as their square
SHARED = Count(most=MOST_RANKS)
TRAINED = Count(most=1000)  # steps, or micro-batches, whose data are drawn at once


def _each(values: list[int]) -> str:
    """Return values of ranks in order, equal neighbours together.

    >>> _each([3, 3, 3]), _each([2, 2, 1])
    ('3 each', '2 x 2, 1')
    """
    if len(values) > 1 and len(set(values)) == 1:
        return f"{values[0]} each"
    runs = [(value, len(list(same))) for value, same in itertools.groupby(values)]
    return ", ".join(f"{count} x {value}" if count > 1 else str(value) for value, count in runs)


RUN = (
    Column("tensor", "TP", right=True),
    Column("pipeline", "PP", right=True),
    Column("data", "DP", right=True),
    Column("stage", "ZeRO", right=True),
    Column("schedule"),
)
RUN_COLUMNS = (
    *RUN,
    Column("difference", "difference to one device", right=True),
    Column("copies_differ", "copies differ", right=True),
    Column("held_bytes", "held (bytes)", right=True, text=_each),
    Column("model_held_bytes", "model", right=True, text=_each),
    Column("in_flight", "in flight", right=True, text=_each),
    Column("model_in_flight", "model", right=True, text=_each),
)
SENT_COLUMNS = (
    *RUN,
    Column("collective"),
    Column("sent_bytes", "sent (bytes)", right=True, text=_each),
    Column("model_sent_bytes", "model", right=True, text=_each),
    Column("sent_messages", "messages", right=True, text=_each),
    Column("model_sent_messages", "model", right=True, text=_each),
    Column("agrees"),
)


@click.command(
    "mesh",
    epilog="""\b
Examples:
  frugal parallel mesh --tp 2 --pp 2 --dp 2 --stage 1,2,3
  frugal parallel mesh --tp 1 --pp 2 --schedule interleaved --micro 4 --recompute
  frugal parallel mesh --tp 2 --pp 2 --dp 2 --experts 4 --stage 3
  mpiexec -n 4 frugal parallel mesh --tp 2 --pp 1 --dp 2 --backend mpi""",
    short_help="Train a decoder by tensor, pipeline and data parallelism at once.",
)
@click.option("--tp", type=COUNTS, default="2", show_default=True, help="Ranks that share a layer.")
@click.option("--pp", type=COUNTS, default="2", show_default=True, help="Ranks that share the depth.")
@click.option("--dp", type=COUNTS, default="2", show_default=True, help="Ranks that share the batch.")
@click.option(
    "--stage",
    "stages",
    type=ListOf(click.Choice(("1", "2", "3"))),
    default="1",
    show_default=True,
    help="ZeRO stages along the data.",
)
@click.option(
    "--schedule", "schedules", type=SCHEDULES, default="1f1b", show_default=True, help="Of pipelines."
)
@click.option("--chunks", type=SHARED, default=2, show_default=True, help="Stages a rank, if interleaved.")
@click.option("--micro", type=TRAINED, default=4, show_default=True, help="Micro-batches a step and rank.")
@click.option("--experts", type=SHARED, help="Make feed-forward layers mixtures, experts spread over --dp.")
@click.option("--sequence-parallel", is_flag=True, help="Split tokens too, outside of sublayers.")
@click.option("--recompute", is_flag=True, help="Run layers once more on the way back.")
@click.option("--steps", type=TRAINED, default=10, show_default=True, help="Steps.")
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
@output_options()
def mesh(
    tp: tuple[int, ...],
    pp: tuple[int, ...],
    dp: tuple[int, ...],
    stages: tuple[str, ...],
    schedules: tuple[str, ...],
    chunks: int,
    micro: int,
    experts: int | None,
    sequence_parallel: bool,
    recompute: bool,
    steps: int,
    seed: int,
    backend: str,
    timeout: float,
) -> Result:
    """Train a small decoder on tp x pp x dp ranks in float64, and hold it to one device and to the models.

    For every mesh, stage and schedule: the largest difference of a parameter to plain AdamW on one device,
    and between copies of one parameter; as counted on each rank and as the models say, bytes of model
    states, activations in flight, and bytes and messages under each collective.  The exit code is 1 if they
    differ, or if ranks stall.  With --experts the one device is the same program on one rank, which tests
    hold to PyTorch.
    """
    most = max(tp) * max(pp) * max(dp)
    if most > MOST_RANKS:
        raise click.UsageError(f"--tp x --pp x --dp are at most {MOST_RANKS} ranks; got {most}")
    reason = why_not(backend)
    if reason is not None:
        from refimpl.errors import BackendUnavailableError

        raise BackendUnavailableError(f"backend {backend}: {reason}")
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    with together(backend):
        from cli.mesh_experiment import TOLERANCE, MeshExperiment
        from refimpl.parallel.comm import run_ranks
        from refimpl.parallel.mesh import Mesh

        start: Any = run_ranks
        if backend == "mpi":
            from refimpl.parallel import mpi

            start = mpi.run_ranks
        launch = partial(start, timeout=timeout)
        experiment = MeshExperiment(steps=steps, seed=seed, experts=experts or 0)
        jobs = list(itertools.product(tp, pp, dp, map(int, stages), schedules))
        for tensor, depth, data, stage, schedule in progress(
            jobs, "train", lambda job: " x ".join(map(str, job))
        ):
            found = experiment.run(
                Mesh(tensor, depth, data),
                launch,
                micro=micro,
                stage=stage,
                schedule=schedule,
                chunks=chunks if schedule == "interleaved" else 1,
                recompute=recompute,
                sequence_parallel=sequence_parallel,
            )
            rows += found
            runs.append(found[0])
    wrong = sum(not row["agrees"] for row in rows)
    return Result(
        rows,
        SENT_COLUMNS,
        views=[View("runs", RUN_COLUMNS, runs), View("sent by each rank", SENT_COLUMNS, rows)],
        totals={"runs": len(runs), "disagree": wrong, "parameters": len(experiment.start)},
        sources=[
            "Shoeybi et al. 2019, arXiv:1909.08053, section 3",
            "Narayanan et al. 2021, arXiv:2104.04473, section 2",
            "Rajbhandari et al. 2020, arXiv:1910.02054, sections 5 and 7",
        ],
        problem=f"{wrong} of {len(rows)} rows differ from the models, or from one device by {TOLERANCE:g}"
        if wrong
        else "",
        exit_code=1 if wrong else 0,
        silent=another_speaks(backend),
    )


@click.command(
    "pipeline",
    epilog="""\b
Examples:
  frugal parallel pipeline --ranks 4,8 --micro 8,32
  frugal parallel pipeline --ranks 4 --micro 8 --send 0.5 --plot pipeline.svg""",
    short_help="Pipeline schedules in time: bubble and activations in flight.",
)
@click.option("--ranks", type=COUNTS, default="4", show_default=True, help="Ranks p.")
@click.option("--micro", type=COUNTS, default="8", show_default=True, help="Micro-batches m.")
@click.option(
    "--schedule", "schedules", type=SCHEDULES, default=",".join(NAMES), show_default=True, help="Which."
)
@click.option("--chunks", type=COUNT, default=2, show_default=True, help="Stages a rank, if interleaved.")
@click.option(
    "--forward", type=COUNT, default=1, show_default=True, help="Time of a micro-batch in a rank's layers."
)
@click.option("--backward", type=COUNT, default=2, show_default=True, help="The same, on the way back.")
@click.option("--send", type=Number(0, 1e9), default=0.0, show_default=True, help="Time on the wire.")
@output_options(plot=True)
def pipeline(
    ranks: tuple[int, ...],
    micro: tuple[int, ...],
    schedules: tuple[str, ...],
    chunks: int,
    forward: int,
    backward: int,
    send: float,
) -> Result:
    """Replay schedules step by step, and give makespan, idle share and activations held beside the formulas.

    The formulas hold for equal stages and no time on the wire; with --send they are what is lost against.
    The exit code is 1 if what the schedules do is not what the formulas say.
    A picture shows the first number of ranks and of micro-batches.
    """
    from fractions import Fraction

    from cli.pipeline_plot import draw_timelines
    from memsim.pipeline import pipeline_in_flight, pipeline_time
    from memsim.timeline import Timeline, replay
    from refimpl.errors import OptionError
    from refimpl.parallel.schedules import check_schedule, pipeline_schedule

    rows: list[dict[str, Any]] = []
    drawn: dict[str, Timeline] = {}
    wrong = 0
    for p, m, name in itertools.product(ranks, micro, schedules):
        shape: dict[str, Any] = {"schedule": name, "ranks": p, "micro_batches": m}
        shape["chunks"] = chunks if name == "interleaved" else 1
        if 2 * p * m * shape["chunks"] > MOST_STEPS:
            raise OptionError(f"{p} ranks x {m} micro-batches: expected at most {MOST_STEPS} steps to replay")
        plan = pipeline_schedule(**shape)
        held = check_schedule(plan, micro_batches=m, chunks=shape["chunks"])
        line = replay(
            plan,
            forward_time=Fraction(forward, shape["chunks"]),
            backward_time=Fraction(backward, shape["chunks"]),
            send_time=Fraction(send),
        )
        found = pipeline_time(**shape, forward_time=forward, backward_time=backward)
        if (p, m) == (ranks[0], micro[0]):
            drawn[name] = line
        rows.append(
            {
                **shape,
                "makespan": float(line.makespan),
                "model_makespan": float(found.total),
                "idle_share": float(line.idle_share),
                "model_idle_share": float(found["bubble"] / Fraction(found.total)),
                "in_flight": held,
                "model_in_flight": [int(pipeline_in_flight(**shape, rank=r).total) for r in range(p)],
            }
        )
        in_time = line.makespan == found.total and line.idle_share * found.total == found["bubble"]
        wrong += rows[-1]["in_flight"] != rows[-1]["model_in_flight"] or not (in_time or send)
    return Result(
        rows,
        (
            Column("schedule"),
            Column("ranks", right=True),
            Column("micro_batches", "micro-batches", right=True),
            Column("chunks", "stages a rank", right=True),
            Column("makespan", right=True),
            Column("model_makespan", "model", right=True),
            Column("idle_share", "idle", right=True),
            Column("model_idle_share", "model", right=True),
            Column("in_flight", "in flight", right=True, text=_each),
            Column("model_in_flight", "model", right=True, text=_each),
        ),
        sources=[
            "Huang et al. 2019, arXiv:1811.06965, section 2.3",
            "Narayanan et al. 2021, arXiv:2104.04473, section 2.2",
            "Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3",
        ],
        draw=lambda axes: draw_timelines(axes, drawn),
        problem=f"{wrong} of {len(rows)} schedules differ from the formulas" if wrong else "",
        exit_code=1 if wrong else 0,
    )
