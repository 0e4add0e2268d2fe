"""`frugal speculate` against the papers' own tables."""

from __future__ import annotations

import csv
import io

import pytest

# Leviathan et al. 2023, Table 1: α, γ, operations, speed; the draft costs nothing.
TABLE_1 = [
    (0.6, 2, 1.53, 1.96),
    (0.7, 3, 1.58, 2.53),
    (0.8, 2, 1.23, 2.44),
    (0.8, 5, 1.63, 3.69),
    (0.9, 2, 1.11, 2.71),
    (0.9, 10, 1.60, 6.86),
]


@pytest.mark.parametrize(("alpha", "gamma", "operations", "speed"), TABLE_1)
def test_table_1(rows, alpha, gamma, operations, speed):
    (row,) = rows("speculate", "--alpha", str(alpha), "--gamma", str(gamma))["rows"]
    assert round(row["operations_per_token"], 2) == operations
    assert round(row["speedup"], 2) == speed
    assert row["best_gamma"] is None  # a free draft: more is always better


def test_lists_make_a_grid(rows):
    document = rows("speculate", "--alpha", "0.6,0.8", "--gamma", "1,2,3", "--cost", "0.05,0.1")
    assert len(document["rows"]) == 12
    assert [(row["alpha"], row["cost"], row["gamma"]) for row in document["rows"][2:5]] == [
        (0.6, 0.05, 3),
        (0.6, 0.1, 1),
        (0.6, 0.1, 2),
    ]
    assert any("theorem 3.8" in source for source in document["sources"])


def test_the_best_gamma_is_the_best_of_all(rows):
    gammas = ",".join(map(str, range(1, 40)))
    for alpha, cost in (("0.5", "0.1"), ("0.9", "0.02"), ("0.95", "0.3")):
        found = rows("speculate", "--alpha", alpha, "--cost", cost, "--gamma", gammas)["rows"]
        best = max(found, key=lambda row: row["speedup"])
        assert best["gamma"] == best["best_gamma"]
        assert best["speedup"] == pytest.approx(best["best_speedup"])


def test_a_draft_that_costs_more_than_it_hits_is_not_worth_it(rows):
    (row,) = rows("speculate", "--alpha", "0.2", "--cost", "0.3", "--gamma", "1")["rows"]
    assert row["best_gamma"] == 0
    assert row["best_speedup"] == 1.0
    assert row["speedup"] < 1


def test_explanations_show_formulas_with_numbers(run):
    out = run("speculate", "--alpha", "0.75", "--gamma", "7", "--cost", "0.02", "--explain").stdout
    assert "(1 - 0.75**(7 + 1))/((1 - 0.75)*(7*0.02 + 1)) = 3.157" in out


def test_csv_and_markdown(run):
    text = run("speculate", "--alpha", "0.8", "--gamma", "2", "--csv").stdout
    (row,) = csv.DictReader(io.StringIO(text))
    assert float(row["tokens_per_pass"]) == pytest.approx(2.44)
    assert run("speculate", "--alpha", "0.8", "--gamma", "2", "--markdown").stdout.startswith("| α")


def test_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "gain.svg"
    run("speculate", "--alpha", "0.6,0.9", "--cost", "0.05", "--plot", str(file))
    assert "α = 0.9, c = 0.05" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--alpha"),
        (["--alpha", "1.5"], "--alpha"),
        (["--alpha", "nan"], "--alpha"),
        (["--alpha", "0.5", "--gamma", "0"], "--gamma"),
        (["--alpha", "0.5", "--gamma", "2.5"], "--gamma"),
        (["--alpha", "0.5", "--cost", "-1"], "--cost"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    done = run("speculate", *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
