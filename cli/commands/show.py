"""``frugal show``: everything that is registered about a technique, and its traffic step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.parameters import COUNT, TECHNIQUE, axis_text
from cli.result import Column, Result, grouped

if TYPE_CHECKING:
    from refimpl.registry import Case, Technique

__all__ = ["command"]

# What the lengths and the width of a case are called, over all techniques.
LENGTHS = ("Tq", "Tk", "T", "n")
WIDTHS = ("D", "Dv", "d")
TRACE_COLUMNS = (
    Column("step", right=True),
    Column("kind"),
    Column("array"),
    Column("rows"),
    Column("elements", right=True),
    Column("bytes", right=True),
    Column("on_chip_elements", "on chip", right=True),
)


@click.command(
    epilog="""\b
Examples:
  frugal show attention.flash
  frugal show parallel.pipeline --plot pipeline.svg
  frugal show attention.flash --trace --n 8 --d 2 --sram 64""",
    short_help="All that is known about one technique.",
)
@click.argument("name", type=TECHNIQUE)
@click.option("--trace", is_flag=True, help="Run the reference and log what moves on and off chip.")
@click.option("--n", type=COUNT, default=8, show_default=True, help="Length of the traced case.")
@click.option("--d", type=COUNT, default=2, show_default=True, help="Width of the traced case.")
@click.option("--sram", type=COUNT, default=64, show_default=True, help="Elements that fit on chip.")
@click.option(
    "--dtype",
    type=click.Choice(("float16", "float32", "float64")),
    default="float32",
    show_default=True,
    help="Of the traced case.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the traced case.")
@output_options(plot=True)
def command(name: str, trace: bool, n: int, d: int, sram: int, dtype: str, seed: int) -> Result:
    """Show technique NAME: signature, source, axes, laws, implementations, prices, errata.

    With --trace, the reference runs on random data, and every load and store is listed.  Pipelines have a
    picture: --plot draws their schedules on 4 ranks.
    """
    from refimpl import registry

    technique = registry.get(name)
    if trace:
        return _trace(technique, _traced_case(technique, n, d, sram, dtype, seed), sram)
    rows = [
        {"section": section, "item": item, "detail": detail} for section, item, detail in _facts(technique)
    ]
    columns = (Column("item"), Column("detail"))
    return Result(
        rows,
        (Column("section"), *columns),
        views=grouped(rows, columns, "section"),
        sources=[str(technique.source)],
        draw=_pipelines if name.startswith("parallel.pipeline") else None,
    )


def _pipelines(axes: Any) -> None:
    from cli.pipeline_plot import draw_timelines, example_timelines

    draw_timelines(axes, example_timelines())


def _facts(technique: Technique) -> Iterator[tuple[str, str, str]]:
    """Yield (section, item, detail) for all that is registered."""
    from refimpl import registry

    function = technique.function
    yield "definition", "name", technique.name
    yield "definition", "summary", (inspect.getdoc(function) or "").partition("\n")[0]
    yield "definition", "signature", f"{function.__name__}{_signature(function)}"
    yield "definition", "function", technique.home
    yield "definition", "kind", technique.kind
    yield "definition", "entries", ", ".join(map(str, technique.entries))
    yield "definition", "source", str(technique.source)
    if technique.vjp:
        yield "definition", "gradient", technique.vjp
    for axis, (low, high) in technique.axes.items():
        yield "axes", axis, f"{low} to {high}"
    for option, choices in technique.options.items():
        yield "options", option, ", ".join(map(axis_text, choices))
    for law in registry.laws_of(technique.name):
        yield "laws", law.name, law.statement
    for oracle in registry.ORACLES.get(technique.name, ()):
        summary = (inspect.getdoc(oracle) or "").partition("\n")[0]
        yield "oracles", f"{oracle.__module__}:{oracle.__qualname__}", summary
    for item in registry.implementations_of(technique.name):
        yield "implementations", item.target, f"{', '.join(item.backends)} {item.tier}".rstrip()
    for price in (item for item in registry.PRICES if item.technique == technique.name):
        where = f"{price.function.__module__}:{price.function.__qualname__}"
        yield "prices", price.counts, where + (f" of {price.of}" if price.of else "")
    for mistake in (mistake for mistake in registry.ERRATA if mistake.technique == technique.name):
        detail = f"{mistake.slide}: {mistake.says}; should say {mistake.should_say}; breaks {mistake.breaks}"
        yield "errata", mistake.name, detail


def _signature(function: Callable[..., Any]) -> str:
    """Return the parameters with their defaults; types stand in the docstring."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _traced_case(technique: Technique, n: int, d: int, sram: int, dtype: str, seed: int) -> Case:
    """Return one plain call: lengths `n`, width `d`, one of everything else, no extras.

    Raises
    ------
    click.UsageError
        If the reference does not say what it moves.
    """
    import numpy as np

    from refimpl import registry
    from refimpl.tolerances import cast

    parameters = inspect.signature(technique.function).parameters
    if "memory" not in parameters or technique.sample is None:
        traceable = sorted(
            record.name
            for record in registry.TECHNIQUES.values()
            if record.sample is not None and "memory" in inspect.signature(record.function).parameters
        )
        raise click.UsageError(
            f"{technique.name} does not count what it moves; --trace needs one of {', '.join(traceable)}"
        )
    sizes = {axis: n if axis in LENGTHS else d if axis in WIDTHS else 1 for axis in technique.axes}
    plain = {option: choices[0] for option, choices in technique.options.items()}
    case = technique.sample(np.random.default_rng(seed), **sizes, **plain)
    if "sram" in parameters:
        case = case.without("block_sizes").replace(sram=sram)
    return cast(case, np.dtype(dtype))


def _trace(technique: Technique, case: Case, sram: int) -> Result:
    from refimpl.memory import Memory

    # The papers' block sizes leave no room for the scores, so a capacity of `sram` would refuse them.
    memory = Memory(log=True) if "sram" in case.kwargs else Memory(capacity=sram, log=True)
    case.replace(memory=memory).call(technique.function)
    rows = []
    for event in memory.events:
        row = event._asdict()
        rows.append({**row, "on_chip_elements": row.pop("on_chip")})
    return Result(
        rows,
        TRACE_COLUMNS,
        totals={**memory.totals(), "peak_elements": memory.peak},
        sources=[str(technique.source)],
    )
