"""Parameters and states of adapters: PEFT's own on a small Llama, and sums by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from memsim.formats.huggingface import model_of_config
from memsim.memory.adapter_states import adapter_parameters, adapter_states
from memsim.parameters import parameters
from refimpl.errors import OptionError

SIZES = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
}  # fmt: skip
QUERIES = ["q_proj", "v_proj"]
ATTENTION = [*QUERIES, "k_proj", "o_proj"]
MODULES: dict[Any, list[str]] = {
    "queries and values": QUERIES,
    "attention": ATTENTION,
    "all": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
}
LLAMA = model_of_config({"model_type": "llama", **SIZES})


@pytest.mark.parametrize("targets", MODULES)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.filterwarnings("ignore")
def test_peft_trains_as_many(targets: Any, rank: int) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    built = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    adapted = peft.get_peft_model(built, peft.LoraConfig(r=rank, target_modules=MODULES[targets]))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(model=LLAMA, rank=rank, targets=targets).total == trained


@pytest.mark.parametrize("query_rank", [None, 6])
@pytest.mark.filterwarnings("ignore")
def test_peft_on_latent_attention(query_rank: int | None) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = SIZES | {
        "kv_lora_rank": 8, "q_lora_rank": query_rank, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
        "v_head_dim": 5, "first_k_dense_replace": 9, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 7, "num_key_value_heads": 4,
    }  # fmt: skip
    built = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**sizes))
    queries = ["q_proj"] if query_rank is None else ["q_a_proj", "q_b_proj"]
    latent = [*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    adapted = peft.get_peft_model(built, peft.LoraConfig(r=3, target_modules=latent))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    described = model_of_config({"model_type": "deepseek_v3", **sizes})
    assert adapter_parameters(model=described, rank=3, targets="attention").total == trained


@pytest.mark.parametrize(("base", "bits"), [("16bit", 16), ("int8", 8), ("nf4", Fraction(4127, 1000))])
def test_the_frozen_model_by_hand(base: Any, bits: Any) -> None:
    """Matrices of layers in the base's bits, embedding, head and norms in 16; adapters in ZeRO's 16 bytes."""
    layer = 24 * 10 * (4 + 2 * 2) + 4 * 10 * 24 + 3 * 24 * 40
    rest = 2 * 64 * 24 + 7 * 24
    assert parameters(model=LLAMA).total == 3 * layer + rest
    found = adapter_states(model=LLAMA, rank=2, base=base, ranks=4, stage=1)
    # QLoRA prints 4.127 bits a parameter: 4, an eighth of eight for scales, and their fp32 scales.
    assert float(found["frozen matrices"]) == pytest.approx(float(3 * layer * bits / 8), rel=1e-4)
    assert found["other weights"] == 2 * rest
    trained = adapter_parameters(model=LLAMA, rank=2).total
    adapters = found.total - found["frozen matrices"] - found["other weights"]
    assert adapters == 4 * trained + Fraction(12 * trained, 4)


def test_errors() -> None:
    with pytest.raises(OptionError, match="targets"):
        adapter_parameters(model=LLAMA, rank=1, targets="head")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="latent attention has no queries"):
        adapter_parameters(model="deepseek-v3", rank=1, targets="queries and values")
    with pytest.raises(OptionError, match="base"):
        adapter_states(model=LLAMA, rank=1, base="int2")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no part of it takes an adapter"):
        adapter_parameters(model="mamba-130m", rank=1)
