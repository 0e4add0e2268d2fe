"""What a profiler counted: its report read, cases told apart, and schedules replayed beside it."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim import data_files
from memsim.cache.lru import Cache
from memsim.cache.replay import replay
from memsim.hardware import hardware
from memsim.measured import counted_traffic
from memsim.measured.counted_traffic import (
    attempts,
    predicted_traffic,
    schedule_of,
    traffic_ids,
    traffic_rows,
)
from memsim.measured.measured_files import file_name, of_kind, read_file, toml_text
from memsim.measured.nsight import METRICS, between_markers, parse_report
from refimpl.errors import OptionError, UnknownNameError

cuda = pytest.importorskip("tests.cuda.measure_traffic")

HEADER = ("ID", "Process ID", "Kernel Name", "Grid Size", *sum(METRICS.values(), ()))
UNITS = ("", "", "", "", "byte", "Mbyte", "byte", "Kbyte", "byte")
SHAPE = {"B": 1, "H": 2, "N": 256, "D": 64}
CASES = [
    {"number": 1, "stack": "s", "set": "own kernels", "function": "fa2_forward", "schedule": "flash2_forward",
     "shape": SHAPE, "tiles": {"rows": 128, "columns": 128, "workers": 2}},
    {"number": 4, "stack": "s", "set": "own kernels", "function": "fa2_backward",
     "schedule": "flash2_backward", "shape": SHAPE, "tiles": {"rows": 128, "columns": 128, "workers": 2}},
]  # fmt: skip


def report(*rows: tuple[Any, ...]) -> str:
    """Return a report as Nsight Compute prints it, among the lines of the program that it watched."""
    lines = ["==PROF== Connected to process 12", "some text", _line(HEADER), _line(UNITS)]
    lines += [_line((number, 12, *row)) for number, row in enumerate(rows)]
    lines.insert(5, "==PROF== Disconnected from process 12")
    return "\n".join(lines)


def _line(cells: tuple[Any, ...]) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


MARK = "measurement_marker[abi:v3]"
REPORT = report(
    (MARK, "(1, 1, 1)", "0", "0", "0", "0", "0"),
    ("void flash_fwd<128, 128>(Params)", "(2, 1, 2)", "196,608", "0.065536", "1,000,000", "67.5", "8,192"),
    (MARK, "(4, 1, 1)", "0", "0", "0", "0", "0"),
    ("zero", "(2, 1, 2)", "10", "0.000002", "7", "n/a", "1"),
    ("sum", "(2, 1, 2)", "20", "0.000003", "8", "1", "2"),
)


def test_a_report() -> None:
    launches = parse_report(REPORT)
    assert [launch.kernel for launch in launches[::2]] == [MARK, MARK, "sum"]
    assert launches[1].grid == (2, 1, 2)
    assert launches[1].bytes == {
        "dram_read": 196_608, "dram_write": 65_536, "l2": 1_000_000 + 67_500, "slices": 8192,
    }  # fmt: skip
    assert set(launches[3].bytes) == {"dram_read", "dram_write", "slices"}, "half a sum is none"
    assert {key: len(found) for key, found in between_markers(launches, "marker").items()} == {1: 1, 4: 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no report", "header"),
        ('"ID","Kernel Name"\n"",""', "Grid Size"),
        (REPORT.replace('"Mbyte"', '"percent"'), "percent"),
        (REPORT.replace('"196,608"', '"many"'), "many"),
        (REPORT.replace('"0","12",', '"0",'), "columns"),
    ],
)
def test_what_is_no_report(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_report(text)
    twice = parse_report(REPORT.replace("(4, 1, 1)", "(1, 1, 1)"))
    with pytest.raises(OptionError, match="1 twice"):
        between_markers(twice, "marker")


def test_from_a_report_to_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The file that a GPU's session writes is what `frugal validate` reads."""
    ran = {"hardware": "h200", "cases": CASES}
    found = cuda.traffic_document(ran, {"cold": REPORT, "warm": REPORT}, "Nsight Compute")
    assert [(case["function"], case["cache"], len(case["kernels"])) for case in found["case"]] == [
        ("fa2_forward", "cold", 1), ("fa2_backward", "cold", 1),  # two kernels ran, three are in the schedule
        ("fa2_forward", "warm", 1), ("fa2_backward", "warm", 1),
    ]  # fmt: skip
    assert found["case"][1]["kernels"] == [
        {"name": "2 kernels", "dram_read": 30, "dram_write": 5, "slices": 3}
    ]
    path = tmp_path / file_name(found)
    path.write_text(toml_text(found), encoding="utf-8")
    monkeypatch.setattr(counted_traffic, "of_kind", lambda kind: [read_file(path, kind)])
    traffic_rows.cache_clear()
    rows = {row.id: row for row in traffic_rows()}
    traffic_rows.cache_clear()
    assert set(traffic_ids()) == set(rows)
    start = "traffic.h200.fa2_forward.1x2x256x64"
    tensor = 2 * 256 * 64 * 2
    assert rows[f"{start}.cold.dram_read"].predicted == pytest.approx(3 * tensor / 1e6)
    assert rows[f"{start}.cold.dram_read"].error == pytest.approx(0)
    assert rows[f"{start}.warm.dram_read"].predicted == 0  # all of it was there
    asked = 6 * tensor + 4 * 2 * 256  # Q once, K and V once for each of two tiles, O and the log-sum-exp once
    assert rows[f"{start}.cold.l2"].predicted == pytest.approx(asked / 1e6)
    assert rows[f"{start}.cold.l2"].belongs == "own kernels, L2"
    assert rows[f"{start}.cold.dram"].predicted == pytest.approx(
        sum(rows[f"{start}.cold.{way}"].predicted for way in ("dram_read", "dram_write"))
    )
    assert len(rows) == 2 * (4 + 3)
    # Of less than a megabyte errors are parts of one.
    few = rows[f"{start}.warm.dram_read"]
    assert (few.belongs, few.use) == ("less than 1 MB counted", "held out")
    assert few.error == pytest.approx(-0.196608)


