"""Renew docs/techniques.md, what each record is held to: ``python -m tests.coverage``."""

from __future__ import annotations

import importlib
import inspect
from itertools import groupby
from pathlib import Path

from refimpl import registry

PAGE = Path(__file__).resolve().parents[1] / "docs/techniques.md"
HEAD = """# What each technique is held to

One row a record: its laws, the judges that share no code with it (oracles of `tests/oracles`, or published
numbers), the cases that always run beside the drawn ones, the counters that `memsim` predicts exactly, and
the lecture's mistakes that must fail. `python -m tests.coverage` renews this page; a test looks.
"""
COLUMNS = ("name", "entries", "gradient", "laws", "oracles", "edge cases", "priced", "mistakes")


def renewed() -> str:
    """Return the page that the records make now."""
    registry.load()
    importlib.import_module("tests.oracles")
    records = sorted(registry.TECHNIQUES.values(), key=lambda record: record.name)
    parts = [HEAD]
    for family, members in groupby(records, key=lambda record: record.family):
        parts.append(f"\n## {family}\n\n{_line(COLUMNS)}\n{_line(['---'] * len(COLUMNS))}")
        parts += [_line(_cells(record)) for record in members]
    return "\n".join(parts) + "\n"


def _cells(record: registry.Technique) -> list[str]:
    name = record.name
    return [
        name,
        ", ".join(map(str, record.entries)),
        "yes" if record.vjp else "",
        ", ".join(law.name.partition(".")[2] for law in registry.laws_of(name)),
        ", ".join(_told(oracle) for oracle in registry.ORACLES.get(name, [])) or "published numbers",
        "; ".join(_edge(edge) for edge in record.edges),
        ", ".join(sorted(price.counts for price in registry.PRICES if price.technique == name)),
        ", ".join(item.name for item in registry.ERRATA if item.technique == name),
    ]


def _told(oracle: object) -> str:
    return inspect.unwrap(oracle).__name__.strip("_")  # type: ignore[arg-type]


def _edge(edge: object) -> str:
    assert isinstance(edge, dict)
    return " ".join(f"{key}={value}" for key, value in edge.items())


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(renewed(), encoding="utf-8")
