"""``frugal bench --backend cudasim``: what runs, what would take hours, and names that nothing bears."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from cli.bench_checks import check_simulated
from cli.bench_problems import AXES, DEFAULT_SHAPES


@pytest.mark.cudasim
def test_the_simulator_verifies_and_says_that_its_seconds_mean_nothing(run: Callable[..., Any]) -> None:
    result = run("bench", "int8", "--backend", "cudasim", "--shape", "3,8,4", "--rivals")
    assert "no measure of speed" in result.stdout
    assert "simulator/s" in result.stdout
    assert "TOPS" not in result.stdout
    assert result.stdout.count("timed") == 5  # four problems, and the total
    assert result.stdout.count("missing") == 7
    assert result.stderr.count("frugal portable") == 4  # each problem when it is done
    assert result.stderr.count(" s in the simulator") == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("int8", "--model", "llama-2-70b"), "int8 at 16x8192x8192 is too large for the simulator: 1.1e+09"),
        (("int8", "--model", "llama-2-70b", "--tokens", "1"), "int8 at 1x8192x8192 is too large"),
        (("int8", "--shape", "1000000,1,1"), "int8 at 1000000x1x1 is too large"),
        (("int8", "--shape", "16,32,16", "--shape", "128,128,128"), "int8 at 128x128x128 is too large"),
        (("weight-only", "--shape", "1,8192,28672"), "1x256x16 is fine, and times need a GPU"),
        (("attention", "--shape", "1,1,4096,64"), "attention at 1x1x4096x64 is too large"),
        (("attention", "--shape", "1,4096,1,1,1"), "attention at 1x4096x1x1x1 is too large"),
        (("int8-attention", "--shape", "1,1,1024,8"), "1x1x12x8 is fine"),
        (("flexible", "--shape", "1,1,1000000,8"), "flexible at 1x1x1000000x8 is too large"),
        (("decode", "--shape", "1,32,8,131072,128"), "decode at 1x32x8x131072x128 is too large"),
    ],
)
def test_the_simulator_refuses_what_would_take_hours(
    run: Callable[..., Any], arguments: tuple[str, ...], said: str
) -> None:
    done = run("bench", *arguments, "--backend", "cudasim", code=2)
    assert said in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize("what", list(AXES))
def test_the_simulator_takes_its_own_shapes(what: str) -> None:
    for shape in DEFAULT_SHAPES[what, "cudasim"]:
        check_simulated(what, [shape, tuple(2 * size for size in shape)])


@pytest.mark.cudasim
def test_names_that_nothing_bears_are_said(run: Callable[..., Any]) -> None:
    simulated = ("bench", "int8", "--backend", "cudasim", "--shape", "3,8,4")
    refused = run(*simulated, "--rival", "cudnn", code=2).stderr
    assert "_int_mm" in refused
    assert "has 'cudnn' in its name" in refused
    for tier in ("fastest", "port", ""):
        done = run(*simulated, "--tier", tier, code=2)
        assert f"--tier: expected one of hopper, portable; got {tier!r}" in done.stderr
        assert not done.stdout


@pytest.mark.cudasim
def test_bfloat16_without_its_package(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    said = run("bench", "int8", "--backend", "cudasim", "--shape", "3,8,4", "--dtype", "fp16,bf16", code=3)
    assert "bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes" in said.stderr
    assert "in the simulator" not in said.stderr, "nothing has been run before"
