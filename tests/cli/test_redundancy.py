"""`frugal redundancy` on a small checkpoint: its rows, its picture, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint import save
from tests.transformer.test_bert import TINY, tiny_tensors, write_tiny


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Two layers of 12 x 12 blocks; the keys of the first are its queries, Q of the second has rank 1."""
    tensors = tiny_tensors()
    for layer in range(2):
        at = f"encoder.layer.{layer}"
        rng = np.random.default_rng(layer)
        tensors[f"{at}.intermediate.dense.weight"] = rng.standard_normal((24, 12))
        tensors[f"{at}.intermediate.dense.bias"] = np.zeros(24)
        tensors[f"{at}.output.dense.weight"] = rng.standard_normal((12, 24))
    first, second = (f"encoder.layer.{layer}.attention.self" for layer in range(2))
    tensors[f"{first}.key.weight"] = tensors[f"{first}.query.weight"]
    tensors[f"{second}.query.weight"] = np.outer(np.arange(1.0, 13), np.arange(1.0, 13))
    save(tmp_path / "model", tensors, config=TINY | {"intermediate_size": 24})
    return str(tmp_path / "model")


def test_rows(rows: Any, model: str) -> None:
    document = rows("redundancy", "--model", model)
    assert document["totals"] == {"single_blocks": 2 * 8, "pairs": 2 * 7}
    found = {(row["layer"], *row["blocks"]): row for row in document["rows"]}
    assert found[0, "q", "k"]["rank_90"] == found[0, "q"]["rank_90"]  # equals need no more
    assert (found[0, "q", "k"]["rows"], found[0, "q", "k"]["columns"]) == (12, 24)
    assert found[0, "q", "k"]["random_rank_90"] > found[0, "q"]["random_rank_90"]
    assert found[1, "q"]["rank_99"] == 1
    assert (1, "out_1", "out_2") in found
    assert any("Marchenko" in source for source in document["sources"])


def test_options(rows: Any, run: Any, model: str) -> None:
    document = rows("redundancy", "--model", model, "--layers", "1", "--pairing", "rows", "--method", "svd")
    assert {row["layer"] for row in document["rows"]} == {1}
    assert {(row["rows"], row["columns"]) for row in document["rows"]} == {(12, 12), (24, 12)}
    assert "on average" in run("redundancy", "--model", model).stdout


def test_a_picture(run: Any, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "curves.svg"
    run("redundancy", "--model", model, "--plot", str(file))
    text = file.read_text(encoding="utf-8")
    for words in ("single blocks", "pairs of blocks", "random matrix", "FFN out"):
        assert words in text


def test_refusals(run: Any, model: str, tmp_path: Path) -> None:
    assert "layers 0 to 1" in run("redundancy", "--model", model, "--layers", "2", code=2).stderr
    assert "--model" in run("redundancy", code=2).stderr
    odd = str(write_tiny(tmp_path))  # 20 hidden features do not cut into blocks of 12
    assert "multiple of D" in run("redundancy", "--model", odd, code=2).stderr
