"""``frugal memory training``: what a rank takes in a step, over time, and how other estimators count it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.quantities import gib_text
from cli.result import Column, Result

if TYPE_CHECKING:
    from memsim.memory.disagreement import View
    from memsim.memory.run import Run
    from memsim.memory.step_memory import Step
    from memsim.model import Model

__all__ = ["described_model", "run_result", "run_that"]

_COLUMNS = (
    Column("count", "counted by"),
    Column("stage", right=True),
    Column("weights_bytes", "weights", right=True, text=gib_text),
    Column("gradients_bytes", "gradients", right=True, text=gib_text),
    Column("optimizer_bytes", "optimizer", right=True, text=gib_text),
    Column("activations_bytes", "activations", right=True, text=gib_text),
    Column("buffers_bytes", "buffers", right=True, text=gib_text),
    Column("total_bytes", "total", right=True, text=gib_text),
)
_PRINTED = (
    Column("printed", "it printed", right=True),
    Column("deviation", right=True, text=lambda value: "" if value is None else _percent(value)),
)


def described_model(name: str | None, config: str | None, pad_vocabulary: int = 1) -> Model:
    """Return the model of the catalogue, or that of a ``config.json``, with a padded vocabulary."""
    from memsim.formats.huggingface import read_model
    from memsim.model import padded_vocabulary
    from memsim.parameters import model_of

    found = model_of(name) if name is not None else read_model(config or "")
    return padded_vocabulary(found, pad_vocabulary)


def run_that(options: Mapping[str, Any], deepspeed: str | None) -> Run:
    """Return the run of the options that were given; a DeepSpeed configuration fills in the others."""
    from memsim.formats.deepspeed_config import read_run
    from memsim.memory.run import Run

    chosen = {name: value for name, value in options.items() if value is not None}
    if deepspeed is None:
        return Run(**chosen)
    return read_run(Path(deepspeed), **chosen)


def run_result(model: Model, run: Run, *, hardware: str | None, adapter: Any, explain: bool) -> Result:
    """Return what one rank of each kind of stage takes.

    Parameters
    ----------
    model, run
        What is trained, and how.
    hardware : str, optional
        Whose memory it should fit into.
    adapter : mapping, optional
        Rank, targets and base of adapters that are trained in place of the model.
    explain : bool
        Whether to add how others count, why, and our formulas.
    """
    from memsim.memory.disagreement import disagreement
    from memsim.memory.step_memory import host_memory, step_memory

    stages = sorted({0, run.pipeline // 2, run.pipeline - 1})
    steps = {index: step_memory(model=model, run=run, index=index) for index in stages}
    views = [
        (index, view)
        for index, step in steps.items()
        for view in disagreement(model=model, run=run, index=index, step=step)
        if view.name.startswith("frugal") or (explain and index == 0)
    ]
    if adapter:
        views.append((0, _adapted(model, run, views[1][1], adapter)))
    rows = [_row(index, view) for index, view in views]
    peak = max(rows, key=lambda row: row["total_bytes"] if row["name"] == "frugal" else 0)
    totals: dict[str, Any] = {"peak_bytes": peak["total_bytes"], "stage": peak["stage"]}
    details = ["", *_reasons(views)] if explain else []
    if explain:
        details += _formulas(model, run)
    totals |= _reserved(steps[peak["stage"]])
    if run.offload != "none":
        totals["host_bytes"] = host_memory(model=model, run=run, index=peak["stage"])
    if hardware is not None:
        totals |= _capacity(hardware, totals["reserved_bytes"])
    return Result(
        rows,
        (*_COLUMNS, *(_PRINTED if any(row["printed"] for row in rows) else ())),
        totals=totals,
        sources=list(dict.fromkeys([*(view.source for _, view in views), model.source])),
        details=details,
        draw=lambda axes: _draw(axes, steps[peak["stage"]]),
    )


def _row(index: int, view: View) -> dict[str, Any]:
    parts = {f"{name}_bytes": size for name, size in view.parts.items()}
    return {
        "name": view.name,
        "count": view.title,
        "stage": index,
        **parts,
        "total_bytes": view.total,
        "printed": view.printed,
        "deviation": view.deviation,
        "why": list(view.why),
    }


def _adapted(model: Model, run: Run, at_once: View, adapter: Mapping[str, Any]) -> View:
    """Return the run with adapters that are trained while the model is frozen; activations stay all."""
    from dataclasses import replace

    from memsim.memory.adapter_states import adapter_states

    if run.tensor * run.pipeline > 1:
        from refimpl.errors import OptionError

        raise OptionError("--adapter-rank: expected one rank of the model; it is divided among several")
    states = adapter_states(
        model=model, convention=run.convention, ranks=run.data, stage=run.stage, **adapter
    )
    parts = dict(at_once.parts)
    parts["weights"] = sum(states[name] for name in ("frozen matrices", "other weights", "adapters' weights"))
    parts["gradients"] = states["adapters' gradients"]
    parts["optimizer"] = states.total - parts["weights"] - parts["gradients"]
    title = f"frugal, adapters of rank {adapter['rank']} on {adapter['base']}"
    why = (
        "the frozen model has neither gradients nor optimizer states",
        "activations as if all were trained",
    )
    return replace(at_once, name="frugal_adapters", title=title, parts=parts, why=why, counted=states)


def _reserved(step: Step) -> dict[str, Any]:
    from memsim.memory.allocator import play

    played = play(step)
    return {"reached_in": step.when, "allocated_bytes": played.allocated, "reserved_bytes": played.reserved}


def _capacity(name: str, reserved: int) -> dict[str, Any]:
    from memsim.hardware import hardware

    capacity = hardware(name).hbm.value
    return {"capacity_bytes": capacity, "fits": reserved <= capacity}


def _reasons(views: Sequence[tuple[int, View]]) -> list[str]:
    """Return why each count differs from ours, and by how much where."""
    ours = dict(views[1][1].parts)
    lines: list[str] = []
    for index, view in views:
        gaps = {name: size - ours[name] for name, size in view.parts.items() if size != ours[name]}
        shown = ", ".join(f"{name} {_signed(gap)}" for name, gap in gaps.items())
        against = "" if view.name == "frugal_at_once" or not shown else f"  (against all at once: {shown})"
        lines.append(f"{view.title}, stage {index}{against}")
        lines += [f"  - {reason}" for reason in view.why]
        if view.printed:
            share = _percent(view.deviation or 0.0)
            lines.append(f"  - it printed {view.printed}, this count differs by {share}: {view.note}")
        if view.counted is not None:
            lines += [f"    {item.explain()}" for item in view.counted.terms]
    return lines


def _percent(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.2%}"


def _signed(gap: Any) -> str:
    return f"{'+' if gap > 0 else '-'}{gib_text(abs(gap))}"


def _formulas(model: Model, run: Run) -> list[str]:
    """Return our formulas for the first stage: states of its parameters, activations of a micro-batch."""
    from memsim.memory.activations import activations
    from memsim.memory.layers_of_rank import held_parameters, layers_of_rank
    from memsim.memory.model_states import model_states
    from memsim.memory.rank_model import stage_model

    lines = []
    counts = held_parameters(layers_of_rank(model, run, 0))
    for what, count, ranks in zip(
        ("all but experts", "experts"), counts, (run.data, run.data // run.expert), strict=True
    ):
        if count:
            states = model_states(
                parameters=count, ranks=ranks, stage=run.stage, convention=run.convention, offload=run.offload
            )
            lines += ["", f"states of the first stage, {what}", *(f"  {line}" for line in states.explain())]
    kept = activations(
        model=stage_model(model, pipeline=run.pipeline * run.interleave, index=0),
        batch=run.batch, sequence=run.sequence, tensor=run.tensor, sequence_parallel=run.sequence_parallel,
        recompute=run.recompute, attention=run.attention, dropout=run.dropout, fused_gate=run.fused_gate,
        fused_norm=run.fused_norm,
    )  # fmt: skip
    return [
        *lines,
        "",
        "activations of a micro-batch in its first layers",
        *(f"  {t.explain()}" for t in kept.terms),
    ]


def _draw(axes: Any, step: Step) -> None:
    """Draw the memory of a step over its events, kind upon kind."""
    import numpy as np

    kinds = list(dict.fromkeys(event.kind for event in step.events))
    sizes = [[float(event.size * (event.kind == kind)) for event in step.events] for kind in kinds]
    axes.stackplot(
        np.arange(len(step.events)), np.cumsum(sizes, axis=1) / 2**30, labels=kinds, step="post", linewidth=0
    )
    axes.set(xlabel="tensors taken or given back, in order", ylabel="memory of a rank / GiB", xlim=(0, None))
    axes.legend(loc="upper left", fontsize="small")
