"""Runs from DeepSpeed configurations, weights from headers, adapters: files, PEFT, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsim.formats.checkpoint_header import checkpoint_weights
from memsim.formats.deepspeed_config import read_run, run_of_config
from memsim.formats.huggingface import model_of_config
from memsim.memory.adapter_states import adapter_parameters, adapter_states
from memsim.parameters import parameters
from refimpl.errors import OptionError
from refimpl.safetensors_format import CheckpointError, write_tensors

LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip


def test_a_file_of_the_documentation(tmp_path: Path) -> None:
    config = {
        "train_batch_size": 64,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "nvme", "nvme_path": "/local"},
            "reduce_bucket_size": 5e8,
        },
        "activation_checkpointing": {"partition_activations": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    run = read_run(tmp_path / "ds.json", gpus=8, sequence=512)
    assert (run.stage, run.offload, run.convention, run.bucket) == (3, "all", "deepspeed", 500_000_000)
    assert (run.batch, run.micro_batches, run.sequence, run.data) == (4, 2, 512, 8)
    assert run.checkpoints == "partitioned"
    assert read_run(tmp_path / "ds.json", gpus=8, batch=1).batch == 1


def test_what_another_program_fills_in_is_as_good_as_none() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": "auto",
            "offload_optimizer": {"device": "none"},
        },
        "fp16": {"enabled": "auto"},
    }
    run = run_of_config(config, gpus=4)
    assert (run.batch, run.micro_batches, run.bucket, run.convention) == (1, 1, 500_000_000, "fp32")


@pytest.mark.parametrize(
    ("sizes", "batch", "steps"),
    [({}, 1, 1), ({"train_batch_size": 32}, 4, 1), ({"train_micro_batch_size_per_gpu": 3}, 3, 1),
     ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}, 2, 2),
     ({"train_batch_size": 32, "gradient_accumulation_steps": 2}, 2, 2),
     ({"train_batch_size": 32, "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2}, 2, 2)],
)  # fmt: skip
def test_two_sizes_give_the_third(sizes: dict[str, int], batch: int, steps: int) -> None:
    run = run_of_config(sizes, gpus=8)
    assert (run.batch, run.micro_batches) == (batch, steps)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": []}, "zero_optimization: expected an object; got a list of 0"),
        ({"zero_optimization": {"stage": 4}}, "stage: expected a whole number from 0 to 3; got 4"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "expected stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "tpu"}}}, "nvme; got 'tpu'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "got stage 0"),
        ({"train_batch_size": 12}, "multiple of 8 ranks"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1},
         "2 x 1 x 8; got 8"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "one of fp16 and bf16"),
        ({"fp16": {"enabled": 1}}, "expected true or false; got 1"),
        ({"train_micro_batch_size_per_gpu": 1e400}, "train_micro_batch_size_per_gpu"),
    ],
)  # fmt: skip
def test_bad_configurations_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run_of_config(config, gpus=8)


def test_bytes_of_a_checkpoint_are_its_tensors(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "model.safetensors",
        {"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16), "c": np.zeros((2, 2), np.float16)},
    )
    found = checkpoint_weights(tmp_path)
    assert found.totals == {"B": 4 * 15 + 2 * 11, "parameters": 26}
    assert found["F16 tensors"] == 22
    assert checkpoint_weights(tmp_path / "model.safetensors").totals == found.totals


def _shards(folder: Path, places: dict[str, str]) -> Path:
    write_tensors(folder / "one.safetensors", {"a": np.zeros(3, np.float32)})
    write_tensors(folder / "two.safetensors", {"b": np.zeros((4, 2), np.float16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    folder = _shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert checkpoint_weights(folder).totals == {"B": 12 + 16, "parameters": 11}


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_transformers_saved_holds_its_description(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    built.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    held = checkpoint_weights(tmp_path).totals
    count = parameters(model=model_of_config(LLAMA)).total
    assert held == {"B": 2 * count, "parameters": count}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: checkpoint_weights(folder), "there is no model.safetensors"),
        (lambda folder: checkpoint_weights(folder / "x.safetensors"), "cannot be read"),
        (lambda folder: checkpoint_weights(_shards(folder, {"a": "one.safetensors"})), None),
        (lambda folder: checkpoint_weights(_shards(folder, {"a": "two.safetensors"})), "disagree on whether"),
        (lambda folder: checkpoint_weights(_shards(folder, {"a": "../one.safetensors"})), "plain file names"),
    ],
)
def test_checkpoints_that_are_not_whole(
    make: Callable[[Path], Any], message: str | None, tmp_path: Path
) -> None:
    if message is None:
        assert make(tmp_path).totals["B"] == 12
        return
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path)


MODULES = {
    "queries and values": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize("targets", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_adapters_are_those_of_peft(targets: Any) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
        adapted = peft.get_peft_model(built, peft.LoraConfig(r=5, target_modules=MODULES[targets]))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(model=model_of_config(LLAMA), rank=5, targets=targets).total == trained


def test_states_of_adapters() -> None:
    plain = adapter_states(model="llama-2-7b", rank=16)
    assert plain.total == 2 * 6_738_415_616 + 16 * 39_976_960
    quantised = adapter_states(model="llama-2-7b", rank=16, base="nf4")
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert float(plain.total - quantised.total) == matrices * (16 - 4.126953125) / 8
    with pytest.raises(OptionError, match="base"):
        adapter_states(model="gpt2", rank=1, base="int4")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="targets"):
        adapter_parameters(model="gpt2", rank=1, targets="heads")  # type: ignore[arg-type]


def test_only_zero_has_a_bucket() -> None:
    assert run_of_config({}, gpus=2).bucket == 0
    assert run_of_config({"zero_optimization": {"stage": 1}}, gpus=2).bucket == 500_000_000
    assert run_of_config({"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}, gpus=2).bucket == 7
