"""Whole models of the package transformers, tiny and with random weights, against `decoder_logits`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.transformer import DecoderConfig, decoder_logits, decoder_shapes, rms_norm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, M, L, H, F, T = 23, 16, 2, 4, 24, 13


def _compare(model: Any, params: dict[str, Any], config: DecoderConfig) -> None:
    assert {name: array.shape for name, array in params.items()} == decoder_shapes(config)
    tokens = np.random.default_rng(1).integers(0, V, (2, T))
    with torch.no_grad():
        expected = model.double().eval()(torch.from_numpy(tokens)).logits.numpy()
    logits = decoder_logits(params, tokens, config=config)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)  # their angles are in float32


def _state(model: Any) -> dict[str, Any]:
    """Return the weights in float64, away from their first values, and put them back into the model."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.double().parameters():  # tied ones once
            parameter += 0.1 * torch.from_numpy(rng.standard_normal(parameter.shape))
    return {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool) -> None:
    made = transformers.LlamaConfig(
        vocab_size=V, hidden_size=M, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(made)
    state = _state(model)
    params = {"embedding": state["model.embed_tokens.weight"]}
    places = {
        "w_q": "self_attn.q_proj", "w_k": "self_attn.k_proj", "w_v": "self_attn.v_proj",
        "w_o": "self_attn.o_proj",
        "w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj", "w_down": "mlp.down_proj",
        "gamma_1": "input_layernorm", "gamma_2": "post_attention_layernorm",
    }  # fmt: skip
    for layer in range(L):
        for name, place in places.items():
            params[f"layers.{layer}.{name}"] = state[f"model.layers.{layer}.{place}.weight"].T
    params["gamma"] = state["model.norm.weight"]
    if not tied:
        params["head"] = state["lm_head.weight"]
    config = DecoderConfig(
        vocabulary=V, width=M, layers=L, num_heads=H, num_kv_heads=2, hidden=F, eps=1e-5, tied=tied
    )
    _compare(model, params, config)


def _gpt_block(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    q, k, v = np.split(state[f"{prefix}.attn.c_attn.weight"], 3, axis=-1)
    b_q, b_k, b_v = np.split(state[f"{prefix}.attn.c_attn.bias"], 3)
    return {
        "w_q": q, "w_k": k, "w_v": v, "b_q": b_q, "b_k": b_k, "b_v": b_v,
        "w_o": state[f"{prefix}.attn.c_proj.weight"], "b_o": state[f"{prefix}.attn.c_proj.bias"],
        "w_1": state[f"{prefix}.mlp.c_fc.weight"], "b_1": state[f"{prefix}.mlp.c_fc.bias"],
        "w_2": state[f"{prefix}.mlp.c_proj.weight"], "b_2": state[f"{prefix}.mlp.c_proj.bias"],
        "gamma_1": state[f"{prefix}.ln_1.weight"], "beta_1": state[f"{prefix}.ln_1.bias"],
        "gamma_2": state[f"{prefix}.ln_2.weight"], "beta_2": state[f"{prefix}.ln_2.bias"],
    }  # fmt: skip


def test_gpt2() -> None:
    made = transformers.GPT2Config(vocab_size=V, n_positions=20, n_embd=M, n_layer=L, n_head=H, n_inner=F)
    model = transformers.GPT2LMHeadModel(made)
    state = _state(model)
    params = {"embedding": state["transformer.wte.weight"], "positions": state["transformer.wpe.weight"]}
    for layer in range(L):
        block = _gpt_block(state, f"transformer.h.{layer}")
        params |= {f"layers.{layer}.{name}": array for name, array in block.items()}
    params |= {"gamma": state["transformer.ln_f.weight"], "beta": state["transformer.ln_f.bias"]}
    config = DecoderConfig(
        vocabulary=V, width=M, layers=L, num_heads=H, hidden=F, positions="learned", max_length=20,
        norm="layer_norm", activation="gelu_tanh", gated=False, biases=True,
    )  # fmt: skip
    _compare(model, params, config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_llama_rounds_before_the_gain(dtype: str) -> None:
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    x, gamma = rng.standard_normal((50, 32)).astype(kind), (1 + rng.standard_normal(32)).astype(kind)
    llama = transformers.models.llama.modeling_llama
    wide_x, wide_gamma = (torch.from_numpy(a.astype(np.float32)) for a in (x, gamma))
    narrow = getattr(torch, dtype)
    norm = llama.LlamaRMSNorm(32, eps=1e-5).to(narrow)
    with torch.no_grad():
        norm.weight.copy_(wide_gamma.to(narrow))
        expected = norm(wide_x.to(narrow)).float().numpy()
        other = torch.nn.functional.rms_norm(wide_x.to(narrow), (32,), wide_gamma.to(narrow), 1e-5)
    found = {c: rms_norm(x, gamma, eps=1e-5, convention=c).astype(np.float32) for c in ("llama", "torch")}
    assert np.mean(found["llama"] != expected) < 0.01  # rsqrt of float32 may differ in the last bit
    assert np.mean(found["torch"] != other.float().numpy()) < 0.01
    assert np.mean(found["llama"] != found["torch"]) > 0.1
