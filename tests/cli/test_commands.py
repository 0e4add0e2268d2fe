import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

import cli.commands.errata
from memsim import published
from refimpl import registry


def test_list_rows(rows):
    document = rows("list")
    names = [row["name"] for row in document["rows"]]
    assert names == sorted(registry.TECHNIQUES)
    assert list(document["rows"][0]) == ["name", "entries", "kind", "family", "source", "implementations"]
    flash = next(row for row in document["rows"] if row["name"] == "attention.flash")
    assert flash["entries"] == [29]
    assert "2205.14135" in flash["source"]


def test_list_filters(rows):
    assert {row["family"] for row in rows("list", "--family", "cost")["rows"]} == {"cost"}
    assert {row["kind"] for row in rows("list", "--kind", "identity")["rows"]} == {"identity"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("mamba",), "ssm.mamba_block"),  # in the name
        (("Window", "attention"), "attention.sliding_window"),  # two words, capitals
        (("variable", "length"), "attention.varlen"),  # in the summary
        (("documents",), "attention.flexible"),
        (("25",), "ssm.selective_scan"),  # an entry's number
        (("linformer",), "attention.low_rank"),  # only somewhere in the description
    ],
)
def test_list_finds_words(rows, words, found):
    names = {row["name"] for row in rows("list", *words)["rows"]}
    assert found in names
    assert len(names) < 6


def test_list_of_nothing_says_so(run):
    result = run("list", "xyzzy", code=2)
    assert "unknown technique 'xyzzy'" in result.stderr


def test_show_tells_what_is_registered(rows):
    found = rows("show", "attention.flash")["rows"]
    items = {
        section: {row["item"] for row in found if row["section"] == section} for section in ("laws", "axes")
    }
    assert items["laws"] == {law.name for law in registry.laws_of("attention.flash")}
    assert {"Tq", "D"} <= items["axes"]
    definition = {row["item"]: row["detail"] for row in found if row["section"] == "definition"}
    assert definition["signature"].startswith("flash_attention(q, k, v, /, *,")
    assert "Algorithm 1" in definition["source"]


def test_trace_counts_algorithm_1_by_hand(rows):
    # N = 8, d = 2, M = 64: Bc = 64 / (4 * 2) = 8 and Br = min(8, 2) = 2: one block of keys, four of queries.
    document = rows("show", "attention.flash", "--trace", "--n", "8", "--d", "2", "--sram", "64")
    loads = [row for row in document["rows"] if row["kind"] == "load"]
    assert [row["array"] for row in loads[:2]] == ["K", "V"]
    assert sum(row["array"] == "Q" for row in loads) == 4
    assert document["totals"]["elements_read"] == 2 * 16 + 4 * (4 + 4 + 2 + 2)
    assert document["totals"]["elements_written"] == 4 * (4 + 2 + 2)
    assert document["totals"]["bytes_read"] == 4 * document["totals"]["elements_read"]
    assert [row["step"] for row in document["rows"]] == list(range(1, len(document["rows"]) + 1))


def test_errata_are_listed(rows):
    assert {row["name"] for row in rows("errata")["rows"]} == {record.name for record in registry.ERRATA}


@pytest.fixture
def one_erratum(monkeypatch):
    """Replace the lecture's mistakes by one of ours, in attention.dense."""

    def replace(mutant, breaks="attention.rows_without_keys_are_zero"):
        record = registry.Erratum("attention.dense", "ours", "", "", "", breaks, mutant)
        monkeypatch.setattr(registry, "ERRATA", [record])

    registry.load()
    return replace


def _dense(*args, **kwargs):
    return registry.get("attention.dense").function(*args, **kwargs)


def test_a_mistake_that_a_law_notices_is_caught(rows, one_erratum):
    def plus_one(*args, **kwargs):
        found = _dense(*args, **kwargs)
        return found + 1 if isinstance(found, np.ndarray) else found._replace(out=found.out + 1)

    one_erratum(plus_one)
    assert rows("errata", "--run")["rows"][0]["caught"] is True


def test_a_mistake_that_is_none_is_not_caught_and_fails_the_run(run, one_erratum):
    one_erratum(_dense)
    result = run("errata", "--run", "--json", code=1)
    assert json.loads(result.stdout)["rows"][0]["caught"] is False
    assert "not caught: ours" in result.stderr


