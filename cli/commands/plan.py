"""``frugal plan``: how to divide the training of a model among accelerators, from all ways that there are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options, progress
from cli.parameters import AXES, BYTES, COUNT, AxisValue, ListOf
from cli.quantities import bytes_text, time_text
from cli.result import Column, Result, Row
from cli.step_options import division_of, division_row, scores_note, setting_of, setting_options

if TYPE_CHECKING:
    from memsim.planning.division import Division
    from memsim.planning.planner import Found, Plan, Slice
    from memsim.planning.training_setting import Setting
    from memsim.planning.training_step import TrainingStep

__all__ = ["command"]


@click.command(
    "plan",
    epilog="""\b
Examples:
  frugal plan --model gpt3-175b --gpus 64 --batch 64 --sequence 2048 --attention standard --dropout
  frugal plan --model llama-3-70b --gpus 256 --hardware h100-sxm --batch 512 --sequence 8192 --explain
  frugal plan --config my/config.json --gpus 64 --hardware h200 --batch 256 --sequence 8192 --capacity 130GB
  frugal plan --model llama-2-7b --gpus 8 --batch 64 --sequence 4096 --stack "llm-foundry on A100"
  mpiexec -n 8 frugal plan --executor mpi --model deepseek-v2 --gpus 2048 --batch 9216 --sequence 4096""",
    short_help="The fastest way to divide training that fits.",
)
@setting_options
@click.option(
    "--precision",
    type=ListOf(click.Choice(("bf16", "fp16", "fp8", "fp32"))),
    default="bf16",
    show_default=True,
    help="Formats of matrix products to choose from.",
)
@click.option("--zero", type=ListOf(click.Choice(tuple("0123"))), help="Stages of ZeRO.  [default: all]")
@click.option(
    "--recompute", type=ListOf(click.Choice(("none", "selective", "full"))), help="[default: all that differ]"
)
@click.option("--offload/--no-offload", default=True, help="Optimizer states may stand on the host.")
@click.option("--largest-micro-batch", type=COUNT, help="Sequences of a micro-batch at most.")
@click.option("--capacity", type=BYTES, help="Memory that may be filled.  [default: all of an accelerator's]")
@click.option("--against", type=AXES, help="A division to compare with: tensor=8,pipeline=8,zero=1.")
@click.option("--executor", type=click.Choice(("serial", "mpi")), default="serial", help="Who searches.")
@click.option("--timing", is_flag=True, help="Also tell how many divisions a second one core computed.")
@click.option("--explain", is_flag=True, help="Print the fastest one's formulas, with the numbers in them.")
@output_options(plot=True)
def command(
    precision: tuple[str, ...],
    zero: tuple[str, ...] | None,
    recompute: tuple[str, ...] | None,
    offload: bool,
    largest_micro_batch: int | None,
    capacity: int | None,
    against: dict[str, AxisValue] | None,
    executor: str,
    timing: bool,
    explain: bool,
    **options: Any,
) -> Result:
    """Search tensor x pipeline x data x context x expert parallelism, and all that goes with them.

    The table is the front: divisions than which nothing is both faster and smaller.  Times are lower bounds
    as long as every efficiency is 1; --stack takes measured ones, and --calibration times of kernels measured
    on the card.  Workspaces and fragmentation need room:
    set --capacity below the whole.  The host's memory is not limited.
    """
    from memsim.planning.plan_space import space
    from memsim.planning.planner import plan

    setting = setting_of(options)
    given = division_of(against) if against is not None else None
    grids = space(
        setting,
        zeros=[int(stage) for stage in zero or "0123"],
        recomputes=recompute,  # type: ignore[arg-type]
        offloads=(False, True) if offload else (False,),
        precisions=precision,  # type: ignore[arg-type]
        largest_micro_batch=largest_micro_batch,
    )
    if timing and executor == "mpi":
        raise click.UsageError("--timing tells of one core: not with --executor mpi")
    with _pool(executor) as pool:
        if executor == "mpi" and pool is None:
            return Result([], (), silent=True)  # this process searched for another one
        started = time.process_time()
        found = plan(setting, grids, capacity=capacity, each=lambda parts: _search(parts, pool))
        took = time.process_time() - started
    totals = {"search_s": took, "divisions_per_s": round(found.runnable / took)} if timing else {}
    return _result(setting, found, given, totals, explain)


def _pool(executor: str) -> Any:
    if executor == "serial":
        return nullcontext()
    from refimpl.parallel.mpi import executor as mpi_executor

    return mpi_executor()


def _search(parts: list[Slice], pool: Any) -> Iterator[Found]:
    """Yield what each slice holds, in order, telling how far it is."""
    from memsim.planning.planner import search

    results = map(search, parts) if pool is None else pool.map(search, parts)
    for _ in progress(parts, "plan", lambda part: f"{part.grid.layouts[0].pipeline} stages"):
        yield next(results)


def _result(
    setting: Setting, found: Plan, given: Division | None, timing: dict[str, float], explain: bool
) -> Result:
    from memsim.planning.training_step import training_step

    rows = [_row("front", item.division, training_step(setting, item.division)) for item in found.front]
    totals: dict[str, Any] = {"grid": found.grid, "runnable": found.runnable, "fitting": found.fitting}
    totals |= timing
    if given is not None:
        rows.insert(0, _row("given", given, training_step(setting, given)))
        totals["speedup"] = rows[0]["time_s"] / rows[1]["time_s"]
    details = ["", *_summary(found.step), *scores_note(setting)]
    if explain:
        details += ["", *(f"  {item.explain()}" for item in found.step.quantities.values())]
    return Result(
        rows,
        _columns(rows),
        totals=totals,
        sources=list(dict.fromkeys(item.source for item in found.step.quantities.values())),
        details=details,
        draw=lambda axes: _draw(axes, rows),
    )


def _row(kind: str, division: Division, step: TrainingStep) -> dict[str, Any]:
    return {
        "kind": kind,
        **division_row(division),
        "time_s": float(step.time.total),
        "memory_bytes": float(step.memory.total),
        "sent_bytes": float(step.sent.total),
        "mfu": float(step.value("mfu")),
        "hfu": float(step.value("hfu")),
    }


_SHORT = {
    "tensor": "tp", "pipeline": "pp", "data": "dp", "context": "cp", "expert": "ep", "interleave": "v",
    "micro_batch": "micro", "zero": "zero", "recompute": "recompute", "sequence_parallel": "sp",
    "offload": "offload", "precision": "precision",
}  # fmt: skip


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns: of the division only what differs between rows, or from what is plain."""
    plain = {"expert": 1, "context": 1, "offload": False, "precision": "bf16"}
    shown = [
        Column(key, title, right=key not in ("recompute", "precision"))
        for key, title in _SHORT.items()
        if key not in plain or any(row[key] != plain[key] for row in rows)
    ]
    return [
        *([Column("kind", "")] if rows[0]["kind"] == "given" else []),
        *shown,
        Column("time_s", "step", right=True, text=time_text),
        Column("memory_bytes", "memory a rank", right=True, text=bytes_text),
        Column("sent_bytes", "sent", right=True, text=bytes_text),
        Column("mfu", "MFU", right=True, text=lambda value: f"{100 * value:.1f} %"),
    ]


