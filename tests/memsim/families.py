"""Small configurations of every family, drawn, and what transformers builds of them on the meta device."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

# What the family of a model is called in transformers, and the settings that change what it holds: each a
# list of values to choose from.  Sizes that all share are drawn in `_settings`.
FAMILIES: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "bamba": ("Bamba", {
        "attn_layer_indices": [[], [1, 3]], "mamba_n_heads": [8], "mamba_d_head": ["auto"],
        "mamba_n_groups": [1, 2], "mamba_d_state": [3], "mamba_d_conv": [3], "mamba_expand": [2],
        "mamba_conv_bias": [True, False], "mamba_proj_bias": [False, True], "attention_bias": [False, True],
        "mlp_bias": [False, True], "head_dim": [None],
    }),
    "bart": ("Bart", {"scale_embedding": [True, False]}),
    "bert": ("Bert", {"type_vocab_size": [1, 2]}),
    "bloom": ("Bloom", {"tie_word_embeddings": [True, False]}),
    "codegen": ("CodeGen", {"n_inner": [None, 20], "rotary_dim": [2]}),
    "cohere": ("Cohere", {"use_qk_norm": [False, True], "attention_bias": [False, True]}),
    "cohere2": ("Cohere2", {"head_dim": [6], "attention_bias": [False, True]}),
    "dbrx": ("Dbrx", {}),
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
    "distilbert": ("DistilBert", {}),
    "ernie4_5": ("Ernie4_5", {"head_dim": [6], "use_bias": [False, True]}),
    "exaone4": ("Exaone4", {"head_dim": [None, 6]}),
    "falcon": ("Falcon", {
        "new_decoder_architecture": [False, True], "multi_query": [False, True], "num_kv_heads": [2],
        "parallel_attn": [False, True], "bias": [False, True], "num_ln_in_parallel_attn": [None, 1, 2],
        "ffn_hidden_size": [None, 40], "alibi": [False, True],
    }),
    "falcon_mamba": ("FalconMamba", {
        "state_size": [3], "conv_kernel": [4], "expand": [2, 3], "time_step_rank": ["auto", 5],
        "use_bias": [False, True],
    }),
    "gemma": ("Gemma", {"head_dim": [6], "attention_bias": [False, True]}),
    "gemma2": ("Gemma2", {"head_dim": [6], "attention_bias": [False, True]}),
    "gemma3_text": ("Gemma3Text", {"head_dim": [6], "tie_word_embeddings": [True, False]}),
    "glm": ("Glm", {"head_dim": [6], "pad_token_id": [0], "attention_bias": [False, True]}),
    "glm4": ("Glm4", {"head_dim": [6], "pad_token_id": [0], "attention_bias": [False, True]}),
    "gpt2": ("GPT2", {"n_inner": [None, 20], "tie_word_embeddings": [True, False]}),
    "gpt_bigcode": ("GPTBigCode", {"multi_query": [True, False], "n_inner": [None, 20]}),
    "gpt_neo": ("GPTNeo", {"intermediate_size": [None, 20], "attention_types": [[[["global"], 4]]]}),
    "gpt_neox": ("GPTNeoX", {"attention_bias": [True, False], "use_parallel_residual": [True, False]}),
    "gpt_oss": ("GptOss", {
        "head_dim": [6], "num_local_experts": [4], "num_experts_per_tok": [2],
        "attention_bias": [True, False],
    }),
    "gptj": ("GPTJ", {"n_inner": [None, 20], "rotary_dim": [2]}),
    "granite": ("Granite", {"attention_bias": [False, True], "mlp_bias": [False, True]}),
    "granitemoe": ("GraniteMoe", {
        "num_local_experts": [3], "num_experts_per_tok": [2], "attention_bias": [False, True],
    }),
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
    "llama4_text": ("Llama4Text", {
        "head_dim": [6], "num_local_experts": [3], "interleave_moe_layer_step": [1, 2],
        "moe_layers": [None, [0, 3]], "intermediate_size_mlp": [11], "attention_bias": [False, True],
    }),
    "mamba": ("Mamba", {
        "state_size": [3], "conv_kernel": [4], "expand": [2, 3], "time_step_rank": ["auto", 5],
        "use_bias": [False, True], "tie_word_embeddings": [True, False],
    }),
    "mamba2": ("Mamba2", {
        "state_size": [3], "conv_kernel": [4], "expand": [2], "n_groups": [1, 2], "num_heads": [8],
        "use_bias": [False, True], "use_conv_bias": [True, False], "tie_word_embeddings": [True, False],
    }),
    "mbart": ("MBart", {"scale_embedding": [True, False]}),
    "mistral": ("Mistral", {"head_dim": [None, 6], "sliding_window": [None, 16]}),
    "mixtral": ("Mixtral", {"num_local_experts": [3], "num_experts_per_tok": [2], "head_dim": [None, 6]}),
    "mpt": ("Mpt", {}),
    "mt5": ("MT5", {"feed_forward_proj": ["relu", "gated-gelu"]}),
    "nemotron": ("Nemotron", {"attention_bias": [False, True], "mlp_bias": [False, True]}),
    "olmo": ("Olmo", {"attention_bias": [False, True]}),
    "olmo2": ("Olmo2", {"attention_bias": [False, True]}),
    "olmo3": ("Olmo3", {"attention_bias": [False, True]}),
    "olmoe": ("Olmoe", {
        "num_experts": [4], "num_experts_per_tok": [2], "attention_bias": [False, True],
    }),
    "opt": ("OPT", {
        "word_embed_proj_dim": [None, 10], "do_layer_norm_before": [True, False],
        "enable_bias": [True, False], "_remove_final_layer_norm": [False, True],
    }),
    "phi": ("Phi", {"qk_layernorm": [False, True]}),
    "phi3": ("Phi3", {"pad_token_id": [0]}),
    "phimoe": ("Phimoe", {
        "num_local_experts": [3], "num_experts_per_tok": [2], "attention_bias": [False, True],
        "lm_head_bias": [False, True],
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
    "roberta": ("Roberta", {"type_vocab_size": [1, 2]}),
    "smollm3": ("SmolLM3", {"attention_bias": [False, True], "mlp_bias": [False, True], "pad_token_id": [0]}),
    "stablelm": ("StableLm", {
        "use_qkv_bias": [False, True], "qk_layernorm": [False, True], "use_parallel_residual": [False, True],
    }),
    "starcoder2": ("Starcoder2", {"use_bias": [True, False], "tie_word_embeddings": [True, False]}),
    "t5": ("T5", {"feed_forward_proj": ["relu", "gated-gelu"]}),
    "umt5": ("UMT5", {"feed_forward_proj": ["relu", "gated-gelu"]}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": [1, 2]}),
}  # fmt: skip
# What the families after T5, BART and others call the sizes that all share.
WIDTH, LAYERS, HEADS, INNER = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
GPT_NAMES = {WIDTH: "n_embd", LAYERS: "n_layer", HEADS: "n_head", "max_position_embeddings": "n_positions"}
T5_NAMES = {WIDTH: "d_model", LAYERS: "num_layers", HEADS: "num_heads", INNER: "d_ff"}
BART_NAMES = {
    WIDTH: "d_model", LAYERS: "encoder_layers", HEADS: "encoder_attention_heads", INNER: "encoder_ffn_dim",
}  # fmt: skip
DBRX_NAMES = {WIDTH: "d_model", LAYERS: "n_layers", HEADS: "n_heads"}
NAMES: dict[str, dict[str, str]] = {
    "bart": BART_NAMES, "mbart": BART_NAMES, "t5": T5_NAMES, "mt5": T5_NAMES, "umt5": T5_NAMES,
    "gpt2": GPT_NAMES, "gpt_bigcode": GPT_NAMES, "gptj": GPT_NAMES, "codegen": GPT_NAMES,
    "bloom": {LAYERS: "n_layer", HEADS: "n_head"}, "opt": {INNER: "ffn_dim"},
    "mpt": DBRX_NAMES, "dbrx": DBRX_NAMES, "gpt_neo": {LAYERS: "num_layers", HEADS: "num_heads"},
    "distilbert": {WIDTH: "dim", LAYERS: "n_layers", HEADS: "n_heads", INNER: "hidden_dim"},
}  # fmt: skip
ENCODERS = ("bert", "distilbert", "roberta", "xlm-roberta")
WITH_DECODERS = ("bart", "mbart", "mt5", "t5", "umt5")
WITHOUT_KEY_HEADS = (
    *NAMES, *ENCODERS, "bloom", "falcon", "falcon_mamba", "gpt_neox", "mamba", "mamba2",
)  # fmt: skip


def drawn_settings(kind: str, seed: int) -> dict[str, Any]:
    """Return small sizes, and one choice for every setting of the family."""
    rng = np.random.default_rng(seed)
    heads = 4
    width = heads * int(rng.integers(2, 5)) * 2
    shared: dict[str, Any] = {
        "vocab_size": int(rng.integers(3, 40)),
        WIDTH: width,
        LAYERS: int(rng.integers(4, 7)),
        HEADS: heads,
        INNER: int(rng.integers(5, 40)),
        "max_position_embeddings": int(rng.integers(8, 30)),
    }
    if kind not in WITHOUT_KEY_HEADS:
        shared["num_key_value_heads"] = int(rng.choice((1, 2, 4)))
    if kind in (
        "mamba",
        "mamba2",
        "falcon_mamba",
        "gpt2",
        "gpt_bigcode",
        "gptj",
        "codegen",
        "bloom",
        "mpt",
        "dbrx",
    ):
        del shared[INNER]
    shared = {NAMES.get(kind, {}).get(name, name): value for name, value in shared.items()}
    chosen = {name: values[rng.integers(len(values))] for name, values in FAMILIES[kind][1].items()}
    if kind == "jamba":
        chosen["num_experts_per_tok"] = 1
        chosen["attn_layer_offset"] %= chosen["attn_layer_period"]
        chosen["expert_layer_offset"] %= chosen["expert_layer_period"]
    elif kind in ("bart", "mbart"):
        shared |= {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 9}
    elif kind in ("t5", "mt5", "umt5"):
        shared |= {
            "d_kv": int(rng.integers(3, 9)),
            "num_decoder_layers": 3,
            "relative_attention_num_buckets": 6,
        }
    elif kind == "gpt_neo":
        chosen["attention_types"] = [[["global"], shared["num_layers"]]]
    elif kind == "mamba2":
        chosen["head_dim"] = 2 * width // 8
    elif kind == "dbrx":
        shared |= {
            "attn_config": {"kv_n_heads": int(rng.choice((1, 2, 4))), "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 7, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": width},
        }
    return shared | {
        name: value for name, value in chosen.items() if value is not None or name == "q_lora_rank"
    }


def built(config: Any) -> int:
    """Return how many parameters transformers makes of a configuration."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    auto = transformers.AutoModelForCausalLM
    if config.model_type in ENCODERS:
        auto = transformers.AutoModel
    elif config.model_type in WITH_DECODERS:
        auto = transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(p.numel() for p in auto.from_config(config).parameters())
