"""``frugal verify attention.flexible --mod``: right functions pass, each kind of mistake is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import UnsupportedError

OWN = """
import math
import numpy as np

def near(b, h, i, j):
    return abs(i - j) < 3 and j <= i

def bent(score, b, h, i, j):
    return 2.0 * math.tanh(score / 3) - 0.1 * (i - j) * (h + 1)

def bent_vjp(gradient, score, b, h, i, j):
    return gradient / math.cosh(score / 3) ** 2 * 2 / 3

def leaky(score, b, h, i, j):
    return score if score > 0 else 0.1 * score

def leaky_vjp(gradient, score, b, h, i, j):
    return gradient if score > 0 else 0.1 * gradient

def far(score, b, h, i, j):
    return np.where(abs(i - j) > 40, -np.inf, 2 * score)

def far_vjp(gradient, score, b, h, i, j):
    return np.where(abs(i - j) > 40, np.nan, 2 * gradient)

def bare(score, b, h, i, j):
    return score + 1.0

def halved(score, b, h, i, j):
    return 2.0 * math.tanh(score)

def halved_vjp(gradient, score, b, h, i, j):
    return gradient / math.cosh(score) ** 2

def late(score, b, h, i, j):
    return 20.0 * math.tanh(score / 20)

def late_vjp(gradient, score, b, h, i, j):
    return gradient if abs(score) < 10 else gradient / math.cosh(score / 20) ** 2

def crooked(score, b, h, i, j):
    return 2.0 * score

def crooked_vjp(gradient, score, b, h, i, j):
    return 2.0 * gradient + 0.1

def one_head(score, b, h, i, j):
    return score * (1 + h)

def one_head_vjp(gradient, score, b, h, i, j):
    return gradient

def whole(score, b, h, i, j):
    return score - np.max(score)

def whole_mask(b, h, i, j):
    return j <= np.min(i)

def numbers(b, h, i, j):
    return i - j

def badline(score, b, h, i, j):
    x = 1.0
    return score.nothing + x

def unnamed(b, h, i, j):
    return not_named(i, j)

def unwritten(b, h, i, j):
    raise NotImplementedError

def listed(b, h, i, j):
    return sorted([i, j])[0] == j
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def verified(own: Path, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(name: str, *more: str, code: int = 0) -> Any:
        command = (
            "verify",
            "attention.flexible",
            "--mod",
            f"{own}:{name}",
            "--examples",
            "2",
            "--json",
            *more,
        )
        return json.loads(run(*command, code=code).stdout)

    return call


@pytest.mark.parametrize("name", ["near", "bent", "leaky", "far"])
def test_right_functions_pass(name: str, verified: Callable[..., Any]) -> None:
    (row,) = verified(name)["rows"]
    assert (row["passed"], row["failed"], row["refused"]) == (2 if name == "near" else 8, 0, 0)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("halved", "score_mod_vjp"),
        ("late", "score_mod_vjp"),
        ("one_head", "score_mod_vjp"),
        ("crooked", "linear in the gradient"),
        ("whole", "one by one"),
        ("whole_mask", "one by one"),
        ("numbers", "one by one"),
    ],
)
def test_mistakes_are_named(name: str, check: str, verified: Callable[..., Any]) -> None:
    (row,) = verified(name, code=1)["rows"]
    assert check in {failure["check"] for failure in row["failures"]}
    assert all(f"own.py:{name} --backend numpy" in failure["reproducer"] for failure in row["failures"])


def test_a_score_without_gradient_is_refused_there(verified: Callable[..., Any]) -> None:
    (row,) = verified("bare")["rows"]
    assert row["passed"] == 2
    assert list(row["refusals"]) == ["the file has no bare_vjp, so there are no gradients to check"]


def test_it_stands_alone(own: Path, run: Callable[..., Any]) -> None:
    for more in ((), ("attention.dense",), ("attention.flexible", "--with", "math:sqrt")):
        assert "alone" in run("verify", *more, "--mod", f"{own}:near", code=2).stderr
    assert "no function" in run("verify", "attention.flexible", "--mod", f"{own}:absent", code=2).stderr


@pytest.mark.cudasim
def test_kernels_have_the_users_function(
    verified: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = verified("bent", "--backend", "cudasim", "--dtype", "float16")["rows"]
    assert [(row["backend"], row["passed"], row["failed"]) for row in rows] == [
        ("numpy", 8, 0), ("sm_80", 1, 0), ("cudasim", 2, 0)
    ]  # fmt: skip
    import cuda_backend

    forward = cuda_backend.flexible_attention

    def without(*arrays: Any, score_mod: Any = None, **options: Any) -> Any:
        return forward(*arrays, **options)

    monkeypatch.setattr(cuda_backend, "flexible_attention", without)
    rows = verified("bent", "--backend", "cudasim", "--dtype", "float16", code=1)["rows"]
    assert rows[2]["failed"] >= 1
    assert rows[2]["failures"][0]["check"] == "forward"


@pytest.mark.parametrize(
    ("name", "culprit", "error"),
    [
        ("badline", "return score.nothing + x", "AttributeError"),
        ("unnamed", "return not_named(i, j)", "NameError"),
        ("unwritten", "raise NotImplementedError", "NotImplementedError"),
    ],
)
def test_what_raises_is_said_once_with_its_line(
    name: str, culprit: str, error: str, own: Path, verified: Callable[..., Any]
) -> None:
    line = 1 + [text.strip() for text in OWN.splitlines()].index(culprit)
    for backend in ("numpy", "cudasim"):
        (row,) = verified(name, "--backend", backend, code=1)["rows"]
        (failure,) = row["failures"]
        assert failure["detail"].startswith(f"{own}, line {line}: {error}")


def test_what_is_no_mask_is_said_once(own: Path, verified: Callable[..., Any]) -> None:
    (row,) = verified("numbers", code=1)["rows"]
    (failure,) = row["failures"]
    assert "expected True or False" in failure["detail"]
    assert f"{own}, line" in failure["detail"]


@pytest.mark.cudasim
def test_what_no_compiler_takes_fails_in_the_simulator_too(verified: Callable[..., Any]) -> None:
    rows = verified("listed", "--backend", "cudasim", "--dtype", "float32", code=1)["rows"]
    assert [(row["backend"], row["failed"]) for row in rows] == [("numpy", 0), ("sm_80", 1), ("cudasim", 0)]
    (failure,) = rows[1]["failures"]
    assert failure["detail"].startswith("mask_mod: does not compile for the GPU: No implementation of")


@pytest.mark.cudasim
def test_without_a_compiler_that_is_said(
    own: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(_target: str) -> None:
        raise UnsupportedError("not compiled for a GPU: no libnvvm")

    monkeypatch.setattr("cli.flexible_verify.compiler_says", lacking)
    command = ("verify", "attention.flexible", "--mod", f"{own}:near", "--examples", "1")
    said = run(*command, "--backend", "cudasim", "--dtype", "float32").stdout
    assert "SKIPPED: all refused" in said
    assert "not compiled for a GPU: no libnvvm" in said
    assert "Not compiled for a GPU" in run(*command).stdout


@pytest.mark.cudasim
def test_a_format_that_is_not_there_is_skipped_aloud(
    own: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    command = ("verify", "attention.flexible", "--mod", f"{own}:near", "--examples", "1")
    said = run(*command, "--backend", "cudasim", "--dtype", "bfloat16").stdout
    assert "SKIPPED: all refused by frugal portable in bfloat16" in said
    assert "bfloat16 arrays need the package ml_dtypes" in said
