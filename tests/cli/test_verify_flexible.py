"""``frugal verify attention.flexible --mod``: right functions pass, each kind of mistake is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
        ("numpy", 8, 0), ("cudasim", 2, 0)
    ]  # fmt: skip
    import cuda_backend

    forward = cuda_backend.flexible_attention

    def without(*arrays: Any, score_mod: Any = None, **options: Any) -> Any:
        return forward(*arrays, **options)

    monkeypatch.setattr(cuda_backend, "flexible_attention", without)
    rows = verified("bent", "--backend", "cudasim", "--dtype", "float16", code=1)["rows"]
    assert rows[1]["failed"] >= 1
    assert rows[1]["failures"][0]["check"] == "forward"