def test_kernels_are_matched_by_number_then_by_name() -> None:
    """PyTorch goes through more than 2^31 elements in several launches of one name."""
    launches = [(name, "(2, 1, 2)", "2,000,000", "1", "3", "4", "5") for name in "abbbcd"]
    rows = [(MARK, "(4, 1, 1)", "0", "0", "0", "0", "0"), *launches]
    case: dict[str, Any] = {**CASES[1], "schedule": "standard_backward", "tiles": {"rows": 128}}
    (found,) = cuda.traffic_document({"hardware": "h200", "cases": [case]}, {"cold": report(*rows)}, "x")[
        "case"
    ]
    assert [kernel["name"] for kernel in found["kernels"]] == ["4 kernels"]  # and the schedule has five
    case["schedule"] = "pytorch_standard_backward"
    (found,) = cuda.traffic_document({"hardware": "h200", "cases": [case]}, {"cold": report(*rows)}, "x")[
        "case"
    ]
    assert [kernel["name"] for kernel in found["kernels"]] == list("abbbcd")
    case |= {"schedule": "flash2_forward", "tiles": {"rows": 128, "columns": 128}}
    (found,) = cuda.traffic_document({"hardware": "h200", "cases": [case]}, {"cold": report(*rows)}, "x")[
        "case"
    ]
    assert found["kernels"] == [
        {"name": "4 kernels", "dram_read": 12 * 10**6, "dram_write": 6 * 10**6, "l2": 6 * 4003, "slices": 30}
    ]