def _summary(step: TrainingStep) -> list[str]:
    """Return what the time and memory of the fastest division are made of."""
    whole = step.time.total
    times = [
        f"{t.name} {time_text(float(t.value))} ({float(100 * t.value / whole):.1f} %)"
        for t in step.time.terms
    ]
    sizes = [f"{t.name} {bytes_text(float(t.value))}" for t in step.memory.terms]
    sends = [f"{t.name} {bytes_text(float(t.value))}" for t in step.sent.terms if t.value]
    return [
        f"fastest: {time_text(float(whole))} = {' + '.join(times)}",
        f"fullest rank: {bytes_text(float(step.memory.total))} = {' + '.join(sizes)}",
        f"sent by a rank: {bytes_text(float(step.sent.total))}{' = ' if sends else ''}{' + '.join(sends)}",
    ]


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the front as the edge that it is, and the given division apart."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    front = [(row["time_s"], row["memory_bytes"] / 1e9) for row in rows if row["kind"] == "front"]
    axes.step(
        *zip(*front, strict=True), "o-", where="post", markersize=4, label="nothing is faster and smaller"
    )
    for row in rows:
        if row["kind"] == "given":
            axes.plot(row["time_s"], row["memory_bytes"] / 1e9, "x", color="tab:red", label="given")
    axes.set(xscale="log", yscale="log", xlabel="time of a step / s", ylabel="memory a rank / GB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter("")
    axes.annotate(
        _short(next(row for row in rows if row["kind"] == "front")),
        front[0], xytext=(8, 2), textcoords="offset points", fontsize=7,
    )  # fmt: skip
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()


def _short(row: Row) -> str:
    """Return a division in a few words: its ranks, and what it recomputes."""
    ranks = [f"{_SHORT[key]} {row[key]}" for key in ("tensor", "pipeline", "data", "context", "expert")]
    return ", ".join([*(text for text in ranks if not text.endswith(" 1")), f"recompute {row['recompute']}"])
