"""``frugal errata``: the lecture's own mistakes, as functions that break a law."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options, progress
from cli.result import Column, Result

if TYPE_CHECKING:
    from refimpl.registry import Erratum
    from refimpl.testing import Report

__all__ = ["command"]

COLUMNS = tuple(map(Column, ("technique", "name", "slide", "says", "should_say", "breaks")))


def _caught(record: Erratum, examples: int) -> tuple[bool | None, str]:
    """Return whether the law that `record` breaks notices its mutant, and what the law says.

    None: it cannot be run.  A mutant that crashes is not caught: the law has to find the wrong number.
    """
    from refimpl.testing import check

    if record.mutant is None:
        return None, "it has no function to run"
    # Random cases one by one, then the edge cases: the first in which the law speaks ends the search.
    judge = partial(check, record.technique, record.mutant, label=record.name)

    def reports() -> Iterator[Report]:
        for seed in range(examples):
            yield judge(seed=seed, examples=1, edges=False)
        yield judge(examples=0)

    judged = 0
    for report in reports():
        for outcome in report.outcomes:
            if outcome.check != record.breaks:
                continue
            if outcome.status == "failed" and not outcome.detail.startswith("raised "):
                return True, outcome.detail
            judged += 1
    if not judged:
        return False, f"no case reached the law {record.breaks}"
    return False, f"the law {record.breaks} let all {judged} cases pass"


@click.command(epilog="Example: frugal errata --run", short_help="The lecture's own mistakes, runnable.")
@click.option("--run", is_flag=True, help="Run each mistake against the law that it breaks.")
@click.option(
    "--examples",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Random cases, with --run.",
)
@output_options()
def command(run: bool, examples: int) -> Result:
    """List the lecture's mistakes: what a slide says, what it should say, and the law that tells them apart.

    With --run the mistakes are computed as printed, and the exit code is 1 if a law does not notice one.
    """
    from refimpl import registry

    registry.load()
    records = sorted(registry.ERRATA, key=lambda record: (record.technique, record.name))
    rows: list[dict[str, Any]] = [
        {column.key: getattr(record, column.key) for column in COLUMNS} for record in records
    ]
    if not run:
        return Result(rows, COLUMNS, totals={"errata": len(rows)})
    for row, record in zip(rows, progress(records, "errata", lambda record: record.name), strict=True):
        row["caught"], row["evidence"] = _caught(record, examples)
    missed = [row["name"] for row in rows if row["caught"] is False]
    brief = (
        Column("technique"),
        Column("name"),
        Column("says"),
        Column("breaks"),
        Column("caught"),
        Column("evidence"),
    )
    return Result(
        rows,
        brief,
        totals={
            "errata": len(rows),
            "caught": sum(row["caught"] is True for row in rows),
            "missed": len(missed),
        },
        problem=f"not caught: {', '.join(missed)}" if missed else "",
        exit_code=1 if missed else 0,
    )
