"""`frugal memory` on files: a config.json, a DeepSpeed configuration, the headers of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsim.hardware import hardware
from memsim.memory.run import Run
from memsim.memory.step_memory import step_memory
from refimpl.safetensors_format import write_tensors

TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 10, "tie_word_embeddings": True,
}  # fmt: skip
TINY_PARAMETERS = 10 * 8 + 2 * (4 * 8 * 8 + 3 * 8 * 12 + 2 * 8) + 8
LLAMA = ("memory", "training", "--model", "llama-2-7b", "--gpus", "8", "--stage", "1", "--sequence", "4096")


def test_the_disagreement_on_llama(rows: Any) -> None:
    """Five tools, one nominal set-up: what they printed, and what their formulas give here."""
    given = (*LLAMA, "--micro-batches", "8", "--recompute", "selective", "--hardware", "a100-80gb")
    document = rows(*given, "--explain")
    found = {row["name"]: row for row in document["rows"]}
    assert found["megatron"]["total_bytes"] / 2**20 == pytest.approx(63_497, abs=0.5)
    assert found["cookbook"]["total_bytes"] / 2**30 == pytest.approx(65.1, abs=0.05)
    assert found["llm_analysis"]["total_bytes"] / 2**30 == pytest.approx(45.9, abs=0.05)
    assert found["pytorch"]["total_bytes"] / 2**30 == pytest.approx(64.04, rel=0.04)
    assert found["calculon"]["total_bytes"] / 2**30 == pytest.approx(34.3, rel=0.06)
    assert all(row["why"] for row in document["rows"])
    # 34 to 65 GiB for one set-up; ours lies where PyTorch's allocator would be.
    ours = step_memory(model="llama-2-7b", run=Run(
        gpus=8, stage=1, sequence=4096, micro_batches=8, recompute="selective"))  # fmt: skip
    assert found["frugal"]["total_bytes"] == ours.peak
    totals = document["totals"]
    assert ours.peak <= totals["allocated_bytes"] <= totals["reserved_bytes"] <= totals["capacity_bytes"]
    assert totals["capacity_bytes"] == hardware("a100-80gb").hbm.value
    assert totals["fits"] is True
    assert rows(*LLAMA, "--hardware", "l4")["totals"]["fits"] is False


def test_explanations_name_each_gap(run: Any) -> None:
    shown = run(*LLAMA, "--recompute", "selective", "--explain").stdout
    for words in (
        "Megatron-LM",
        "it printed 63497 MiB",
        "gradients +12.55 GiB",
        "gradients in fp32",
        "10.11 GB",
    ):
        assert words in shown


def test_first_middle_and_last_stage(rows: Any) -> None:
    ranks = ("--gpus", "64", "--tensor", "8", "--pipeline", "8", "--micro-batches", "64")
    document = rows("memory", "training", "--model", "gpt3-175b", *ranks, "--sequence-parallel")
    ours = [row for row in document["rows"] if row["name"] == "frugal"]
    assert [row["stage"] for row in ours] == [0, 4, 7]
    assert ours[0]["activations_bytes"] > ours[1]["activations_bytes"]
    assert ours[0]["weights_bytes"] > ours[1]["weights_bytes"]
    assert document["totals"]["peak_bytes"] == max(row["total_bytes"] for row in ours)


def test_adapters_hold_less(rows: Any) -> None:
    plain, adapted = (
        next(row for row in rows(*LLAMA, *more)["rows"] if row["name"] == name)
        for more, name in (
            ((), "frugal_at_once"),
            (("--adapter-rank", "16", "--base", "nf4"), "frugal_adapters"),
        )
    )
    assert adapted["weights_bytes"] < plain["weights_bytes"] / 3
    assert adapted["activations_bytes"] == plain["activations_bytes"]
    assert adapted["gradients_bytes"] == 2 * 39_976_960


def _written(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def test_a_file_and_a_run(rows: Any, tmp_path: Path) -> None:
    _written(tmp_path)
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}})
    )
    both = ("memory", "training", "--config", str(tmp_path), "--deepspeed", str(tmp_path / "ds.json"))
    at_once = rows(*both, "--gpus", "4", "--sequence", "6")["rows"][1]
    # Of each layer and of embedding and norm a quarter of 12 bytes, and the shares of weights.
    assert at_once["optimizer_bytes"] == 3 * TINY_PARAMETERS
    assert at_once["buffers_bytes"] == 2 * 500_000_000
    assert rows(*both, "--gpus", "4", "--stage", "1", "--sequence", "6")["rows"][1]["weights_bytes"] == (
        2 * TINY_PARAMETERS
    )
    served = rows("memory", "inference", "--config", str(tmp_path), "--prompt", "5")["rows"][0]
    assert served["weights_bytes"] == 2 * TINY_PARAMETERS
    assert served["model"] == tmp_path.name


def test_a_checkpoint_is_held_to_its_description(rows: Any, run: Any, tmp_path: Path) -> None:
    _written(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"w": np.zeros(TINY_PARAMETERS, np.float16)})
    document = rows("memory", "checkpoint", str(tmp_path))
    assert document["rows"] == [
        {"format": "F16", "parameters": TINY_PARAMETERS, "tensor_bytes": 2 * TINY_PARAMETERS}
    ]
    assert document["totals"]["described_parameters"] == TINY_PARAMETERS
    (row,) = rows("memory", "checkpoint", str(tmp_path / "model.safetensors"), "--tensors")["rows"]
    assert (row["tensor"], row["shape"]) == ("w", [TINY_PARAMETERS])
    assert "describes" not in run("memory", "checkpoint", str(tmp_path)).stdout
    write_tensors(tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)})
    shown = run("memory", "checkpoint", str(tmp_path)).stdout
    assert f"config.json describes {TINY_PARAMETERS} parameters, the files hold 3" in shown


def test_the_picture_of_a_step(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("memory", "training", "--model", "gpt2", "--sequence", "64", "--plot", str(tmp_path / "step.svg"))
    assert (tmp_path / "step.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training"], "expected one of --params, --model and --config"),
        (["training", "--model", "gpt2", "--params", "1B"], "expected one of"),
        (["training", "--model", "gpt2", "--hidden", "4"], "--hidden: a model with a description"),
        (["training", "--params", "1B", "--gpus", "4"], "--gpus: expected a model with a description"),
        (["training", "--model", "gpt-2"], "did you mean"),
        (["training", "--model", "gpt2", "--tensor", "5"], "multiple of tensor x pipeline"),
        (["training", "--model", "gpt2", "--gpus", "5", "--tensor", "5"], "divisor of the 12 heads"),
        (["training", "--model", "gpt2", "--hardware", "a100"], "a100-40gb"),
        (["training", "--config", "/nowhere"], "cannot be read"),
        (["training", "--model", "gpt2", "--deepspeed", "/nowhere"], "cannot be read"),
        (["training", "--model", "gpt2", "--gpus", "2", "--tensor", "2", "--adapter-rank", "4"], "one rank"),
        (["inference"], "expected --model or --config"),
        (["checkpoint", "/nowhere"], "cannot be read"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run: Any, arguments: list[str], message: str) -> None:
    done = run("memory", *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
