"""`frugal calibrate`: exit code 3 without a GPU, the file, and what plan makes of it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cli.commands import calibrate
from memsim.measured.calibration import PROBLEMS, calibrated, least_seconds, read_calibration
from memsim.measured.measured_files import document, toml_text
from refimpl.errors import OptionError, UnknownNameError

TRUTH = {"product": 0.7, "attention": 0.4, "copy": 0.9}
PLAN = ("--model", "gpt2", "--gpus", "2", "--batch", "8", "--sequence", "1024")


def made(problem: Any, *_: Any) -> dict[str, Any]:
    """Time a problem on a GPU that reaches shares of its own."""
    return {**problem, "seconds": float(least_seconds(problem, "h200")) / TRUTH[problem["kind"]]}


def test_without_a_gpu(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda_backend.torch_ops.missing", lambda: "torch finds no GPU")
    assert "torch finds no GPU" in run("calibrate", code=3).stderr


def test_the_file_and_its_use(run: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cuda_backend.torch_ops.missing", lambda: None)
    monkeypatch.setattr(calibrate, "_timed", made)
    text = run("calibrate", "--hardware", "h200", "--folder", str(tmp_path)).stdout
    assert "compute 0.700, scores 0.400, memory 0.900" in text
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("calibration-h200-20")
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    assert len(found["problem"]) == len(PROBLEMS)
    shares = ("--compute", "0.7", "--scores", "0.4", "--memory", "0.9")
    by_file = rows("plan", *PLAN, "--calibration", str(path))
    assert by_file["rows"] == rows("plan", *PLAN, "--hardware", "h200", *shares)["rows"]
    assert by_file["rows"] != rows("plan", *PLAN, "--hardware", "h200")["rows"]
    refused = run("plan", *PLAN, "--calibration", str(path), "--compute", "0.5", code=2).stderr
    assert "--compute" in refused
    assert "h200" in run("plan", *PLAN, "--calibration", str(path), "--hardware", "l4", code=2).stderr
    path.write_text(toml_text({**found, "kind": "traffic"}), encoding="utf-8")
    assert "calibration" in run("plan", *PLAN, "--calibration", str(path), code=2).stderr


def test_shares_follow_from_the_rows_that_calibrate() -> None:
    times = [made(problem) for problem in PROBLEMS]
    slow = [row if row["use"] == "calibration" else {**row, "seconds": 2 * row["seconds"]} for row in times]
    found = calibrated(document("calibration", "h200", "x", problem=slow))
    assert found.shares() == {"compute": 0.7, "scores": 0.4, "memory": 0.9}
    assert {round(row["error"], 6) for row in found.rows if row["use"] == "held out"} == {-0.5}
    faster = [{**row, "seconds": row["seconds"] / 4} for row in times]
    assert calibrated({"hardware": "h200", "problem": faster}).shares() == {
        "compute": 1.0, "scores": 1.0, "memory": 1.0
    }  # fmt: skip


def test_least_seconds_by_hand() -> None:
    """H200: 4.8 TB/s, 989.5 TFLOP/s, 132 multiprocessors."""
    assert least_seconds({"kind": "copy", "bytes": 2_400_000}, "h200") == pytest.approx(1e-6)
    causal = {"kind": "attention", "B": 1, "H": 1, "N": 1000, "D": 100}
    assert least_seconds(causal, "h200") == pytest.approx(2e8 / 989.5e12)
    # 2 x 2 tiles of 256 x 128 take as long as 132 would.
    product = {"kind": "product", "M": 512, "N": 256, "K": 100}
    assert least_seconds(product, "h200") == pytest.approx(2 * 132 * 256 * 128 * 100 / 989.5e12)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"kind": "fill"}, "copy"),
        ({"use": "both"}, "use"),
        ({"M": 2.5}, "whole sizes"),
        ({"seconds": 0.0}, "above 0"),
        ({"seconds": "1"}, "above 0"),
        ({"use": "held out"}, "product that calibrates"),
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
