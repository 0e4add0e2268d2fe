"""``frugal moe``: what mixture-of-experts models hold and activate, beside what is published."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.parameters import COUNT, COUNTS, MODEL, PRECISIONS, Number
from cli.quantities import bytes_text, flop_text
from cli.result import Column, Result, Row, View, cell_text

if TYPE_CHECKING:
    from memsim.estimate import Estimate
    from memsim.model import Part

__all__ = ["command"]

READINGS = ("columns", "facts")


def _billions(value: Any) -> str:
    if value is None:
        return ""
    billions = float(value) / 1e9
    return f"{billions:,.4g}" if billions < 1000 else f"{billions:,.5g}"


def _percent(value: Any) -> str:
    return "" if value is None else f"{100 * value:+.1f}%"


def _deviation(ours: Any, published: Any) -> float | None:
    return None if published is None else float(ours) / float(published) - 1


@click.command(
    epilog="""\b
Examples:
  frugal moe --table
  frugal moe --table --reading columns --markdown
  frugal moe --model mixtral-8x7b --explain
  frugal moe --model deepseekmoe-16b --ranks 8,64 --tokens 4096 --sequence 4096""",
    short_help="Parameters, FLOPs and all-to-alls of MoE models.",
)
@click.option("--model", "model_name", type=MODEL, help="One model: total and activated, part by part.")
@click.option("--table", is_flag=True, help="The lecture's 34 designs, and DeepSeek's FLOPs.")
@click.option(
    "--reading",
    type=click.Choice((*READINGS, "both")),
    help="columns: what the table alone says; facts: with what it leaves out.  [default: both]",
)
@click.option("--sequence", type=COUNT, help="Tokens of a sequence: FLOPs of the model's matrix products.")
@click.option("--ranks", type=COUNTS, help="Ranks that the experts are spread over: bytes of all-to-alls.")
@click.option("--tokens", type=COUNT, default=4096, show_default=True, help="Tokens of each rank.")
@click.option(
    "--capacity-factor",
    type=Number(0.0, 1e6, min_open=True),
    default=1.0,
    show_default=True,
    help="Places in the experts' buffers over what balanced routing fills.",
)
@click.option(
    "--dtype",
    type=click.Choice(tuple(PRECISIONS)),
    default="bfloat16",
    show_default=True,
    help="Of tokens sent.",
)
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options()
def command(
    model_name: str | None,
    table: bool,
    reading: str | None,
    sequence: int | None,
    ranks: tuple[int, ...] | None,
    tokens: int,
    capacity_factor: float,
    dtype: str,
    explain: bool,
) -> Result:
    """Count the parameters that a model has and those that one token activates.

    --table sets all designs of the lecture beside the published sizes, from its columns alone and with the
    facts that it leaves out.  --model takes one apart; with --sequence it counts FLOPs, and with --ranks what
    the busiest rank sends in the two all-to-alls of one layer's forward pass, as the reference's ranks do.
    """
    if table == (model_name is not None):
        raise click.UsageError("give either --model or --table")
    if table:
        if ranks or sequence or explain:
            raise click.UsageError("--ranks, --sequence and --explain go with --model")
        return _table(READINGS if reading in (None, "both") else (reading,))
    if reading is not None:
        raise click.UsageError("--reading goes with --table")
    return _one(str(model_name), sequence, ranks or (), tokens, capacity_factor, dtype, explain)


def _table(readings: Sequence[str]) -> Result:
    from memsim.moe import moe_parameters
    from memsim.moe_design import column_parameters, design_rows, published_sizes
    from memsim.published import reproduce

    published, rows, shown = published_sizes(), [], []
    for design in design_rows():
        total, activated = published[design.model]
        line: dict[str, Any] = {
            "design": f"{design.reference.partition(' (')[0]} {design.name}",
            "published_total": total,
            "published_activated": activated,
        }
        for reading in readings:
            by_columns = reading == "columns"
            found = column_parameters(row=design.model) if by_columns else moe_parameters(model=design.model)
            counts = found.total.total, found.activated.total
            row = {
                "table": "designs",
                "reference": design.reference,
                "name": design.name,
                "model": design.model,
                "reading": reading,
                "activated_parameters": counts[1],
                "total_parameters": counts[0],
                "published_activated_parameters": activated,
                "published_total_parameters": total,
                "activated_deviation": _deviation(counts[1], activated),
                "total_deviation": _deviation(counts[0], total),
                "facts": "" if by_columns else design.facts,
            }
            rows.append(row)
            line |= {f"{reading} {key}": value for key, value in row.items()}
        shown.append(line)
    flops = [row for row in reproduce("deepseek_flops") if row.unit == "TFLOP"]
    operations = [
        {
            "table": "flops",
            "name": row.id.removeprefix("deepseek.flops."),
            "flop": None if row.ours is None else row.ours * 1e12,
            "published_flop": float(row.published) * 1e12,
            "deviation": row.deviation,
            "verdict": row.verdict,
            "facts": row.reason,
        }
        for row in flops
    ]
    views = [View(_heading(readings), _design_columns(readings), shown), _flop_view(operations)]
    sources = [
        "Efficiency in LLMs, CSC6203 lecture 5, MoE Experts Design; after Cai et al. 2024, arXiv:2407.06204",
        "Dai et al. 2024, arXiv:2401.06066, tables 1 to 6, by Bi et al. 2024, arXiv:2401.02954, eq. 2",
    ]
    return Result([*rows, *operations], (), totals=_shares(rows), sources=sources, views=views)


def _heading(readings: Sequence[str]) -> str:
    said = {"columns": "from the table's columns alone", "facts": "with the facts that they leave out"}
    return (
        f"Parameters in B, {' and '.join(said[reading] for reading in readings)}; Δ from the published size"
    )


def _design_columns(readings: Sequence[str]) -> list[Column]:
    columns = [
        Column("design"),
        Column("published_activated", "published: activated", right=True, text=_billions),
        Column("published_total", "total", right=True, text=_billions),
    ]
    for reading in readings:
        for part in ("activated", "total"):
            title = f"{reading}: {part}" if part == "activated" else part
            columns.append(Column(f"{reading} {part}_parameters", title, right=True, text=_billions))
            columns.append(Column(f"{reading} {part}_deviation", "Δ", right=True, text=_percent))
    if tuple(readings) == ("facts",):  # beside the other reading there is no room for it
        columns.append(Column("facts facts", "what the columns do not say"))
    return columns


def _flop_view(rows: Sequence[Row]) -> View:
    columns = (
        Column("name", "model"),
        Column("published_flop", "published", right=True, text=flop_text),
        Column("flop", "ours", right=True, text=flop_text),
        Column("deviation", right=True, text=lambda value: "" if value is None else f"{100 * value:+.2f}%"),
        Column("facts", "reading"),
    )
    return View("DeepSeek's FLOPs of a forward and a backward pass over a sequence", columns, rows)


def _shares(rows: Sequence[Row]) -> dict[str, int]:
    """Return how many totals lie within so many percent of the published ones, for each reading."""
    found: dict[str, int] = {}
    for reading in dict.fromkeys(row["reading"] for row in rows):
        deviations = [abs(row["total_deviation"]) for row in rows if row["reading"] == reading]
        found[f"{reading}_rows"] = len(deviations)
        for percent in (1, 5, 10):
            found[f"{reading}_within_{percent}_percent"] = sum(d <= percent / 100 for d in deviations)
    return found


def _one(
    name: str,
    sequence: int | None,
    ranks: Sequence[int],
    tokens: int,
    capacity_factor: float,
    dtype: str,
    explain: bool,
) -> Result:
    from memsim.model_flops import model_flops
    from memsim.moe import moe_parameters

    total, activated = moe_parameters(model=name)
    rows: list[dict[str, Any]] = [
        {
            "table": "parameters",
            "part": term.name,
            "total_parameters": term.value,
            "activated_parameters": used.value,
            "formula": term.formula,
        }
        for term, used in zip(total.terms, activated.terms, strict=True)
    ]
    totals: dict[str, Any] = {
        "total_parameters": total.total,
        "activated_parameters": activated.total,
        "activated_share": float(activated.total / total.total),
    }
    counts = ("total_parameters", "activated_parameters")
    columns = (
        Column("part"),
        *(Column(key, key.partition("_")[0], right=True, text=_millions) for key in counts),
        Column("formula"),
    )
    views = [View(f"{name}: parameters in M", columns, [*rows, {"part": "all", **totals}])]
    estimates = [total, activated]
    if sequence is not None:
        flops = model_flops(model=name, sequence=sequence)
        totals["flop"] = flops.total
        estimates.append(flops)
    if ranks:
        sent, parts = _all_to_alls(name, ranks, tokens, capacity_factor, PRECISIONS[dtype][0])
        estimates += parts
        rows += sent
        views.append(_sent_view(tokens, dtype, sent))
    details: list[str] = []
    for estimate in estimates if explain else ():
        details += ["", estimate.name, *(f"  {line}" for line in estimate.explain())]
    sources = dict.fromkeys(term.source for estimate in estimates for term in estimate.terms)
    return Result(rows, (), totals=totals, sources=list(sources), views=views, details=details)


def _millions(value: Any) -> str:
    return "" if value is None else f"{float(value) / 1e6:,.2f}"


def _all_to_alls(
    name: str, ranks: Sequence[int], tokens: int, capacity_factor: float, itemsize: int
) -> tuple[list[dict[str, Any]], list[Estimate]]:
    """Return for each kind of layer and number of ranks what the busiest rank sends, and the estimates."""
    from memsim.formula import evaluate
    from memsim.model import model
    from memsim.moe_communication import moe_all_to_all
    from memsim.units import exact

    described = model(name)
    kinds: list[tuple[str, int, Part]] = [
        (stack.name, stack.layers, part)
        for stack in described.stacks
        for part in stack.parts
        if part.kind == "experts"
    ]
    if not kinds:
        raise click.BadParameter(f"--ranks: {name} has no experts to spread")
    rows, estimates = [], []
    for (stack, layers, part), count in itertools.product(kinds, ranks):
        experts, active = part.sizes["experts"], part.sizes["active"]
        balanced = {"f": exact(capacity_factor), "k": active, "t": tokens, "E": experts}
        capacity = evaluate("ceil(f*k*t/E)", balanced)
        size: dict[str, Any] = {"experts": experts, "capacity": capacity, "width": described.width}
        held = -(-experts // count)  # of the rank with most experts, which sends most
        found = moe_all_to_all(**size, ranks=count, itemsize=itemsize, held=held)
        estimates.append(found)
        rows.append(
            {
                "table": "all_to_all",
                "part": stack,
                "layers": layers,
                "ranks": count,
                **size,
                "dispatch_bytes": found["forward, dispatch"],
                "combine_bytes": found["forward, combine"],
                "layer_bytes": found.total,
                "all_layers_bytes": layers * found.total,
            }
        )
    return rows, estimates


def _sent_view(tokens: int, dtype: str, rows: Sequence[Row]) -> View:
    sizes = ("dispatch_bytes", "combine_bytes", "layer_bytes", "all_layers_bytes")
    columns = (
        Column("part", "layers of"),
        *(Column(key, right=True, text=cell_text) for key in ("ranks", "experts", "capacity", "layers")),
        *(Column(key, _title(key), right=True, text=bytes_text) for key in sizes),
    )
    heading = f"Sent by the busiest rank in a forward pass, {tokens} tokens a rank in {dtype}"
    return View(heading, columns, rows)


def _title(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")