def test_a_crash_is_not_a_catch(rows, one_erratum):
    def crash(*args, **kwargs):
        raise RuntimeError("boom")

    one_erratum(crash)
    assert rows("errata", "--run", code=1)["rows"][0]["caught"] is False


def test_a_law_that_does_not_exist_catches_nothing(rows, one_erratum):
    one_erratum(lambda *a, **k: _dense(*a, **k) * 2, breaks="attention.no_such_law")
    row = rows("errata", "--run", code=1)["rows"][0]
    assert "no case reached" in row["evidence"]
    assert cli.commands.errata.COLUMNS[-1].key == "breaks"


def test_io_counts_standard_attention(rows):
    # Algorithm 0 forward: 4 N d + 4 N^2 elements for each head; 2 bytes each in fp16.
    arguments = ("--n", "1K,2000", "--d", "64", "--heads", "1", "--algorithm", "standard", "--pass", "fwd")
    document = rows("io", *arguments)
    assert [row["traffic_bytes"] for row in document["rows"]] == [
        2 * (4 * n * 64 + 4 * n * n) for n in (1000, 2000)
    ]
    row = document["rows"][0]
    assert row["read_bytes"] == 2 * (3 * 1000 * 64 + 2 * 1000 * 1000)
    assert row["matmul_flop"] == 4 * 1000 * 1000 * 64
    assert "hbm_time_s" not in row


def test_io_turns_sram_bytes_into_elements(rows):
    # 192 KiB of fp16 are M = 98304 elements: Bc = M / 4d = 384, so Tc = 3.  Algorithm 1 reads K and V once,
    # and Q, O (fp16), l and m (fp32) once for each block of keys.
    arguments = ("--n", "1024", "--d", "64", "--heads", "1", "--algorithm", "flash1", "--pass", "fwd")
    row = rows("io", *arguments, "--sram-bytes", "192KiB")["rows"][0]
    assert row["read_bytes"] == 2 * (2 + 3 * 2) * 1024 * 64 + 4 * 3 * 2 * 1024


def test_io_on_a_card_takes_bytes_over_bandwidth(rows):
    row = rows("io", "--n", "1024", "--algorithm", "flash1", "--hardware", "a100-40gb")["rows"][0]
    assert row["hbm_time_s"] == pytest.approx(row["traffic_bytes"] / 1.555e12)
    assert row["matmul_time_s"] == pytest.approx(row["matmul_flop"] / 312e12)
    assert row["bound"] in ("hbm", "matmul")


def test_io_gives_every_combination_and_smaller_sram_never_less_traffic(rows):
    arguments = ("--n", "512,1024", "--sram-bytes", "16KiB,64KiB,256KiB", "--algorithm", "flash1")
    found = rows("io", *arguments)["rows"]
    assert [(row["n"], row["sram_bytes"]) for row in found] == [
        (n, size * 1024) for n in (512, 1024) for size in (16, 64, 256)
    ]
    for n in (512, 1024):
        traffic = [row["traffic_bytes"] for row in found if row["n"] == n]
        assert traffic == sorted(traffic, reverse=True)
        assert traffic[0] > traffic[-1]


def test_io_of_a_linear_layer(rows):
    # 3 tokens, 5 features in, 7 out, fp16.  In floating point: X, W and Y once.
    shape = ("--op", "linear", "--tokens", "3", "--in-features", "5", "--out-features", "7")
    fp16, int8 = rows("io", *shape, "--algorithm", "fp16,int8", "--outliers", "2")["rows"]
    assert (fp16["read_bytes"], fp16["written_bytes"]) == (2 * (15 + 35), 2 * 21)
    assert fp16["matmul_flop"] == 2 * 3 * 5 * 7
    # As released: X is read to find outliers and to quantise; codes and an absmax a row are written and read,
    # the int32 product too; two outlier columns read X, the codes of W, its scales, and Y once more.
    read = 30 + (30 + 16) + (15 + 35) + (4 * 21 + 12 + 28) + (16 + 12 + 14 + 28 + 42)
    assert int8["read_bytes"] == read
    assert int8["written_bytes"] == 16 + (15 + 12) + 4 * 21 + 42 + 42
    assert int8["matmul_flop"] == 2 * 3 * 7 * (5 + 2)


