"""``frugal list``: what is registered."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.result import Column, Result

if TYPE_CHECKING:
    from refimpl.registry import Technique

__all__ = ["command"]

KINDS = ("function", "cost", "identity", "data")


def _implementations_text(records: list[dict[str, Any]]) -> str:
    """Return how many there are for each backend: ``cuda 2, numpy 1``."""
    backends = [backend for record in records for backend in record["backends"]]
    return ", ".join(f"{backend} {backends.count(backend)}" for backend in sorted(set(backends)))


COLUMNS = (
    Column("name"),
    Column("entries"),
    Column("kind"),
    Column("source"),
    Column("implementations", text=_implementations_text),
)


def _matching(records: Sequence[Technique], words: Sequence[str]) -> list[Technique]:
    """Return the records that all words occur in: in name, source or summary, or else in all that is said.

    A number is that of an entry; a hyphen, an underscore and a space are one.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", " ").replace("_", " ")

    def fits(record: Technique, text: str) -> bool:
        return all(int(w) in record.entries if w.isdecimal() else plain(w) in plain(text) for w in words)

    def title(record: Technique) -> str:
        return " ".join((record.name, str(record.source), *_doc(record.function).splitlines()[:1]))

    def everything(record: Technique) -> str:
        module = sys.modules[record.function.__module__]
        return f"{title(record)} {record.function.__name__} {_doc(record.function)} {_doc(module)}"

    found = [record for record in records if fits(record, title(record))]
    return found or [record for record in records if fits(record, everything(record))]


def _doc(documented: object) -> str:
    return inspect.getdoc(documented) or ""


@click.command(
    "list",
    epilog="""\b
Examples:
  frugal list mamba
  frugal list window attention
  frugal list --family attention --json""",
    short_help="List what is registered.",
)
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("--family", metavar="NAME", help="Only techniques of this family, such as attention.")
@click.option("--kind", type=click.Choice(KINDS), help="Only techniques of this kind.")
@output_options()
def command(words: tuple[str, ...], family: str | None, kind: str | None) -> Result:
    """List every technique: its entries in the lecture, its kind, its source and its implementations.

    With words, those in whose name, source or summary all of them occur; if there are none, those whose
    whole description has them.  A number is that of an entry.
    """
    from refimpl import registry
    from refimpl.errors import UnknownNameError

    registry.load()
    families = {record.family for record in registry.TECHNIQUES.values()}
    if family is not None and family not in families:
        raise UnknownNameError("family", family, families)
    chosen = [
        record
        for record in sorted(registry.TECHNIQUES.values(), key=lambda record: record.name)
        if family in (None, record.family) and kind in (None, record.kind)
    ]
    if words:
        chosen = _matching(chosen, words)
        if not chosen:
            raise UnknownNameError("technique", " ".join(words), registry.TECHNIQUES)
    rows: list[dict[str, Any]] = [
        {
            "name": record.name,
            "entries": list(record.entries),
            "kind": record.kind,
            "family": record.family,
            "source": str(record.source),
            "implementations": [
                {"target": item.target, "backends": list(item.backends), "tier": item.tier}
                for item in registry.implementations_of(record.name)
            ],
        }
        for record in chosen
    ]
    return Result(
        rows,
        COLUMNS,
        totals={
            "techniques": len(rows),
            "entries": len({entry for row in rows for entry in row["entries"]}),
            "implementations": len(
                {(item["target"], item["tier"]) for row in rows for item in row["implementations"]}
            ),
        },
    )
