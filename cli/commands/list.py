"""``frugal list``: what is registered."""

from __future__ import annotations

from typing import Any

import click

from cli.output import output_options
from cli.result import Column, Result

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


@click.command(
    "list", epilog="Example: frugal list --family attention --json", short_help="List what is registered."
)
@click.option("--family", metavar="NAME", help="Only techniques of this family, such as attention.")
@click.option("--kind", type=click.Choice(KINDS), help="Only techniques of this kind.")
@output_options()
def command(family: str | None, kind: str | None) -> Result:
    """List every technique: its entries in the lecture, its kind, its source and its implementations."""
    from refimpl import registry
    from refimpl.errors import UnknownNameError

    registry.load()
    families = {record.family for record in registry.TECHNIQUES.values()}
    if family is not None and family not in families:
        raise UnknownNameError("family", family, families)
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
        for record in sorted(registry.TECHNIQUES.values(), key=lambda record: record.name)
        if family in (None, record.family) and kind in (None, record.kind)
    ]
    return Result(
        rows,
        COLUMNS,
        totals={
            "techniques": len(rows),
            "entries": len({entry for row in rows for entry in row["entries"]}),
            "implementations": len({item["target"] for row in rows for item in row["implementations"]}),
        },
    )
