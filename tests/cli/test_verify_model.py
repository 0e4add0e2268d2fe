"""`frugal verify --model`: a tiny checkpoint passes, damage and other architectures are one line."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import cli.model_check as model_check
from refimpl.errors import BackendUnavailableError
from tests.transformer.test_bert import write_tiny

pytest.importorskip("tokenizers")


@pytest.fixture
def tiny(tmp_path: Any) -> Any:
    return write_tiny(tmp_path)


@pytest.fixture
def alone(monkeypatch: Any) -> None:
    """As if transformers were not installed: it takes seconds to import."""

    def missing(directory: str) -> None:
        raise BackendUnavailableError("transformers is not to be had: No module named 'transformers'")

    monkeypatch.setattr("cli.transformers_model.TransformersModel", missing)


def test_all_attentions_and_int8_on_a_tiny_model(alone: None, tiny: Any, rows: Any) -> None:
    document = rows("verify", "--model", str(tiny))
    assert document["totals"]["failed"] == 0
    assert document["totals"]["layers"] == 2
    by_name = {(row["technique"], row["matrix"]): row for row in document["rows"]}
    assert by_name["transformer.encoder", None]["refused"] == 1  # and it is said why
    assert "not to be had" in by_name["transformer.encoder", None]["details"][0]
    for name in model_check.ATTENTION:
        assert by_name[name, None]["passed"] == 4
        assert by_name[name, None]["relative_error_max"] < 1e-5
    for matrix in model_check.MATRICES:
        row = by_name["quant.llm_int8", matrix]
        assert row["passed"] == 2
        assert len(row["outlier_features_by_layer"]) == 2
        assert 1e-4 < row["relative_error_max"] < 0.1


def test_a_wrong_attention_and_a_wrong_int8_fail(alone: None, tiny: Any, run: Any, monkeypatch: Any) -> None:
    functions = model_check._functions

    def broken(names: Any, backend: str) -> Any:
        for name, target, f in functions(names, backend):
            if target.endswith("flash_attention"):
                yield name, target, lambda *a, f=f, k_lengths=None, **o: f(*a, **o)  # padding is attended to
            elif target.endswith("llm_int8_linear"):
                yield name, target, lambda *a, f=f, bias=None, **o: f(*a, **o)
            else:
                yield name, target, f

    monkeypatch.setattr(model_check, "_functions", broken)
    document = json.loads(run("verify", "--model", str(tiny), "--json", code=1).stdout)
    failed = {row["implementation"] for row in document["rows"] if row["failed"]}
    assert {name.partition(":")[2] for name in failed} == {"flash_attention", "llm_int8_linear"}


@pytest.mark.cudasim
def test_the_simulator_runs_the_kernels_on_real_queries(alone: None, tiny: Any, rows: Any) -> None:
    document = rows("verify", "--model", str(tiny), "--backend", "cudasim")
    assert document["totals"]["passed"] > 0
    assert document["totals"]["failed"] == 0


@pytest.mark.parametrize("damage", ["missing", "cut off", "other", "no config", "no tokenizer", "pickle"])
def test_a_bad_checkpoint_is_one_line(alone: None, damage: str, tiny: Any, run: Any) -> None:
    weights, config = tiny / "model.safetensors", tiny / "config.json"
    message = {
        "missing": "cannot be read: No such file",
        "cut off": "cut off",
        "other": "expected model_type 'bert', got 'gpt2'",
        "no config": "config.json",
        "no tokenizer": "there is no tokenizer.json and no vocab.txt",
        "pickle": "pickled weights only",
    }[damage]
    where = tiny
    if damage == "missing":
        where = tiny / "nowhere"
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "other":
        config.write_text(json.dumps({"model_type": "gpt2"}))
    elif damage == "no config":
        config.unlink()
    elif damage == "no tokenizer":
        (tiny / "vocab.txt").unlink()
    elif damage == "pickle":
        weights.rename(tiny / "pytorch_model.bin")
    done = run("verify", "--model", str(where), code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_usage(tiny: Any, run: Any) -> None:
    for extra in (["attention.dense"], ["--axes", "B=1"]):
        assert "--model takes no NAME" in run("verify", "--model", str(tiny), *extra, code=2).stderr


def test_the_bound_of_int8_is_a_bound_and_not_a_wide_one() -> None:
    """Codes rounded up instead of to nearest break it."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((30, 64)), rng.standard_normal((64, 8))

    def row_for(rounding: Any) -> Any:
        s_x, s_w = np.abs(x).max(axis=1, keepdims=True) / 127, np.abs(weight).max(axis=0) / 127
        row = model_check.Row("quant.llm_int8", "f", "x @ w", "numpy", "float32", matrix="w_1")
        found = (rounding(x / s_x) @ rounding(weight / s_w)) * s_x * s_w
        model_check._judge_int8(row, found, x, weight, np.zeros(8))
        return row.counts

    assert row_for(np.rint)["passed"] == 1
    assert row_for(lambda codes: np.trunc(codes / 4) * 4)["failed"] == 1