def test_io_of_a_linear_layer_takes_each_products_own_peak(rows):
    shape = (
        "--op",
        "linear",
        "--tokens",
        "8",
        "--in-features",
        "64",
        "--out-features",
        "32",
        "--outliers",
        "4",
    )
    row = rows("io", *shape, "--algorithm", "int8_fused", "--hardware", "a100-80gb")["rows"][0]
    assert row["matmul_time_s"] == pytest.approx(2 * 8 * 64 * 32 / 624e12 + 2 * 8 * 4 * 32 / 312e12)


def test_io_tells_outliers_not_looked_for_from_none_found(rows):
    shape = ("--op", "linear", "--tokens", "8", "--in-features", "64", "--algorithm", "int8")
    traffic = [rows("io", *shape, *more)["rows"][0]["read_bytes"] for more in ((), ("--outliers", "0"))]
    assert traffic[1] - traffic[0] == 2 * 8 * 64  # X is read once more


def test_io_refuses_what_belongs_to_another_operation(run):
    assert "--n belongs to --op attention" in run("io", "--op", "linear", "--n", "5", code=2).stderr
    assert "--tokens belongs to --op linear" in run("io", "--tokens", "5", code=2).stderr
    assert "--algorithm int8 is not one of --op attention" in run("io", "--algorithm", "int8", code=2).stderr
    assert "at most K=4096 columns" in run("io", "--op", "linear", "--outliers", "5000", code=2).stderr


def test_io_explains(run):
    text = run("io", "--n", "1024", "--algorithm", "standard", "--pass", "fwd", "--explain").stdout
    assert "T_q" in text
    assert "1024" in text


def test_reproduce_rows(rows):
    document = rows("reproduce")
    wanted = ["id", "source", "published", "ours", "unit", "deviation", "tolerance", "verdict"]
    assert list(document["rows"][0])[: len(wanted)] == wanted
    assert document["totals"]["not_reproduced"] == 0
    assert sum(document["totals"][verdict.replace(" ", "_")] for verdict in published.VERDICTS) == len(
        document["rows"]
    )
    cell = next(row for row in document["rows"] if row["id"] == "zero.table1.7.5B.n64.stage2")
    assert (cell["published"], cell["ours"], cell["unit"]) == ("16.6", 16.640625, "GB")


def test_the_table_of_reproduce_shows_every_number(run, rows):
    table = run("reproduce").stdout
    for row in rows("reproduce")["rows"]:
        assert row["published"] in table
        if not row["id"].startswith("zero.table1"):
            assert row["id"].rsplit(".", 1)[-1] in table
            assert row["reason"] in table
    lines = table.split("\n")
    cells = next(line for line in lines if line.startswith("1T") and " 64 " in line).split()
    assert cells == ["1T", "64", "4187", "4,187.5*", "2218", "2,218.8*", "250", "250"]


def test_reproduce_fails_when_a_number_that_derives_does_not(run, monkeypatch):
    real = published.reproduce

    def tampered(section=None, only=None):
        return [
            replace(row, ours=25.0, ok=False) if row.id == "zero.gpt2.states" else row
            for row in real(section, only)
        ]

    monkeypatch.setattr(published, "reproduce", tampered)
    result = run("reproduce", "--section", "zero", code=1)
    assert "NOT REPRODUCED zero.gpt2.states: published 24 GB, ours 25" in result.stdout
    assert "1 numbers" in result.stderr


def test_reproduce_explains(run):
    text = run("reproduce", "--only", "zero.table1.7.5B.n64.stage2", "--explain").stdout
    assert "2*7.5e9 + 14*7.5e9/64 = 16.64 GB" in text


def test_env_names_backends_and_why_not(rows):
    found = {(row["kind"], row["name"]): row for row in rows("env")["rows"]}
    assert found["backend", "numpy"]["value"] is True
    assert found["package", "numpy"]["value"] == np.__version__
    for backend in ("cudasim", "cuda", "mpi"):
        row = found["backend", backend]
        assert row["value"] is True or row["detail"]


@pytest.mark.parametrize("command", [("list",), ("errata",), ("env",), ("io",), ("reproduce",)])
def test_every_command_speaks_csv_and_markdown(run, command):
    lines = list(csv.reader(io.StringIO(run(*command, "--csv").stdout)))
    assert len({len(line) for line in lines}) == 1
    assert "| --- |" in run(*command, "--markdown").stdout or "| ---: |" in run(*command, "--markdown").stdout
