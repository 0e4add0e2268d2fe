"""`frugal memory` against sums made by hand."""

from __future__ import annotations

import pytest


def test_zero_gives_the_papers_cells(rows):
    document = rows("memory", "zero", "--params", "7.5B", "--dp", "1,64")
    assert document["command"] == "memory zero"
    found = {(row["dp"], row["stage"]): row["memory_bytes"] for row in document["rows"]}
    assert found[1, 3] == 120_000_000_000
    assert found[64, 1] == 31_406_250_000
    assert found[64, 2] == 16_640_625_000
    assert found[64, 3] == 1_875_000_000


def test_zero_counts_what_a_ring_sends(rows):
    (row,) = rows("memory", "zero", "--params", "100", "--dp", "4", "--stage", "3")["rows"]
    assert row["sent_elements"] == 3 * 100 * 3 // 4


def test_zero_by_deepspeeds_convention(rows):
    document = rows("memory", "zero", "--params", "1B", "--dp", "2", "--convention", "deepspeed")
    assert {row["stage"]: row["memory_bytes"] for row in document["rows"]} == {2: 11e9, 3: 9e9}


def test_training_keeps_the_sources_apart(rows):
    shape = ["--hidden", "1600", "--layers", "48", "--sequence", "1024", "--batch", "32", "--heads", "25"]
    totals = rows("memory", "training", "--params", "1.5B", *shape)["totals"]
    assert totals["states_bytes"] == 24_000_000_000
    assert totals["states_and_zero_activations_bytes"] == 24_000_000_000 + 2 * 12 * 1600 * 32 * 1024 * 48
    assert totals["states_and_checkpoints_bytes"] == 24_000_000_000 + 2 * 1024 * 32 * 1600 * 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero", "--dp", "4"], "--params"),
        (["zero", "--params", "-1"], "expected a"),
        (["zero", "--params", "1B", "--stage", "4"], "--stage"),
        (["zero", "--params", "1B", "--convention", "deepspeed", "--stage", "1"], "stages 2 and 3"),
        (["training", "--params", "1B", "--hidden", "64"], "--layers, --sequence, --batch"),
        (["training", "--params", "nan"], "expected a"),
        (["training", "--params", "1B", "--buffer", "5"], "--model-parallel"),
        (["zero", "--params", "1B", "--padded", "--convention", "deepspeed"], "--padded"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    done = run("memory", *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_padding_and_accumulation_are_counted(rows):
    arguments = ["--params", "10", "--dp", "4", "--stage", "2", "--padded", "--micro", "3"]
    (row,) = rows("memory", "zero", *arguments)["rows"]
    assert row["memory_bytes"] == 2 * 10 + (2 + 12) * 3  # shards of 3, the last of them with 2 of padding
    assert row["sent_elements"] == (3 + 1) * 3 * 3


def test_zero_r_divides_checkpoints_and_bounds_the_buffer(rows):
    shape = ["--hidden", "8192", "--layers", "125", "--sequence", "1024", "--batch", "32"]
    arguments = ["--params", "100B", *shape, "--model-parallel", "16", "--buffer", "500M"]
    totals = rows("memory", "training", *arguments)["totals"]
    checkpoints = 2 * 8192 * 125 * 1024 * 32
    assert totals["states_and_checkpoints_bytes"] == 16 * 10**11 + checkpoints
    assert totals["states_and_zero_r_bytes"] == 16 * 10**11 + checkpoints // 16 + 4 * 500_000_000
