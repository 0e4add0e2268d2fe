"""The four ways to write down what a command found: table, JSON, CSV, Markdown.

>>> from cli.result import Column, Result
>>> result = Result([{"name": "Q", "bytes": 8}], [Column("name"), Column("bytes", right=True)])
>>> print(render(result, "markdown", command="demo", inputs={}), end="")
| name | bytes |
| --- | ---: |
| Q | 8 |
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from cli.result import Result, View, cell_text

__all__ = ["SCHEMA", "Format", "jsonable", "render"]

SCHEMA = "frugal/1"
LEAST_WIDTH = 4  # of a column, on a terminal that is too narrow for anything
Format = Literal["table", "json", "csv", "markdown"]


def jsonable(value: Any) -> Any:
    """Return `value` as JSON can hold it; what is not a finite number becomes null.

    >>> jsonable({"a": float("nan"), "b": Fraction(1, 4), "c": (1, Fraction(4, 2))})
    {'a': None, 'b': 0.25, 'c': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Fraction | Decimal) and value == int(value):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def render(
    result: Result,
    form: Format,
    *,
    command: str,
    inputs: Mapping[str, Any],
    width: int | None = None,
    color: bool = False,
) -> str:
    """Return `result` as text.

    Parameters
    ----------
    result : Result
        What to write.
    form : {"table", "json", "csv", "markdown"}
        The format.
    command, inputs
        What was asked, for JSON.
    width : int, optional
        Characters in a line of a table, in which longer cells are folded; default: as wide as need be.
    color : bool
        Whether a table has ANSI colors.

    Returns
    -------
    str
        Ends with a newline, unless there is nothing to say.
    """
    match form:
        case "json":
            return _json(result, command, inputs)
        case "csv":
            return _csv(result)
        case "markdown":
            return _markdown(result)
        case "table":
            return _table(result, width, color)


def _json(result: Result, command: str, inputs: Mapping[str, Any]) -> str:
    document = {
        "schema": SCHEMA,
        "command": command,
        "inputs": inputs,
        "rows": result.rows,
        "totals": result.totals,
        "sources": result.sources,
    }
    return json.dumps(jsonable(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(result: Result) -> str:
    keys = list(dict.fromkeys(key for row in result.rows for key in row))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys or [column.key for column in result.columns])
    for row in result.rows:
        writer.writerow([_csv_cell(jsonable(row.get(key))) for key in keys])
    return stream.getvalue()


def _csv_cell(value: Any) -> Any:
    """Return a flat list with spaces between its items, and other structures as JSON."""
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return " ".join(map(str, value))
    if isinstance(value, list | dict | bool):
        return json.dumps(value, ensure_ascii=False)
    return value


def _markdown(result: Result) -> str:
    blocks = []
    for view in _views(result):
        if not view.rows and len(result.views) > 1:
            blocks.append(f"### {view.heading}")
            continue
        lines = [f"{'####' if view.part else '###'} {view.heading}\n"] if view.heading else []
        lines.append(_markdown_row(column.heading for column in view.columns))
        lines.append(_markdown_row("---:" if column.right else "---" for column in view.columns))
        lines += [
            _markdown_row(column.text(row.get(column.key)) for column in view.columns) for row in view.rows
        ]
        blocks.append("\n".join(lines))
    if result.totals:
        blocks.append(f"Total: {_totals_text(result)}")
    if result.sources:
        blocks.append("Sources:\n\n" + "\n".join(f"- {source}" for source in result.sources))
    if result.details:
        blocks.append("\n".join(["```text", *result.details, "```"]))
    return "\n\n".join(blocks) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    escaped = (" ".join(cell.split("\n")).replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _table(result: Result, width: int | None, color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    views = _views(result)
    widths = _common_widths(views, width)
    stream = io.StringIO()
    console = Console(
        file=stream, width=width or 100_000, force_terminal=color, no_color=not color, highlight=False
    )
    for index, view in enumerate(views):
        if index and not view.part:
            console.print()
        if view.heading:
            console.print(Text(view.heading, style="italic" if view.part else "bold"))
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            show_header=not view.part,
            padding=(0, 1, 0, 0),
            header_style="bold",
        )
        for column, least in zip(view.columns, widths[index], strict=True):
            table.add_column(
                Text(column.heading),
                justify="right" if column.right else "left",
                overflow="fold",
                width=least,
            )
        for row in view.rows:
            values = [row.get(column.key) for column in view.columns]
            table.add_row(
                *(
                    Text(column.text(value), style=column.style(value))
                    for column, value in zip(view.columns, values, strict=True)
                )
            )
        if view.rows or not view.part:
            console.print(table)
    console.print()
    if result.totals:
        console.print(Text(f"Total: {_totals_text(result)}", style="bold"))
    for source in result.sources:
        console.print(Text(f"Source: {source}", style="dim"))
    for line in result.details:
        console.print(Text(line), soft_wrap=True)
    lines = [line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n")]
    return "\n".join(lines) + "\n"


def _common_widths(views: Sequence[View], width: int | None) -> list[list[int]]:
    """Return the column widths of each view; views with the same columns get the same, so that they line up.

    Where a line has no room for all, the widest columns give way, and their cells are folded.
    """
    from rich.cells import cell_len

    common: dict[tuple[str, ...], list[int]] = {}
    for view in views:
        headings = tuple(column.heading for column in view.columns)
        widths = common.setdefault(headings, [cell_len(heading) for heading in headings])
        for row in view.rows:
            for index, column in enumerate(view.columns):
                lines = column.text(row.get(column.key)).split("\n")
                widths[index] = max(widths[index], *map(cell_len, lines))
    for widths in common.values():
        room = sum(widths) if width is None else max(width - 2 * len(widths), LEAST_WIDTH * len(widths))
        while sum(widths) > room:
            widths[widths.index(max(widths))] -= 1
    return [common[tuple(column.heading for column in view.columns)] for view in views]


def _views(result: Result) -> Sequence[View]:
    return result.views or (View("", result.columns, result.rows),)


def _totals_text(result: Result) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {cell_text(value)}" for key, value in result.totals.items())
