"""`frugal moe` against the lecture's table and sums made by hand."""

from __future__ import annotations

import csv
import io

import pytest


def test_the_table_has_every_design_in_both_readings(rows):
    document = rows("moe", "--table")
    designs = [row for row in document["rows"] if row["table"] == "designs"]
    assert len(designs) == 68
    assert len({row["model"] for row in designs}) == 34
    mixtral = {row["reading"]: row for row in designs if row["model"] == "mixtral-8x7b"}
    attention, router = 32 * 4 * 4096 * 4096, 32 * 8 * 4096
    assert mixtral["columns"]["total_parameters"] == attention + router + 32 * 8 * 3 * 4096 * 14336
    assert mixtral["facts"]["total_parameters"] == 46_702_792_704
    assert mixtral["facts"]["activated_parameters"] == 12_879_925_248
    assert mixtral["facts"]["published_total_parameters"] == 47_000_000_000
    assert mixtral["facts"]["total_deviation"] == pytest.approx(46.702792704 / 47 - 1)
    assert document["totals"]["columns_within_5_percent"] == 21
    assert document["totals"]["facts_within_10_percent"] == 34


def test_the_table_has_deepseeks_flops(rows):
    flops = {row["name"]: row for row in rows("moe", "--table")["rows"] if row["table"] == "flops"}
    assert len(flops) == 12
    dense = 4096 * (6 * 30 * 12 * 4096**2 + 12 * 30 * 4096 * 4096 + 6 * 4096 * 102400)
    assert flops["deepseek-7b"]["flop"] == dense
    assert flops["deepseek-7b"]["published_flop"] == 183.5e12


@pytest.mark.parametrize("reading", ["columns", "facts"])
def test_one_reading(rows, run, reading):
    designs = [
        row for row in rows("moe", "--table", "--reading", reading)["rows"] if row["table"] == "designs"
    ]
    assert len(designs) == 34
    assert {row["reading"] for row in designs} == {reading}
    out = run("moe", "--table", "--reading", reading).stdout
    assert ("60 routed experts" in out) == (reading == "facts")


def test_a_model_part_by_part(rows):
    document = rows("moe", "--model", "DeepSeekMoE-16B")
    parts = {row["part"]: row for row in document["rows"]}
    assert parts["MoE block: experts"]["total_parameters"] == 27 * 64 * 3 * 2048 * 1408
    assert parts["MoE block: experts"]["activated_parameters"] == 27 * 6 * 3 * 2048 * 1408
    assert parts["MoE block: shared experts"]["activated_parameters"] == 27 * 3 * 2048 * 2816
    assert document["totals"]["total_parameters"] == 16_375_728_128
    assert document["totals"]["activated_parameters"] == 2_828_650_496


def test_all_to_alls_of_the_busiest_rank(rows):
    document = rows(
        "moe", "--model", "mixtral-8x7b", "--ranks", "1,3,8", "--tokens", "1000", "--dtype", "float32"
    )
    sent = {row["ranks"]: row for row in document["rows"] if row["table"] == "all_to_all"}
    capacity = 250  # 2 * 1000 / 8
    token = 4096 * 4
    assert sent[1]["layer_bytes"] == 0
    assert sent[8]["dispatch_bytes"] == sent[8]["combine_bytes"] == 7 * capacity * token
    # 3, 3 and 2 of 8 experts: one with 3 sends to the other 5, and to both others what its 3 made.
    assert sent[3]["layer_bytes"] == (5 + 2 * 3) * capacity * token
    assert sent[3]["all_layers_bytes"] == 32 * sent[3]["layer_bytes"]


def test_a_capacity_factor_leaves_places_empty(rows):
    one = ("moe", "--model", "mixtral-8x7b", "--ranks", "8", "--tokens", "1000", "--capacity-factor")
    places = [rows(*one, factor)["rows"][-1]["capacity"] for factor in ("1", "1.25", "2.0")]
    assert places == [250, 313, 500]


def test_kinds_of_layers_are_kept_apart(rows):
    document = rows("moe", "--model", "pr-moe-4b", "--ranks", "4")
    sent = [row for row in document["rows"] if row["table"] == "all_to_all"]
    assert [(row["layers"], row["experts"]) for row in sent] == [(10, 32), (2, 64)]


def test_explanations_flops_and_csv(run, rows):
    out = run("moe", "--model", "mixtral-8x7b", "--ranks", "8", "--sequence", "128", "--explain").stdout
    assert "32*(2*(3*4096*14336))" in out
    assert "(8 - 1)*1024*4096*2" in out
    assert rows("moe", "--model", "gpt2", "--sequence", "1024")["totals"]["flop"] == 3 * 291_648_307_200
    lines = list(csv.DictReader(io.StringIO(run("moe", "--table", "--reading", "facts", "--csv").stdout)))
    assert len(lines) == 34 + 12
    assert run("moe", "--table", "--markdown").stdout.count("\n| ") >= 34


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --model or --table"),
        (["--table", "--model", "dbrx"], "either --model or --table"),
        (["--table", "--ranks", "4"], "--model"),
        (["--model", "dbrx", "--reading", "facts"], "--table"),
        (["--model", "mixtral"], "did you mean"),
        (["--model", "gpt2", "--ranks", "2"], "no experts"),
        (["--model", "dbrx", "--ranks", "0"], "--ranks"),
        (["--model", "dbrx", "--ranks", "2", "--capacity-factor", "0"], "--capacity-factor"),
        (["--model", "dbrx", "--ranks", "2", "--capacity-factor", "nan"], "number"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    done = run("moe", *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
