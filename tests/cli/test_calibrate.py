"""`frugal calibrate`: exit code 3 without a GPU, the file, and what plan makes of it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cli.commands import calibrate
from memsim.measured.calibration import PROBLEMS, calibrated, predicted_seconds, read_calibration, use_of
from memsim.measured.measured_files import document, toml_text
from refimpl.errors import OptionError, UnknownNameError

TRUTH = {"compute": 0.7, "scores": 0.4, "memory": 0.9, "start": 5e-6}
PLAN = ("--model", "gpt2", "--gpus", "2", "--batch", "8", "--sequence", "1024")


def made(problem: Any, *_: Any) -> dict[str, Any]:
    """Time a problem on a GPU that reaches shares of its own."""
    return {**problem, "seconds": predicted_seconds(problem, "h200", **TRUTH)}


def test_without_a_gpu(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda_backend.torch_ops.missing", lambda: "torch finds no GPU")
    assert "torch finds no GPU" in run("calibrate", code=3).stderr


def test_the_file_and_its_use(run: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cuda_backend.torch_ops.missing", lambda: None)
    monkeypatch.setattr(calibrate, "_timed", made)
    text = run("calibrate", "--hardware", "h200", "--folder", str(tmp_path)).stdout
    assert "compute 0.700, scores 0.400, memory 0.900; a kernel starts in 5 µs" in text
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("calibration-h200-20")
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    assert len(found["problem"]) == len(PROBLEMS)
    shares = ("--hardware", "h200", "--compute", "0.7", "--scores", "0.4", "--memory", "0.9")
    by_file, by_roofline = (
        rows("plan", *PLAN, *more)["rows"] for more in (("--calibration", str(path)), shares)
    )
    assert by_file[0]["time_s"] > by_roofline[0]["time_s"]  # waves, exponentials and starts only add
    bounds = {row["bound"] for row in rows("roofline", *PLAN, "--calibration", str(path))["rows"]}
    assert bounds <= {"compute", "memory", "start"}
    refused = run("plan", *PLAN, "--calibration", str(path), "--compute", "0.5", code=2).stderr
    assert "--compute" in refused
    assert "h200" in run("plan", *PLAN, "--calibration", str(path), "--hardware", "l4", code=2).stderr
    path.write_text(toml_text({**found, "kind": "traffic"}), encoding="utf-8")
    assert "calibration" in run("plan", *PLAN, "--calibration", str(path), code=2).stderr


def test_every_way_to_use_a_calibration(rows: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    times = [made(problem) for problem in PROBLEMS]
    path.write_text(toml_text(document("calibration", "h200", "x", problem=times)), encoding="utf-8")
    division = ("--division", "data=2")
    for command in (("roofline", *PLAN, *division), ("timeline", *PLAN, *division)):
        calibrated_one = rows(*command, "--calibration", str(path))
        assert calibrated_one != rows(*command, "--hardware", "h200")


def test_numbers_follow_from_the_rows_that_calibrate() -> None:
    times = [made(problem) for problem in PROBLEMS]
    slow = [row if use_of(row) == "calibration" else {**row, "seconds": 2 * row["seconds"]} for row in times]
    found = calibrated(document("calibration", "h200", "x", problem=slow))
    assert found.numbers() == TRUTH
    assert {round(row["error"], 6) for row in found.rows if row["use"] == "held out"} == {-0.5}
    held = [row for row in times if use_of(row) == "calibration"]
    assert calibrated(document("calibration", "h200", "x", problem=held)).numbers() == TRUTH


def test_no_card_is_faster_than_its_peaks() -> None:
    faster = [{**row, "seconds": row["seconds"] / 4} for row in map(made, PROBLEMS)]
    found = calibrated(document("calibration", "h200", "x", problem=faster))
    assert (found.compute, found.scores, found.memory) == (1.0, 1.0, 1.0)
    assert found.start == 0.0


def test_what_a_file_says_of_its_rows_is_not_believed() -> None:
    """Files of before say which rows calibrate; that is named in the code."""
    times = [{**made(problem), "use": "held out"} for problem in PROBLEMS]
    assert calibrated(document("calibration", "h200", "x", problem=times)).numbers() == TRUTH


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"kind": "fill"}, "copy"),
        ({"M": 2.5}, "whole sizes"),
        ({"M": True}, "whole sizes"),
        ({"seconds": 0.0}, "above 0"),
        ({"seconds": "1"}, "above 0"),
        ({"K": 3}, "product problems that calibrate, 2; the file has 0"),
    ],
)
def test_what_is_no_calibration(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    times = [made(one) | (row if one["kind"] == "product" else {}) for one in PROBLEMS]
    path = tmp_path / "x.toml"
    path.write_text(toml_text(document("calibration", "h200", "x", problem=times)), encoding="utf-8")
    with pytest.raises(OptionError, match=words):
        read_calibration(path)
    path.write_text(toml_text(document("calibration", "h400", "x", problem=times)), encoding="utf-8")
    with pytest.raises((UnknownNameError, OptionError)):
        read_calibration(path)


def test_copies_that_tell_no_bandwidth() -> None:
    times = [{**made(one), "seconds": 1.0} if one["kind"] == "copy" else made(one) for one in PROBLEMS]
    with pytest.raises(OptionError, match="larger copy to take longer"):
        calibrated(document("calibration", "h200", "x", problem=times))


def test_a_card_without_a_rate_of_exponentials() -> None:
    times = [made(problem) for problem in PROBLEMS]
    with pytest.raises(OptionError, match="exponentials"):
        calibrated(document("calibration", "mi300x", "x", problem=times))
