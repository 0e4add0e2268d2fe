"""``frugal reproduce``: every published number beside the one computed here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import takewhile
from typing import Any

import click
from click.shell_completion import CompletionItem

from cli.output import output_options
from cli.result import Column, Result, Row, View

__all__ = ["command"]

# One cell of ZeRO's Table 1: model, ranks, stage.
CELL = re.compile(r"zero\.table1\.(?P<model>.+)\.n(?P<ranks>\d+)\.(?P<stage>stage\d)")
FAILED = "NOT REPRODUCED"


def _amount_text(value: Any) -> str:
    return (
        "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}".removesuffix(".0")
    )


def _percent_text(value: Any) -> str:
    return "" if value is None else f"{100 * value:+.1f}%"


def _judgement_style(text: str) -> str:
    styles = {"derives": "green", "stated": "green", "NOT": "bold red", "fitted": "yellow", "does": "yellow"}
    return styles.get(text.partition(" ")[0], "")


COLUMNS = (
    Column("label", "id"),
    Column("print", "published", right=True),
    Column("ours", right=True, text=_amount_text),
    Column("deviation", right=True, text=_percent_text),
    Column("judgement", "verdict", style=_judgement_style),
    Column("reason", "reading, or reason"),
)
CELL_COLUMNS = (
    Column("model"),
    Column("ranks", right=True),
    *(Column(f"stage{i}", f"stage {i}: published, ours", right=True) for i in (1, 2, 3)),
)


def _sections(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from memsim.published import sections

    return [CompletionItem(name) for name in sections() if name.startswith(incomplete)]


def _work(row: Row) -> tuple[str, str]:
    """Return the work with its identifier, and the place in it."""
    work, identifier, *place = row["source"].split(", ", 2)
    return f"{work}, {identifier}", ", ".join(place)


def _judgement(row: Row) -> str:
    if not row["ok"]:
        return FAILED
    name = "stated reading" if "stated reading" in row["verdict"] else row["verdict"]
    # Equal after rounding to the printed digits is what derives means, unless something else is said.
    plain = row["tolerance"] == "half-up" or not row["verdict"].startswith("derives")
    return name if plain else f"{name} ({row['tolerance']})"


def _common_prefix(ids: Sequence[str]) -> str:
    """Return the leading dotted words that all `ids` share, with the last dot; never a whole id.

    >>> _common_prefix(["zero.gpt2.states", "zero.gpt2.weights"]), _common_prefix(["zero.a", "lecture.b"])
    ('zero.gpt2.', '')
    """
    words = [name.split(".")[:-1] for name in ids]
    shared = [
        column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    ]
    return "".join(f"{word}." for word in shared)


def _views(rows: Iterable[Row]) -> list[View]:
    """Return a table for each work, in parts by place; the cells of a printed grid stay a grid."""
    works: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        work, place = _work(row)
        works.setdefault(work, {}).setdefault(place, []).append(row)
    views = []
    for work, places in works.items():
        grids = {place: members for place, members in places.items() if CELL.fullmatch(members[0]["id"])}
        views += [_grid(f"{work}, {place}", members) for place, members in grids.items()]
        others = {place: members for place, members in places.items() if place not in grids}
        if not others:
            continue
        prefix = _common_prefix([row["id"] for members in others.values() for row in members])
        views.append(View(f"{work}{f' [{prefix}*]' if prefix else ''}", COLUMNS, []))
        for place, members in others.items():
            shown = [
                {
                    **row,
                    "label": f"  {row['id'].removeprefix(prefix)}",
                    "print": f"{row['published']} {'' if row['unit'] == '1' else row['unit']}".rstrip(),
                    "judgement": _judgement(row),
                }
                for row in members
            ]
            views.append(View(place, COLUMNS, shown, part=True))
    return views


def _grid(heading: str, cells: Iterable[Row]) -> View:
    grid: dict[tuple[str, str], dict[str, Any]] = {}
    for row in cells:
        match = CELL.fullmatch(row["id"])
        if match is not None:
            line = grid.setdefault(
                (match["model"], match["ranks"]), {"model": match["model"], "ranks": match["ranks"]}
            )
            mark = "!" if not row["ok"] else " " if row["verdict"] == "derives" else "*"
            line[match["stage"]] = f"{row['published']:>6} {_amount_text(row['ours']):>8}{mark}"
    legend = "in GB; * derives under a stated reading, digits cut off; ! not reproduced"
    return View(f"{heading} ({legend})", CELL_COLUMNS, list(grid.values()))


def _explanations(section: str | None, ids: set[str]) -> dict[str, list[str]]:
    """Return for each number with a model the formulas behind it, with the numbers in them."""
    from memsim.published import load, recompute, sections

    entries = (entry for name in ([section] if section else sections()) for entry in load(name))
    return {
        entry["id"]: recompute(entry).explain()
        for entry in entries
        if entry["id"] in ids and entry["verdict"] != "measurement"
    }


@click.command(
    epilog="""\b
Examples:
  frugal reproduce
  frugal reproduce --section zero --json
  frugal reproduce --only zero.table1.7.5B.n64.stage2 --explain

\b
Verdicts: derives; derives under a stated reading; fitted (the reading was chosen because it hits: no
evidence); does not derive (with the reason); measurement (shown only). Only the first two can fail.""",
    short_help="Every published number beside ours.",
)
@click.option("--section", metavar="NAME", shell_complete=_sections, help="Only this section, such as zero.")
@click.option("--only", metavar="PATTERN", help="Only these numbers, such as 'zero.table1.*'.")
@click.option("--explain", is_flag=True, help="Print the formula behind each number.")
@output_options()
def command(section: str | None, only: str | None, explain: bool) -> Result:
    """Recompute the published numbers and say which derive, and which do not.

    The exit code is 1 if a number that should derive does not.
    """
    from memsim.published import VERDICTS, reproduce

    rows = [asdict(row) for row in reproduce(section, only)]
    details = []
    if explain:
        explanations = _explanations(section, {row["id"] for row in rows})
        for row in rows:
            row["explanation"] = explanations.get(row["id"], [])
            details += [row["id"], *(f"  {line}" for line in row["explanation"])]
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        details.append(
            f"{FAILED} {row['id']}: published {row['published']} {row['unit']}, "
            f"ours {row['ours']:.10g}, tolerance {row['tolerance']}"
        )
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    return Result(
        rows,
        COLUMNS,
        totals={
            "numbers": len(rows),
            **{verdict.replace(" ", "_"): count for verdict, count in counts.items()},
            "not_reproduced": len(failed),
        },
        sources=list(dict.fromkeys(_work(row)[0] for row in rows)),
        views=_views(rows),
        details=details,
        problem=f"{len(failed)} numbers that should derive do not" if failed else "",
        exit_code=1 if failed else 0,
    )
