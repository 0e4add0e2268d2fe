"""What a hostile user tries: huge, empty, doubled and contradictory input, and streams that nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.flexible_forms import FORMS
from cli.flexible_problems import flexible_problem
from cli.main import verdict_of

SIMULATED = ("--backend", "cudasim", "--shape", "1,1,1,1")
STEP = ("--model", "gpt2", "--sequence", "1024")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("comm", "--op", "all_reduce", "--ranks", "1e30", "--bytes", "1"), "expected at most 1e+06"),
        (("comm", "--op", "all_reduce", "--ranks", "1e9", "--bytes", "1"), "expected at most 1e+06"),
        (("plan", *STEP, "--gpus", "1e30", "--batch", "8"), "expected at most 1e+12"),
        (("plan", *STEP, "--gpus", "8", "--batch", "1e30"), "expected at most 1e+12"),
        (("speculate", "--alpha", "0.5", "--gamma", "1e30"), "expected at most 10000"),
        (("parallel", "train", "--ranks", "1000"), "expected at most 256"),
        (("parallel", "train", "--steps", "1e30"), "expected at most 1000"),
        (("parallel", "mesh", "--steps", "1e30"), "expected at most 1000"),
        (("parallel", "mesh", "--micro", "1e30"), "expected at most 1000"),
        (("parallel", "mesh", "--experts", "1e30"), "expected at most 256"),
        (("parallel", "mesh", "--chunks", "1e30", "--schedule", "interleaved"), "expected at most 256"),
        (
            ("timeline", *STEP, "--gpus", "8", "--batch", "1e9", "--division", "pipeline=8"),
            "expected at most 1000000 steps to play",
        ),
        (("parallel", "mesh", "--tp", "1,8", "--dp", "1e30"), "are at most 256 ranks"),
        (("verify", "attention.dense", "--examples", "99999999999999999999"), "not in the range"),
        (
            ("verify", "attention.flash", "--backend", "cudasim", "--axes", f"Tq={'9' * 400}"),
            "times as large",
        ),
        (("bench", "attention", "--shape", "1e29,1e29,1e29,1e29"), "no GPU holds arrays as large"),
        (("bench", "int8", "--shape", "1,1e9,1e9"), "no GPU holds arrays as large"),
        (("bench", "decode", "--splits", "99999999999999999999"), "not in the range"),
        (("bench", "decode", "--splits", "65535", "--backend", "cudasim"), "expected no more"),
        (("bench", "growth", "--method", "full", "--n", "1e12"), "full: at most 16384; got 1000000000000"),
        (("bench", "attention", "--dtype", "fp64"), "--dtype of attention is float16, bfloat16 or float32"),
        (("bench", "attention", "--rival", ""), "has '' in its name"),
        (("bench", "attention", *SIMULATED, "--hardware", "h200"), "--hardware is about times"),
        (("bench", "attention", *SIMULATED, "--rounds", "3"), "--rounds is about times"),
        (("bench", "attention", *SIMULATED, "--plot", "x.svg"), "--plot is about times"),
        (
            ("timeline", *STEP, "--gpus", "1", "--batch", "1", "--division", "data=1", "--trace", "/no/x"),
            "Invalid value for '--trace': cannot write '/no/x': there is no directory",
        ),
        (
            ("parallel", "train", "--ranks", "1", "--stage", "1", "--save", "/no/x"),
            "--save makes a new folder",
        ),
        (("parallel", "train", "--ranks", "1", "--stage", "1", "--save", "."), "--save makes a new folder"),
        (("calibrate", "--hardware", "h2000"), "did you mean h200"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    run: Callable[..., Any], arguments: tuple[str, ...], said: str
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    done = run(*arguments, code=2)
    assert said in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize("name", tuple(FORMS))
def test_forms_of_a_few_tokens(name: str) -> None:
    for N in range(1, 18):
        assert flexible_problem(name, (1, 2, N, 4), "float16", backward=False).work > 0


def test_a_format_named_twice_counts_once(rows: Callable[..., Any]) -> None:
    once, twice = (
        rows("verify", "attention.online_softmax", "--examples", "1", "--dtype", dtypes)["rows"]
        for dtypes in ("fp16", "fp16,float16")
    )
    assert once == twice


def test_two_results_do_not_go_into_one_file(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = str(tmp_path / "x.svg")
    for first, second in (("-o", "--plot"), ("--plot", "-o")):
        done = run("io", first, target, second, str(tmp_path / "." / "x.svg"), code=2)
        assert "both write" in done.stderr
    assert not list(tmp_path.iterdir())


class OutOfMemoryError(RuntimeError):
    """As PyTorch has one."""


def test_a_gpu_that_is_too_small_is_no_bug() -> None:
    assert verdict_of(OutOfMemoryError("CUDA out of memory.\nTried ...")) == (
        2,
        "not enough memory on the GPU for sizes as large as these",
    )
    assert verdict_of(RuntimeError("anything else")) is None


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("frugal", f"{sys.executable} -m cli.main")],
        capture_output=True,
        text=True,
        check=False,
    )


needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full device")


@needs_bash
def test_a_closed_stdout_is_said(tmp_path: Path) -> None:
    done = shell("frugal list >&-")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Invalid value for '-o' / '--output': stdout is closed")
    assert done.stderr.count("\n") == 1
    assert shell(f"frugal list --json -o {tmp_path}/x >&-").returncode == 0
    assert (tmp_path / "x").read_text().startswith("{")


@needs_bash
def test_a_closed_stderr_costs_nothing_but_messages() -> None:
    done = shell("frugal verify attention.online_softmax --examples 1 --csv 2>&-")
    assert done.returncode == 0
    assert done.stdout.startswith("technique,")
    assert shell("frugal lits 2>&-").returncode == 2
    assert shell("frugal lits >&- 2>&-").returncode == 2


@needs_bash
@needs_full
def test_full_devices() -> None:
    done = shell("frugal list >/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: cannot write to stdout: No space left on device")
    assert shell("frugal lits 2>/dev/full").returncode == 2
    done = shell("frugal errata --csv 2>/dev/full")
    assert (done.returncode, done.stdout.count("\n") > 3) == (0, True)
