"""`frugal validate`: a line for each set, or every step."""

from __future__ import annotations

import pytest


def test_sets_and_steps(rows, run, tmp_path):
    document = rows("validate")
    assert document["totals"]["said_not_to_fit"] == 0
    found = {row["set"]: row for row in document["rows"]}
    assert found["megatron-table1"]["held_out"] == 10
    steps = rows("validate", "--set", "megatron-table1", "--rows")["rows"]
    assert len(steps) == 10
    mean = sum(abs(step["deviation"]) for step in steps) / 10
    assert found["megatron-table1"]["mean_error"] == pytest.approx(mean)
    assert "Calculon" in run("validate", "--set", "megatron-table1").stdout
    pytest.importorskip("matplotlib")
    run("validate", "--set", "megatron-table1", "--plot", str(tmp_path / "x.svg"))
    assert "megatron-table1, mean error" in (tmp_path / "x.svg").read_text()
    assert "table5" in run("validate", "--set", "megatron-table6", code=2).stderr
