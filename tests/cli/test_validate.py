"""`frugal validate`: rows, means, bars, the picture, the page, and what it exits with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memsim.measured import validation
from tests import validation_page


def test_rows(rows: Any) -> None:
    document = rows("validate", "--only", "megatron.table5.*")
    assert document["totals"] == {"rows": 8, "bars": 1, "bars_missed": 0}
    first = document["rows"][0]
    assert (first["id"], first["published"], first["unit"]) == ("megatron.table5.22B.full", "1.42", "s")
    assert first["error"] == pytest.approx(first["predicted"] / 1.42 - 1)
    assert first["fits"] is True
    assert 40e9 < first["memory_bytes"] < 80e9
    assert all("arXiv:2205.05198" in source for source in document["sources"])


def test_tables(run: Any) -> None:
    text = run("validate", "--only", "megatron.[lt]*").stdout
    for words in ("calibration", "held out", "Errors", "Bars", "Megatron, Table 1", "met", "attention 0.24"):
        assert words in text
    short = run("validate", "--only", "megatron.[lt]*", "--summary").stdout
    assert "megatron.table1.1.7B" in text
    assert "megatron.table1.1.7B" not in short
    assert "Megatron, Table 1" in short
    assert "Bars" not in run("validate", "--only", "megatron.table5.1T.*").stdout


def test_strict(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run("validate", "--only", "megatron.*", "--strict")
    real = validation._bar
    monkeypatch.setattr(validation, "_bar", lambda *args: real(*args)._replace(met=False))
    assert "MISSED" in run("validate", "--only", "megatron.*").stdout
    failed = run("validate", "--only", "megatron.*", "--strict", code=1)
    assert "missed: Korthikanti, Table 5, Megatron, Table 1" in failed.stderr


def test_a_picture(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "parity.svg"
    run("validate", "--only", "megatron.*", "--plot", str(file))
    text = file.read_text(encoding="utf-8")
    for words in ("predicted / published", "held out (19)", "calibration (7)"):
        assert words in text


def test_refusals(run: Any) -> None:
    assert "megatron" in run("validate", "--only", "megatron.table6.*", code=2).stderr


def test_the_page_is_fresh() -> None:
    page = validation_page.PAGE.read_text(encoding="utf-8")
    tables = (validation_page.table_on(page, start) for start in ("| lines of a set", "| | O "))
    assert page == validation_page.renewed(*tables), "run python -m tests.validation_page"
