"""Damaged configurations: whatever a file holds, an answer or one clear line, and never a traceback.

``FUZZED_FILES=10000 pytest tests/cli/test_fuzzed_files.py`` goes through as many.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

COUNT = int(os.environ.get("FUZZED_FILES", "240"))
SLOWEST = 20.0  # seconds for one file; a file with a bomb in it takes minutes
BATCHES = 8

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: list[dict[str, Any]] = [
    LLAMA,
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 90, "n_positions": 16},
    {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
     "vocab_size": 90, "max_position_embeddings": 16, "word_embed_proj_dim": 16,
     "do_layer_norm_before": False},
    {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "intermediate_size": 64, "vocab_size": 90, "max_position_embeddings": 16, "type_vocab_size": 2},
    LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    LLAMA | {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1],
             "decoder_sparse_step": 1},
    LLAMA | {"model_type": "deepseek_v3", "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8,
             "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
             "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90, "state_size": 4,
     "conv_kernel": 4, "expand": 2, "time_step_rank": "auto"},
    LLAMA | {"model_type": "jamba", "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 8},
    {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "vocab_size": 90},
    {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "vocab_size": 90, "intermediate_size": 64},
    LLAMA | {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 30.0},
    LLAMA | {"model_type": "phi", "qk_layernorm": True},
    LLAMA | {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    LLAMA | {"model_type": "bamba", "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": "auto"},
    {"model_type": "dbrx", "d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 90,
     "attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 3}},
    {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
     "vocab_size": 90, "feed_forward_proj": "gated-gelu"},
    {"model_type": "bart", "d_model": 32, "vocab_size": 90, "max_position_embeddings": 16,
     "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
     "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
]  # fmt: skip
RUNS: list[dict[str, Any]] = [
    {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True},
     "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8,
                           "offload_param": {"device": "nvme"}}},
    {"gradient_accumulation_steps": 2, "fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 2},
     "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": False}},
]  # fmt: skip
STRANGE: list[Callable[[np.random.Generator], Any]] = [
    lambda _: None,
    lambda _: True,
    lambda _: -1,
    lambda _: 0,
    lambda _: 1,
    lambda _: 2.5,
    lambda _: 1e308,
    lambda _: float("inf"),
    lambda _: float("nan"),
    lambda _: 10**400,
    lambda _: -(2**63),
    lambda _: 10**12,
    lambda _: 2500,
    lambda _: "64",
    lambda _: "auto",
    lambda _: "a\nb\x1b[31m\ud800" * 40,
    lambda _: [],
    lambda _: {},
    lambda _: [1, "x", None],
    lambda rng: _nested(int(rng.integers(1, 60))),
    lambda rng: int(rng.integers(-5, 2**40)),
    lambda rng: float(rng.normal()),
]


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def _changed(rng: np.random.Generator, value: dict[str, Any]) -> dict[str, Any]:
    """Return an object some of whose values, at any depth, are gone, strange, or another's."""
    found = dict(value)
    for key in list(found):
        if isinstance(found[key], dict) and rng.random() < 0.5:
            found[key] = _changed(rng, found[key])
    for _ in range(int(rng.integers(0, 3))):
        key = str(rng.choice(list(found) or ["k"]))
        draw = rng.random()
        if draw < 0.25:
            found.pop(key, None)
        elif draw < 0.85:
            found[key] = STRANGE[int(rng.integers(len(STRANGE)))](rng)
        else:
            found[f"{key}{rng.integers(9)}"] = STRANGE[int(rng.integers(len(STRANGE)))](rng)
    return found


def _damaged(rng: np.random.Generator, value: dict[str, Any]) -> bytes:
    """Return the text of a file: most are JSON with strange values, some are cut off, flipped or no JSON."""
    text = json.dumps(_changed(rng, value)).encode()
    match int(rng.integers(20)):
        case 0:
            return text[: int(rng.integers(len(text)))]
        case 1:
            place = int(rng.integers(len(text)))
            return text[:place] + bytes([int(rng.integers(256))]) + text[place + 1 :]
        case 2:
            return rng.bytes(int(rng.integers(200)))
        case 3:
            return [
                b"",
                b"null",
                b"[]",
                b"3",
                b'"x"',
                b"\xef\xbb\xbf" + text,
                text.decode().encode("utf-16"),
            ][int(rng.integers(7))]
        case 4:
            deep = int(rng.integers(100, 100_000))
            return [b"[" * deep, b'{"a":' * deep, b'{"model_type":' + b"[" * deep + b"]" * deep + b"}"][
                int(rng.integers(3))
            ]
        case 5:
            key = json.dumps(str(rng.choice(list(value)))).encode()
            return b"{" + key + b": 1, " + text[1:]
        case 6:
            return b'{"hidden_size": ' + b"9" * int(rng.integers(1, 9000)) + b", " + text[1:]
    return text


@pytest.mark.parametrize("batch", range(BATCHES))
def test_any_file_gives_an_answer_or_one_line(batch: int, run: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from cli.main import frugal

    model, deepspeed = tmp_path / "config.json", tmp_path / "ds.json"
    answers = 0
    for number in range(batch, COUNT, BATCHES):
        rng = np.random.default_rng(number)
        which = MODELS[int(rng.integers(len(MODELS)))]
        arguments = ["memory", "training", "--config", str(model), "--sequence", "16"]
        if number % 3:
            model.write_bytes(_damaged(rng, which))
        else:
            model.write_text(json.dumps(LLAMA))
            deepspeed.write_bytes(_damaged(rng, RUNS[int(rng.integers(len(RUNS)))]))
            arguments += ["--deepspeed", str(deepspeed), "--gpus", "8"]
        start = time.perf_counter()
        done = CliRunner().invoke(frugal, arguments)
        took = time.perf_counter() - start
        where = f"file {number}: {(deepspeed if not number % 3 else model).read_bytes()[:300]!r}"
        assert done.exception is None or isinstance(done.exception, SystemExit), (where, done.exception)
        assert done.exit_code in (0, 2), where
        assert took < SLOWEST, (where, took)
        lines = done.stderr.strip().splitlines()
        if done.exit_code:
            assert len(lines) == 1, (where, lines)
            assert lines[0].startswith("Error: "), (where, lines)
            assert len(lines[0]) < 500 + 2 * len(str(tmp_path)), (where, lines)
            assert done.stdout == "", where
        else:
            assert not lines, (where, lines)
            assert "frugal, over time" in done.stdout, where
            answers += 1
    assert 0 < answers < COUNT / BATCHES
