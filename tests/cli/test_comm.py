"""`frugal comm` against the textbook's volumes."""

from __future__ import annotations

import pytest

MIB = 2**20


@pytest.mark.parametrize(("ranks", "sent", "messages"), [(4, 6 * MIB, 6), (8, 7 * MIB, 14), (1, 0, 0)])
def test_a_ring_sends_what_was_measured_over_mpi(rows, ranks, sent, messages):
    """2 (p - 1) / p of 4 MiB, and 2 (p - 1) messages: the bytes that Open MPI's monitoring counted."""
    arguments = ["--op", "all_reduce", "--ranks", str(ranks), "--bytes", "4MiB", "--algorithm", "ring"]
    (row,) = rows("comm", *arguments)["rows"]
    assert (row["sent_bytes_max"], row["messages_max"]) == (sent, messages)
    assert row["time_s"] is None


def test_time_is_latency_and_transfer(rows):
    arguments = [
        "--op",
        "all_gather",
        "--ranks",
        "5",
        "--bytes",
        "1000",
        "--latency",
        "2",
        "--bandwidth",
        "100",
    ]
    (row,) = rows("comm", *arguments, "--algorithm", "ring")["rows"]
    assert row["time_s"] == pytest.approx(4 * 2 + 4 * 200 / 100)
    (row,) = rows("comm", *arguments, "--algorithm", "bruck")["rows"]
    assert row["time_s"] == pytest.approx(3 * 2 + 4 * 200 / 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bytes", "8"], "--op"),
        (["--op", "all_to_all", "--bytes", "8", "--algorithm", "ring"], "is done by pairwise"),
        (["--op", "all_reduce", "--bytes", "7", "--itemsize", "4"], "no whole number"),
        (["--op", "all_reduce", "--bytes", "8", "--latency", "-1"], "--latency"),
        (["--op", "all_reduce", "--bytes", "8", "--latency", "nan"], "--latency"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    done = run("comm", *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_levels_on_hardware(rows, run):
    document = rows(
        "comm", "--op", "all_reduce", "--ranks", "8,64", "--bytes", "16GB", "--hardware", "a100-80gb"
    )
    found = {(row["algorithm"], row["ranks"]): row["time_s"] for row in document["rows"]}
    assert ("two levels", 8) not in found
    # 8 nodes of 8: 2 * 7/8 of 16 GB over 300 GB/s inside, of an eighth of it over 25 GB/s across.
    assert found["two levels", 64] == pytest.approx(2 * 7 / 8 * 16e9 / 300e9 + 2 * 7 / 8 * 2e9 / 25e9)
    two = next(row for row in document["rows"] if row["algorithm"] == "two levels")
    # As much as a ring, 2 * 63/64 of the vector, in 2 * 7 + 2 * 7 messages.
    assert (two["sent_bytes_max"], two["messages_max"]) == (2 * 63 * 16e9 / 64, 28)
    assert found["ring", 64] == pytest.approx(2 * 63 / 64 * 16e9 / 25e9)
    assert (
        "not both"
        in run(
            "comm", "--op", "reduce", "--bytes", "1MB", "--bandwidth", "1GB", "--hardware", "h200", code=2
        ).stderr
    )


def test_whole_nodes_have_two_levels_only(rows):
    base = ("--op", "all_reduce", "--bytes", "16MB", "--hardware", "a100-80gb", "--algorithm", "ring")
    document = rows("comm", *base, "--ranks", "8,12,16")
    found = {(row["algorithm"], row["ranks"]): row["time_s"] for row in document["rows"]}
    assert set(found) == {("ring", 8), ("ring", 12), ("ring", 16), ("two levels", 16)}
    assert found["ring", 8] == pytest.approx(2 * 7 / 8 * 16e6 / 300e9)  # a node's own links
    assert found["ring", 16] == pytest.approx(2 * 15 / 16 * 16e6 / 25e9)


def test_few_rounds_for_short_vectors(rows):
    """Of 8 ranks: 3 rounds against 7; Bruck's exchange moves 12 blocks of 8 where pairs move 7."""
    arguments = ("--op", "all_to_all", "--bytes", "800", "--ranks", "8")
    found = {row["algorithm"]: row for row in rows("comm", *arguments)["rows"]}
    for name, counts in (("pairwise", (7, 700)), ("bruck", (3, 1200))):
        assert (found[name]["messages_max"], found[name]["sent_bytes_max"]) == counts
    reduced = rows("comm", "--op", "all_reduce", "--bytes", "800", "--ranks", "8")["rows"]
    assert {row["algorithm"] for row in reduced} == {"ring", "recursive", "doubling", "tree"}
