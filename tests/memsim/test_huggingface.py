"""Descriptions from ``config.json``: transformers' own modules, tensor by tensor, on the meta device."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memsim import data_files
from memsim.formats.huggingface import MODEL_TYPES, model_of_config, read_model
from memsim.model import model
from memsim.moe import activated_parameters
from memsim.parameters import parameters
from refimpl.errors import OptionError
from refimpl.safetensors_format import CheckpointError
from tests.memsim.families import FAMILIES, NAMES, built, drawn_settings


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_every_family_as_transformers_builds_it(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for seed in range(5):
        config = getattr(transformers, f"{FAMILIES[kind][0]}Config")(**drawn_settings(kind, seed))
        config.save_pretrained(tmp_path)
        found = parameters(model=read_model(tmp_path))
        assert found.total == built(config), (seed, (tmp_path / "config.json").read_text())
        # What its maker says in one line, without what the file leaves to defaults.
        assert parameters(model=model_of_config(config.to_dict())).total == found.total


# Where a file says nothing, what transformers' class assumes holds; but the sizes of a model must be given.
REFUSED = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "moe_intermediate_size", "shared_expert_intermediate_size",
    "intermediate_size_mlp", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim",
}  # fmt: skip


# An assumption need not fit what the file says; and DeepSeek-V2's class assumes no number of active experts.
WHY = re.compile(
    r"heads do not divide|heads to make up|num_experts_per_tok: expected|there is no num_experts_per_tok"
)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_a_silent_file_means_what_transformers_makes_of_it(kind: str) -> None:
    """Every setting is left out, and then null: the answer is transformers', or a refusal that says why."""
    transformers = pytest.importorskip("transformers")
    sizes = REFUSED | set(NAMES.get(kind, {}).values())
    whole = drawn_settings(kind, 1)
    for name in whole:
        for left in ({k: v for k, v in whole.items() if k != name}, whole | {name: None}):
            ours = _answer(left | {"model_type": kind})
            if isinstance(ours, str):
                assert name in sizes or left.get(name, 1) is None or WHY.search(ours), (name, ours)
                continue
            try:
                theirs = built(getattr(transformers, f"{FAMILIES[kind][0]}Config")(**left))
            except Exception:  # whatever it says, it builds no such model
                continue
            assert ours == theirs, (name, name in left)


def _answer(config: dict[str, Any]) -> int | str:
    """Return the number of parameters, or why there is none."""
    try:
        return int(parameters(model=model_of_config(config)).total)
    except OptionError as error:
        return str(error)


def test_assumptions_are_the_classes_own() -> None:
    transformers = pytest.importorskip("transformers")
    assumed = data_files.read("huggingface_defaults")
    for kind, values in assumed.items():
        if kind != "source":
            fields = getattr(transformers, f"{FAMILIES[kind][0]}Config").__dataclass_fields__
            assert {name: fields[name].default for name in values} == values, kind


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


def _t5(layers: int, width: int, heads: int, wide: int, inner: int) -> dict[str, Any]:
    return {
        "model_type": "t5", "num_layers": layers, "d_model": width, "num_heads": heads, "d_kv": wide,
        "d_ff": inner, "vocab_size": 32128, "relative_attention_num_buckets": 32,
    }  # fmt: skip


def _bart(layers: int, width: int, heads: int) -> dict[str, Any]:
    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}.items()
    }
    table = {"vocab_size": 50265, "max_position_embeddings": 1024}
    return {"model_type": "bart", "d_model": width, **table, **halves}


def _mamba(layers: int, width: int) -> dict[str, Any]:
    return {
        "model_type": "mamba", "num_hidden_layers": layers, "hidden_size": width, "vocab_size": 50280,
        "state_size": 16, "expand": 2, "conv_kernel": 4, "time_step_rank": width // 16,
    }  # fmt: skip


RELEASED: dict[str, dict[str, Any]] = {
    "t5-small": _t5(6, 512, 8, 64, 2048),
    "t5-base": _t5(12, 768, 12, 64, 3072),
    "t5-large": _t5(24, 1024, 16, 64, 4096),
    "t5-3b": _t5(24, 1024, 32, 128, 16384),
    "t5-11b": _t5(24, 1024, 128, 128, 65536),
    "bart-base": _bart(6, 768, 12),
    "bart-large": _bart(12, 1024, 16),
    "mamba-130m": _mamba(24, 768),
    "mamba-2.8b": _mamba(64, 2560),
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
    assert parameters(model=name).total == built(getattr(transformers, f"{family}Config")(**values))


def test_public_counts_of_the_newer_models() -> None:
    # DeepSeek-V3's README_WEIGHTS.md prints 671B, and 36.6B activated with the head but not the embedding.
    assert parameters(model="deepseek-v3").total == 671_026_404_352
    activated = activated_parameters(model="deepseek-v3")
    assert round((activated.total - activated["embeddings: tokens"]) / 1e9, 1) == 36.6
    assert parameters(model="mistral-7b").total == 7_241_732_096


def test_sizes_of_encoders_with_decoders() -> None:
    """T5 1.1 and FLAN have heads of their own, in the files; transformers 5 builds them tied regardless."""
    base = {
        "model_type": "t5", "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12,
        "vocab_size": 32128,
    }  # fmt: skip
    assert parameters(model=model_of_config(base)).total == 222_903_552
    flan = base | {"d_ff": 2048, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert parameters(model=model_of_config(flan)).total == 247_577_856


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
        ({"model_type": "llama4"}, "one of 59 families, such as llama, llama4_text, glm4; got 'llama4'$"),
        ({"model_type": "gemma3", "text_config": {}}, "gemma, .*; the file has a text_config, which"),
        ({"model_type": None}, "got None"),
        ({"hidden_size": "4096"}, "hidden_size: expected a whole number from 1 to 1000000000000; got '4096'"),
        ({"hidden_size": 4096.5}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "there is no hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected a whole number from 1 to 2500"),
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
