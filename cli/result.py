"""What a command found: rows for programs, and tables of them for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Column", "Result", "Row", "View", "cell_text", "grouped"]

Row = Mapping[str, Any]


def cell_text(value: Any) -> str:
    """Return a value as people read it.

    >>> cell_text(None), cell_text(True), cell_text([29, 31]), cell_text(0.25)
    ('', 'yes', '29, 31', '0.25')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value))
    return str(value)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table for people: a key of the rows, its heading, and how its values look."""

    key: str
    title: str = ""
    right: bool = False
    text: Callable[[Any], str] = cell_text
    style: Callable[[Any], str] = lambda _value: ""

    @property
    def heading(self) -> str:
        """The title, or the key."""
        return self.title or self.key


@dataclass(frozen=True, slots=True)
class View:
    """One table for people under its heading, or a part of the table before it."""

    heading: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    part: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found.

    Attributes
    ----------
    rows : sequence of mapping
        The data, as JSON and CSV give them: SI base units, the unit in the key.
    columns : sequence of Column
        What a table for people shows of them.
    totals : mapping
        Sums and counts over the rows.
    sources : sequence of str
        Where formulas and numbers come from.
    views : sequence of View
        Tables for people instead of the one of `columns`; they hold the same facts as `rows`.
    details : sequence of str
        Lines for people, below the tables; `rows` hold the same facts.
    problem : str
        Why the exit code is not 0, in one line.
    exit_code : int
        0 fine, 1 a check failed.
    silent : bool
        Write nothing: another process of the same program says it.
    draw : callable, optional
        ``draw(axes)`` fills the axes of a matplotlib figure.
    """

    rows: Sequence[Row]
    columns: Sequence[Column]
    totals: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ()
    views: Sequence[View] = ()
    details: Sequence[str] = ()
    problem: str = ""
    exit_code: int = 0
    silent: bool = False
    draw: Callable[[Any], None] | None = None


def grouped(rows: Iterable[Row], columns: Sequence[Column], key: str) -> list[View]:
    """Return one view for each value of `key`, in order of first appearance.

    >>> [view.heading for view in grouped([{"s": "b"}, {"s": "a"}, {"s": "b"}], [Column("s")], "s")]
    ['b', 'a']
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    return [View(heading, columns, members) for heading, members in groups.items()]
