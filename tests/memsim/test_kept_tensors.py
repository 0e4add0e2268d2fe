"""What LayerNorm's families, encoders with decoders, and gates keep: as autograd saves it, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from memsim.formats.huggingface import model_of_config
from memsim.formula import evaluate
from memsim.memory.activations import activations
from memsim.memory.kept_tensors import Keeping, kept_by
from memsim.memory.korthikanti import korthikanti_activations
from memsim.memory.rank_model import rank_model
from memsim.model import Part
from memsim.parameters import parameters
from tests.memsim.test_training_memory import TOKENS, _saved, _size

SMALL = {"vocab_size": 320, "max_position_embeddings": 200}
NONE = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
OPT = {**SMALL, **NONE, "hidden_size": 64, "ffn_dim": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    **SMALL, **NONE, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_ffn_dim": 172, "decoder_ffn_dim": 100, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 320, "d_model": 64, "d_kv": 16, "d_ff": 172, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "dropout_rate": 0.0,
}  # fmt: skip
# What T5 keeps besides: indices of relative positions and a mask, of each half, and the decoder's table of
# them; the scores of its two cross-attentions, which have no table, it leaves to the flash kernel.
T5_TABLES = 2 * (8 + 1) * TOKENS**2 + 4 * 4 * TOKENS**2 - 2 * (4 * 4 * TOKENS**2 - 4 * 4 * TOKENS)


@pytest.mark.parametrize(
    ("family", "sizes", "attention", "besides"),
    [
        ("OPT", {**OPT, "word_embed_proj_dim": 64}, "flash", 8 * TOKENS + 8 * (TOKENS + 1)),
        ("OPT", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, "flash",
         8 * TOKENS + 8 * (TOKENS + 1)),
        ("Bart", BART, "flash", 2 * 8 * TOKENS),
        ("T5", T5, "standard", T5_TABLES),
        ("T5", {**T5, "feed_forward_proj": "gated-silu"}, "standard", T5_TABLES),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_families_in_fp32_keep_it_to_the_byte(
    family: str, sizes: dict[str, Any], attention: str, besides: int
) -> None:
    """`besides` are ids of positions, labels, and tables of positions; four bytes count the loss."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**sizes)
    auto = transformers.AutoModelForCausalLM if family == "OPT" else transformers.AutoModelForSeq2SeqLM
    built = auto.from_config(config)
    built.train()
    ids = torch.zeros((1, TOKENS), dtype=torch.int64)
    given = {"input_ids": ids, "labels": ids} | ({} if family == "OPT" else {"decoder_input_ids": ids})
    saved = _saved(lambda: built(**given, use_cache=False), built.parameters())
    ours = activations(
        model=model_of_config(config.to_dict()), batch=1, sequence=TOKENS, itemsize=4, attention=attention,
        fused_norm=family != "T5",
    )  # fmt: skip
    assert _size(saved) == ours.total + besides + 4


def test_a_gate_of_shared_experts_keeps_what_it_weighs() -> None:
    torch = pytest.importorskip("torch")
    tokens, width = 30, 12
    y, shared = (torch.randn((tokens, width), dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.randn((width, 1), dtype=torch.bfloat16, requires_grad=True)
    made = shared * 1.0  # a tensor that only the product keeps
    saved = _saved(lambda: torch.sigmoid(y @ weight) * made, [y, weight])
    part = Part("linear", "shared gate", {"outputs": 1})
    letters = {"T": tokens, "e": 2}
    ours = sum(int(evaluate(k.formula, {**letters, **k.sizes})) for k in kept_by(part, width, Keeping()))
    assert _size(saved) == ours


def test_dropout_of_the_embedding_is_korthikantis() -> None:
    shape: dict[str, Any] = {"batch": 2, "sequence": 64}
    with_mask, without = (
        activations(model="gpt3-175b", **shape, dropout=dropout)["embeddings: tokens"]
        for dropout in (True, False)
    )
    paper = korthikanti_activations(hidden=12288, layers=96, heads=96, vocabulary=50257, **shape)
    assert with_mask - without == paper["embedding's dropout"] == 2 * 64 * 12288


def test_embedding_s_dropout_of_every_waiting_micro_batch() -> None:
    """Korthikanti et al., section 4.3: s b h p / t, as p micro-batches wait; the head in the last stage."""
    shape: dict[str, Any] = {"hidden": 64, "batch": 2, "sequence": 8, "layers": 12, "heads": 4, "tensor": 2}
    found = korthikanti_activations(**shape, pipeline=3, sequence_parallel=True, vocabulary=100)
    assert found["embedding's dropout"] == 8 * 2 * 64 * 3 // 2
    assert len(found.terms) == 2
    whole = korthikanti_activations(**shape, vocabulary=100)
    assert whole["final norm and head's input"] == 4 * 8 * 2 * 64
    assert whole["logits in fp32"] == 4 * 8 * 2 * 100 // 2


def test_ranks_norm_their_own_heads() -> None:
    """Each head's queries and keys are normed where the head is: half of them on each of two ranks."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 60, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32,
    }  # fmt: skip
    described = model_of_config({"model_type": "qwen3", **sizes})
    for tensor in (1, 2):
        kept = activations(model=described, batch=1, sequence=8, tensor=tensor)
        for name, heads in (("query", 4), ("key", 2)):
            assert kept[f"block: {name} norm"] == 8 * (2 * 16 + 4) * heads // tensor
    assert parameters(model=rank_model(described, tensor=2)).terms[3].value == 16


def test_jamba_s_mixer_keeps_what_its_norms_split() -> None:
    """SelectiveScanFn's tensors for T 5, i 8192, n 16, and what stands between its three kernels."""
    tokens, i, n = 5, 8192, 16
    scan = 2 * tokens * (i + i + i + i + n + n) + 4 * i * n + 4 * i * 2 * n  # u, Δ, z, out, B, C; A; states
    outside = 2 * tokens * (i + i) + 4 * i * n  # the convolution's input, the gated output; an exponential
    kept = activations(model="jamba", batch=1, sequence=tokens)
    layers = sum(item.value for item in kept.terms if item.name.endswith(": mamba"))
    assert layers == 28 * (scan + outside)
