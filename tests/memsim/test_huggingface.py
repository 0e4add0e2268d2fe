"""Descriptions from ``config.json``: transformers' own modules, tensor by tensor, on the meta device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsim.huggingface import MODEL_TYPES, model_of_config, read_model
from memsim.model import model
from memsim.moe import activated_parameters
from memsim.parameters import parameters
from refimpl.errors import OptionError
from refimpl.safetensors_format import CheckpointError

# What the family of a model is called in transformers, and the settings that change what it holds: each a
# list of values to choose from.  Sizes that all share are drawn in `_settings`.
FAMILIES: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "bert": ("Bert", {"type_vocab_size": [1, 2]}),
    "deepseek_v2": ("DeepseekV2", {
        "kv_lora_rank": [8], "q_lora_rank": [None, 12], "qk_nope_head_dim": [6], "qk_rope_head_dim": [4],
        "v_head_dim": [5], "n_routed_experts": [4], "n_shared_experts": [1, 2],
        "first_k_dense_replace": [0, 2],
        "moe_intermediate_size": [7], "num_experts_per_tok": [2], "attention_bias": [False, True],
    }),
    "deepseek_v3": ("DeepseekV3", {
        "kv_lora_rank": [8], "q_lora_rank": [None, 12], "qk_nope_head_dim": [6], "qk_rope_head_dim": [4],
        "v_head_dim": [5], "n_routed_experts": [8], "n_shared_experts": [1, 2],
        "first_k_dense_replace": [0, 3],
        "moe_intermediate_size": [7], "num_experts_per_tok": [2], "n_group": [2], "topk_group": [1],
        "attention_bias": [False, True],
    }),
    "falcon": ("Falcon", {
        "new_decoder_architecture": [False, True], "multi_query": [False, True], "num_kv_heads": [2],
        "parallel_attn": [False, True], "bias": [False, True], "num_ln_in_parallel_attn": [None, 1, 2],
        "ffn_hidden_size": [None, 40], "alibi": [False, True],
    }),
    "gpt2": ("GPT2", {"n_inner": [None, 20], "tie_word_embeddings": [True, False]}),
    "gpt_neox": ("GPTNeoX", {"attention_bias": [True, False], "use_parallel_residual": [True, False]}),
    "jamba": ("Jamba", {
        "num_experts": [1, 4], "attn_layer_period": [3, 4], "attn_layer_offset": [1, 2],
        "expert_layer_period": [1, 2], "expert_layer_offset": [0, 1], "mamba_d_state": [3],
        "mamba_dt_rank": [5, "auto"],
        "mamba_proj_bias": [False, True], "mamba_expand": [2, 3], "mamba_d_conv": [3],
    }),
    "llama": ("Llama", {
        "head_dim": [None, 6], "attention_bias": [False, True], "mlp_bias": [False, True],
        "tie_word_embeddings": [False, True],
    }),
    "mamba": ("Mamba", {
        "state_size": [3], "conv_kernel": [4], "expand": [2, 3], "time_step_rank": ["auto", 5],
        "use_bias": [False, True], "tie_word_embeddings": [True, False],
    }),
    "mistral": ("Mistral", {"head_dim": [None, 6], "sliding_window": [None, 16]}),
    "mixtral": ("Mixtral", {"num_local_experts": [3], "num_experts_per_tok": [2], "head_dim": [None, 6]}),
    "opt": ("OPT", {
        "word_embed_proj_dim": [None, 10], "do_layer_norm_before": [True, False],
        "enable_bias": [True, False], "_remove_final_layer_norm": [False, True],
    }),
    "qwen2": ("Qwen2", {"tie_word_embeddings": [False, True]}),
    "qwen2_moe": ("Qwen2Moe", {
        "num_experts": [4], "num_experts_per_tok": [2], "moe_intermediate_size": [7],
        "shared_expert_intermediate_size": [9], "decoder_sparse_step": [1, 2], "qkv_bias": [True, False],
        "mlp_only_layers": [[], [1, 3]],
    }),
    "qwen3": ("Qwen3", {"head_dim": [6], "attention_bias": [False, True]}),
    "qwen3_moe": ("Qwen3Moe", {
        "head_dim": [6], "num_experts": [4], "num_experts_per_tok": [2], "moe_intermediate_size": [7],
        "decoder_sparse_step": [1, 2], "mlp_only_layers": [[], [0]],
    }),
}  # fmt: skip


def _settings(kind: str, seed: int) -> dict[str, Any]:
    """Return small sizes, and one choice for every setting of the family."""
    rng = np.random.default_rng(seed)
    heads = 4
    width = heads * int(rng.integers(2, 5)) * 2
    shared: dict[str, Any] = {
        "vocab_size": int(rng.integers(3, 40)),
        "hidden_size": width,
        "num_hidden_layers": int(rng.integers(4, 7)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 40)),
        "max_position_embeddings": int(rng.integers(8, 30)),
    }
    if kind == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        shared |= {new: shared.pop(old) for old, new in names.items()}
        shared |= {"n_positions": shared.pop("max_position_embeddings")}
    elif kind == "opt":
        shared["ffn_dim"] = shared.pop("intermediate_size")
    elif kind == "mamba":
        del shared["intermediate_size"]
    elif kind not in ("bert", "falcon", "gpt_neox"):
        shared["num_key_value_heads"] = int(rng.choice((1, 2, 4)))
    chosen = {name: values[rng.integers(len(values))] for name, values in FAMILIES[kind][1].items()}
    if kind == "jamba":
        chosen["num_experts_per_tok"] = 1
        chosen["attn_layer_offset"] %= chosen["attn_layer_period"]
        chosen["expert_layer_offset"] %= chosen["expert_layer_period"]
    return shared | {
        name: value for name, value in chosen.items() if value is not None or name == "q_lora_rank"
    }


def _built(config: Any) -> int:
    """Return how many parameters transformers makes of a configuration."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    auto = transformers.AutoModel if config.model_type == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(p.numel() for p in auto.from_config(config).parameters())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_every_family_as_transformers_builds_it(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for seed in range(8):
        config = getattr(transformers, f"{FAMILIES[kind][0]}Config")(**_settings(kind, seed))
        config.save_pretrained(tmp_path)
        found = parameters(model=read_model(tmp_path))
        assert found.total == _built(config), (seed, (tmp_path / "config.json").read_text())
        # What its maker says in one line, without what the file leaves to defaults.
        assert parameters(model=model_of_config(config.to_dict())).total == found.total


