"""The lint of the records: every technique is complete, and every string on it resolves."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cli.main import frugal
from memsim import published
from refimpl import registry
from refimpl.testing import draw

ROOT = Path(__file__).resolve().parents[1]
registry.load()
importlib.import_module("tests.oracles")

RECORDS = sorted(registry.TECHNIQUES.values(), key=lambda record: record.name)
SECTIONS = {
    "function": ("Parameters", "Returns", "Raises", "References", "Examples"),
    "identity": ("Parameters", "Returns", "Raises", "References", "Examples"),
    "cost": ("Parameters", "Returns", "Examples"),
    "data": ("Examples",),
}
# Models that published numbers must derive from: those numbers are their judges.
MODELS_WITH_NUMBERS = {
    entry.get("model")
    for section in published.sections()
    for entry in published.load(section)
    if entry["verdict"].startswith("derives")
}
# Entries of the lecture that are done.  An issue that adds a family adds its numbers here.
DONE = set(range(1, 110)) - {67, 93, 94}
# Entries of the lecture, every one of which has a record.
ENTRIES = set(range(1, 110))
DONE = {
    *range(1, 25),
    *range(27, 39),
    45,
    *range(49, 55),
    57,
    58,
    68,
    69,
    71,
    72,
    83,
    *range(90, 109),
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_record_is_complete(record: registry.Technique) -> None:
    assert record.entries
    assert all(1 <= entry <= 109 for entry in record.entries)
    assert record.source.work
    assert record.source.identifier
    assert record.source.locator, "a source names the place inside the work"
    documentation = inspect.getdoc(record.function) or ""
    missing = [name for name in SECTIONS[record.kind] if f"{name}\n---" not in documentation]
    assert not missing, f"docstring of {record.home} lacks {missing}"
    assert len(registry.laws_of(record.name)) >= 2
    if record.vjp is not None:
        assert callable(registry.resolve(record.vjp))
    assert registry.resolve(record.home) is record.function


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_record_has_a_judge_that_shares_no_code(record: registry.Technique) -> None:
    if record.kind == "cost":
        assert record.name in registry.ORACLES or record.home in MODELS_WITH_NUMBERS
    else:
        assert record.name in registry.ORACLES


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_arrays_are_positional_and_options_are_keywords(record: registry.Technique) -> None:
    if record.kind not in ("function", "identity"):
        return
    kinds = {parameter.kind for parameter in inspect.signature(record.function).parameters.values()}
    assert inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_samples_depend_on_the_seed_alone(record: registry.Technique) -> None:
    assert record.sample is not None
    shape = draw(record, 3)
    first, second = (record.sample(np.random.default_rng(5), **shape) for _ in range(2))
    for a, b in zip(first.args, second.args, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_edges_name_known_axes(record: registry.Technique) -> None:
    known = set(record.axes) | set(record.options)
    for edge in record.edges:
        assert set(edge) <= known, f"{record.name}: edge {edge} names unknown axes"


def test_no_law_hides_another_of_its_name() -> None:
    sources = (path for package in ("refimpl", "memsim") for path in (ROOT / package).rglob("*.py"))
    written = sum(path.read_text(encoding="utf-8").count("\n@law(") for path in sources)
    assert written == len(registry.LAWS)


def test_laws_have_statements_and_known_techniques() -> None:
    for law in registry.LAWS.values():
        assert law.statement.endswith("."), law.name
        assert set(law.techniques) <= set(registry.TECHNIQUES), law.name


def test_every_string_resolves() -> None:
    for item in registry.IMPLEMENTATIONS:
        assert item.technique in registry.TECHNIQUES
        assert callable(item.load())
    for price in registry.PRICES:
        assert price.technique in registry.TECHNIQUES
    for erratum in registry.ERRATA:
        assert erratum.technique in registry.TECHNIQUES
        assert erratum.breaks in {law.name for law in registry.laws_of(erratum.technique)}


def test_frugal_list_has_every_entry() -> None:
    document = json.loads(CliRunner().invoke(frugal, ["list", "--json"]).stdout)
    listed = {entry for row in document["rows"] for entry in row["entries"]}
    assert sorted(ENTRIES - listed) == []
    assert sorted(listed - ENTRIES) == []


def test_names_are_unique_and_well_formed() -> None:
    for record in RECORDS:
        family, dot, rest = record.name.partition(".")
        assert dot
        assert (family + rest).replace(".", "").replace("_", "").isalnum(), record.name
