"""Published numbers: all that must derive do, and the verdicts mean what they say."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest

from memsim import published
from memsim.published import RULES, VERDICTS, load, reproduce, sections
from refimpl.errors import UnknownNameError

ENTRIES = [entry for section in sections() for entry in load(section)]
ROWS = {row.id: row for row in reproduce()}


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_row(row: published.Row) -> None:
    assert row.ok
    assert row.verdict in VERDICTS
    assert row.source.count(",") >= 2
    if row.verdict not in ("derives", "measurement"):
        assert row.reason


def test_ids_are_unique_and_rules_known() -> None:
    assert len(ROWS) == len(ENTRIES)
    for entry in ENTRIES:
        rule = entry.get("tolerance", entry.get("rule", ""))
        assert rule in RULES or rule.endswith("%") or entry["verdict"] == "measurement"
        Fraction(entry["printed"])


def test_what_does_not_derive_does_not() -> None:
    for entry in ENTRIES:
        if entry["verdict"] == "does not derive":
            rule = entry.get("tolerance", entry.get("rule"))
            assert not published._agrees(published._value(entry), entry["printed"], rule), entry["id"]


def test_what_is_fitted_fits() -> None:
    for entry in ENTRIES:
        if entry["verdict"] == "fitted":
            rule = entry.get("tolerance", entry.get("rule"))
            assert published._agrees(published._value(entry), entry["printed"], rule), entry["id"]


def zero_bytes(Ψ: int, N: int, stage: int) -> Fraction:
    """ZeRO's Table 1, one buffer at a time, independent of the model."""
    size = Fraction(0)
    for bytes_each, divided_from in ((2, 3), (2, 2), (4, 1), (4, 1), (4, 1)):
        size += Fraction(bytes_each * Ψ, N if stage >= divided_from else 1)
    return size


def test_table_1_is_complete_and_exact() -> None:
    cells = [entry for entry in ENTRIES if entry["id"].startswith("zero.table1.")]
    assert len(cells) == 3 * 3 * 6
    cut, halves = [], []
    for entry in cells:
        inputs = entry["inputs"]
        Ψ = {"7.5B": 7_500_000_000, "128B": 128 * 10**9, "1T": 10**12}[inputs["parameters"]]
        exact = zero_bytes(Ψ, inputs["ranks"], inputs["stage"]) / 10**9
        assert published._value(entry) == exact
        printed = Fraction(entry["printed"])
        assert abs(exact - printed) < Fraction(1, 10 ** len(entry["printed"].partition(".")[2]))
        # One rule a column; the cells that only truncation gives say so in their verdict.
        assert entry["rule"] == ("half-up" if inputs["parameters"] == "7.5B" else "truncate")
        if entry["verdict"] == "derives under a stated reading":
            cut.append(entry["printed"])
        else:
            assert published._agrees(exact, entry["printed"], "half-up")
        if exact == Fraction("41.25"):
            halves.append(entry["printed"])
    assert sorted(cut) == sorted(["513", "257", "4187", "2218", "4046", "2054", "4011", "2013"])
    assert halves == ["41.3"]


def test_figure_2_in_numbers() -> None:
    assert ROWS["flash_attention.figure2.flops.standard"].ours == pytest.approx(824.6, abs=0.05)
    assert ROWS["flash_attention.figure2.flops.flash"].ours == pytest.approx(962.1, abs=0.05)
    assert ROWS["flash_attention.figure2.hbm.standard.v2"].ours == pytest.approx(25.23, abs=0.01)
    assert ROWS["flash_attention.figure2.hbm.standard.v2.18_11"].ours == pytest.approx(40.13, abs=0.01)
    assert ROWS["flash_attention.figure2.hbm.standard.v2.mask_dropout"].ours == pytest.approx(40.27, abs=0.01)
    assert ROWS["flash_attention.figure2.hbm.standard.neurips.16_11"].ours == pytest.approx(35.84, abs=0.01)
    assert ROWS["flash_attention.figure2.hbm.flash.Bc256"].ours == pytest.approx(5.10, abs=0.01)
    assert ROWS["flash_attention.figure2.hbm.flash.some_initialized"].ours == pytest.approx(4.379, abs=0.001)


@pytest.mark.parametrize(
    ("ours", "printed", "rule", "agrees"),
    [
        (Fraction("41.25"), "41.3", "half-up", True),
        (Fraction("41.25"), "41.2", "half-up", False),
        (Fraction("4187.5"), "4187", "truncate", True),
        (Fraction("4187.5"), "4188", "truncate", False),
        (Fraction("4187.5"), "4187", "half-up", False),
        (10, "10", "below", False),
        (10, "10", "at most", True),
        (105, "100", "5%", True),
        (106, "100", "5%", False),
    ],
)
def test_rules(ours: Any, printed: str, rule: str, agrees: bool) -> None:
    assert published._agrees(ours, printed, rule) is agrees


@pytest.mark.parametrize(("verdict", "ok"), [(name, name not in VERDICTS[:2]) for name in VERDICTS])
def test_only_the_first_two_verdicts_can_fail(verdict: str, ok: bool) -> None:
    entry = {**load("zero")[3], "printed": "52.6", "verdict": verdict}
    row = published._row(entry)
    assert row.ok is ok
    assert (row.ours is None) == (verdict == "measurement")


def test_selection() -> None:
    assert {row.id for row in reproduce("zero")} == {entry["id"] for entry in load("zero")}
    assert len(reproduce(only="zero.table1.*")) == 54
    with pytest.raises(UnknownNameError, match="zero"):
        reproduce("zer")
    with pytest.raises(UnknownNameError, match="published number"):
        reproduce(only="zero.table9.*")


def test_reproduce_imports_nothing_heavy() -> None:
    code = (
        "import sys, memsim; memsim.reproduce();"
        "print([name for name in ('numba', 'scipy', 'refimpl.attention') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