def test_every_family_is_tested() -> None:
    assert set(MODEL_TYPES) - set(FAMILIES) == {"deepseek"}  # which transformers does not have


# Configurations as released, written out here and not read from the data files.
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
DEEPSEEK = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "num_attention_heads": 128, "num_key_value_heads": 128}  # fmt: skip


def _llama(layers: int, width: int, heads: int, keys: int, inner: int, rows: int) -> dict[str, Any]:
    return LLAMA | {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": keys, "intermediate_size": inner, "vocab_size": rows,
    }  # fmt: skip


def _opt(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "ffn_dim": 4 * width, "vocab_size": 50272, "max_position_embeddings": 2048,
    }  # fmt: skip


def _gpt2(layers: int, width: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": 50257,
        "n_positions": positions,
    }  # fmt: skip


def _bert(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "vocab_size": 30522, "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }  # fmt: skip


RELEASED: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(32, 4096, 32, 32, 11008, 32000),
    "llama-13b": _llama(40, 5120, 40, 40, 13824, 32000),
    "llama-33b": _llama(60, 6656, 52, 52, 17920, 32000),
    "llama-65b": _llama(80, 8192, 64, 64, 22016, 32000),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13824, 32000),
    "llama-2-70b": _llama(80, 8192, 64, 8, 28672, 32000),
    "llama-3-8b": _llama(32, 4096, 32, 8, 14336, 128256),
    "llama-3-70b": _llama(80, 8192, 64, 8, 28672, 128256),
    "llama-3.1-405b": _llama(126, 16384, 128, 8, 53248, 128256),
    "deepseek-7b": _llama(30, 4096, 32, 32, 11008, 102400),
    "deepseek-67b": _llama(95, 8192, 64, 8, 22016, 102400),
    "sheared-llama-1.3b": _llama(24, 2048, 16, 16, 5504, 32000),
    "sheared-llama-2.7b": _llama(32, 2560, 20, 20, 6912, 32000),
    "mistral-7b": _llama(32, 4096, 32, 8, 14336, 32000) | {"model_type": "mistral"},
    "mixtral-8x7b": _llama(32, 4096, 32, 8, 14336, 32000)
    | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "mixtral-8x22b": _llama(56, 6144, 48, 8, 16384, 32768)
    | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen1.5-moe": _llama(24, 2048, 16, 16, 5632, 151936)
    | {"model_type": "qwen2_moe", "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
       "num_experts": 60, "num_experts_per_tok": 4},
    "deepseek-v2": _llama(60, 5120, 128, 128, 12288, 102400) | DEEPSEEK
    | {"model_type": "deepseek_v2", "moe_intermediate_size": 1536, "n_routed_experts": 160,
       "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "deepseek-v3": _llama(61, 7168, 128, 128, 18432, 129280) | DEEPSEEK
    | {"model_type": "deepseek_v3", "moe_intermediate_size": 2048, "n_routed_experts": 256,
       "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8,
       "topk_group": 4, "num_nextn_predict_layers": 1},
    "jamba": _llama(32, 4096, 32, 8, 14336, 65536)
    | {"model_type": "jamba", "num_experts": 16, "num_experts_per_tok": 2, "expert_layer_period": 2,
       "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16,
       "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256},
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-175b": _gpt2(96, 12288, 96, 2048),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "minilm-l6": _bert(6, 384, 12),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16) | {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_the_catalogue(name: str) -> None:
    assert parameters(model=model_of_config(RELEASED[name])).total == parameters(model=name).total


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.filterwarnings("ignore")
def test_the_catalogue_is_what_transformers_builds(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = dict(RELEASED[name])
    family = FAMILIES[values.pop("model_type")][0]
    assert parameters(model=name).total == _built(getattr(transformers, f"{family}Config")(**values))


def test_public_counts_of_the_newer_models() -> None:
    # DeepSeek-V3's README_WEIGHTS.md prints 671B, and 36.6B activated with the head but not the embedding.
    assert parameters(model="deepseek-v3").total == 671_026_404_352
    activated = activated_parameters(model="deepseek-v3")
    assert round((activated.total - activated["embeddings: tokens"]) / 1e9, 1) == 36.6
    assert parameters(model="mistral-7b").total == 7_241_732_096


def test_a_mixture_that_transformers_does_not_have() -> None:
    config = _llama(28, 2048, 16, 16, 10944, 102400) | {
        "model_type": "deepseek", "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    }  # fmt: skip
    assert parameters(model=model_of_config(config)).total == 16_375_728_128
    assert parameters(model=model("deepseekmoe-16b")).total == 16_375_728_128


def test_what_a_model_is_called(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(RELEASED["deepseek-v3"]))
    found = read_model(tmp_path / "tiny")
    assert found.name == "tiny"
    assert found == read_model(tmp_path / "tiny" / "config.json")
    assert found.source.endswith("without the layers of multi-token prediction")
    assert (
        model_of_config(RELEASED["mistral-7b"] | {"sliding_window": 4096})
        .part("block", "attention")
        .sizes["window"]
        == 4096
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama4"}, "model_type: expected one of bert, .*, qwen3_moe; got 'llama4'"),
        ({"model_type": None}, "got None"),
        ({"hidden_size": "4096"}, "hidden_size: expected a whole number from 1 to 1000000000000; got '4096'"),
        ({"hidden_size": 4096.5}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "there is no hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected a whole number from 1 to 10000"),
        ({"num_attention_heads": 3}, "3 heads do not divide a width of 4096"),
        ({"num_key_value_heads": 5}, "5 key heads do not divide 32 heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false; got 'yes'"),
        ({"attention_bias": {}}, "got an object of 0"),
    ],
)  # fmt: skip
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^config.json: .*{message}"):
        model_of_config(RELEASED["llama-7b"] | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: read_model(folder), "cannot be read"),
        (lambda folder: read_model(folder / "nothing.json"), "cannot be read"),
        (lambda folder: _written(folder, b"[]"), "expected a JSON object, got list"),
        (lambda folder: _written(folder, b'{"model_type": "llama"'), "expected JSON"),
        (lambda folder: _written(folder, b'{"hidden_size": NaN}'), "no NaN"),
        (lambda folder: _written(folder, b"[" * 100_000), "nested too deeply"),
        (lambda folder: _written(folder, b" " * 2_000_000), "at most 1000000 bytes"),
    ],
)
def test_bad_files_are_named(call: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        call(tmp_path)


def _written(folder: Path, text: bytes) -> Any:
    (folder / "config.json").write_bytes(text)
    return read_model(folder)