def test_caches() -> None:
    case = {**CASES[1], "cache": "cold"}
    kernels, arrays = schedule_of(case)
    cold = predicted_traffic(case, 1 << 30)
    assert [one.dram_read for one in cold] == [
        sum(arrays[name] for name in names)
        for names in (("O", "dO"), ("K", "V", "Q", "dO", "lse", "delta", "dQ sum"), ("dQ sum",))
    ]
    warm = predicted_traffic({**case, "cache": "warm"}, 1 << 30)
    assert all(one.dram_read == 0 for one in warm)
    for cache in (64 << 10, Cache(128 << 10, 2, 4)):
        small = predicted_traffic({**case, "cache": "warm"}, cache)
        assert small == replay(kernels * 2, arrays, cache=cache)[3:]


def test_what_a_block_shares_stands_beside_its_tiles() -> None:
    tiles = {"rows": 64, "columns": 64, "workers": 2}
    found = cuda._case("s", "own kernels", "portable_forward", SHAPE, {**tiles, "shared": 7})
    assert (found["schedule"], found["tiles"], found["shared"]) == ("portable_forward", tiles, 7)
    assert "shared" not in cuda._case("s", "own kernels", "hopper_forward", SHAPE, tiles)
    # Of what was measured, as many blocks were on a multiprocessor as share its memory.
    (latest,) = [document for document in of_kind("traffic") if document["date"] == "2026-11-29"]
    sharing = [case for case in latest["case"] if "shared" in case]
    assert {case["function"] for case in sharing} == {
        "portable_forward",
        "portable_backward",
        "flash1_forward",
    }
    for case in sharing:
        together = hardware("h200").shared_memory_per_sm.value // (case["shared"] + 1024)
        assert case["tiles"]["workers"] == together * hardware("h200").sms.value


def test_the_ways_are_those_that_calibrate_best() -> None:
    """One number is fitted, to two products, of which none is held to a bar; nearest to them was 32."""
    stated = data_files.read("hbm", "validation")["ways"]
    calibrating = "own kernels, calibration"
    worst = {ways: found[calibrating] for ways, found in attempts(calibrating).items()}
    assert list(worst) == [*stated["tried"], None]
    assert min(worst, key=worst.__getitem__) == stated["value"]
    ids = [name for name, belongs in traffic_ids().items() if belongs == calibrating]
    assert {name.split(".cold")[0].split(".warm")[0] for name in ids} == {
        f"traffic.h200.{size}" for size in stated["calibration"]
    }
    assert len(ids) == 6  # cold twice, and warm
    assert calibrating not in {bar["rows"] for bar in data_files.read("hbm", "validation")["bar"]}


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with pytest.raises(UnknownNameError, match="tile schedule"):
        schedule_of({**CASES[0], "schedule": "flash3_forward"})
    some = {**CASES[1], "cache": "cold", "kernels": [{"name": "a", "dram_read": 1}] * 2}
    document = {"kind": "traffic", "hardware": "h200", "date": "2026-11-29", "tool": "x", "case": [some]}
    monkeypatch.setattr(counted_traffic, "of_kind", lambda _: [document])
    traffic_rows.cache_clear()
    with pytest.raises(OptionError, match="1 or 3 kernels; got 2"):
        traffic_rows()
    path = tmp_path / "x.toml"
    for text, words in (("x = ", "TOML"), ('kind = "traffic"', "hardware"), (toml_text(document), "memory")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(OptionError, match=words):
            read_file(path, "memory")


numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.one_of(st.integers(-(2**60), 2**60), st.booleans(), st.text(), numbers)
tables = st.dictionaries(st.text(), st.one_of(plain, st.lists(plain), st.dictionaries(st.text(), plain)))


@given(found=st.dictionaries(st.text(), st.one_of(plain, st.lists(tables, min_size=1))))
def test_toml_is_read_back(found: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(found)) == found


def test_toml_of_what_is_not_finite() -> None:
    with pytest.raises(OptionError, match="inf"):
        toml_text({"x": float("inf")})
