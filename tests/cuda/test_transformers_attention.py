"""Tiny random models give with our attention what they give with PyTorch's: prefill, generation, training."""

from __future__ import annotations

from typing import Any

import pytest

from cuda_backend.attention import attend as attending
from cuda_backend.transformers_attention import register
from refimpl import attention as reference
from refimpl.attention import scaled_dot_product_attention
from refimpl.errors import UnsupportedError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
CLOSE = 2e-5  # logits of size 1 in float32, after two layers

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
# A window of fewer tokens than any prompt here; Gemma's softcap, which SDPA refuses, bends scores of size 1.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "sdpa"),
    "mistral": ("Mistral", {"sliding_window": 4}, "sdpa"),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 4, "attn_logit_softcapping": 0.5, "head_dim": 8, "query_pre_attn_scalar": 1},
        "eager",
    ),
}
NAMES = tuple(MODELS)


def model(name: str, implementation: str) -> Any:
    kind, further, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **further, attn_implementation=implementation, initializer_range=0.3
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {name: (model(name, MODELS[name][2]), model(name, register())) for name in MODELS}


def tokens(count: int, seed: int = 1) -> Any:
    return torch.randint(1, 67, (2, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_padding(models: Any, name: str) -> None:
    ids = tokens(13)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :5] = 0
    right[1, -4:] = 0
    for mask in (None, left, right):
        with torch.no_grad():
            expected, found = (each(ids, attention_mask=mask).logits for each in models[name])
        live = torch.ones_like(ids).bool() if mask is None else mask.bool()
        assert (found - expected)[live].abs().max() < CLOSE * expected[live].abs().max()
        assert expected[live].abs().max() > 0.5


# Chunks, windows in some layers only, no causality, also in windows, a position bias, a fused projection.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama4": (
        "Llama4Text", "Llama4ForCausalLM",
        {"attention_chunk_size": 4, "num_hidden_layers": 4, "intermediate_size_mlp": 48, "head_dim": 8,
         "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "qwen2": (
        "Qwen2", "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", {"sliding_window": 4, "head_dim": 8}),
    "bert": ("Bert", "BertModel", {}),
    "modernbert": (
        "ModernBert", "ModernBertModel",
        {"local_attention": 4, "global_attn_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 1,
         "cls_token_id": 1, "sep_token_id": 1},
    ),
    "gemma3, both ways": (
        "Gemma3Text", "Gemma3TextModel",
        {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
         "use_bidirectional_attention": True},
    ),
    "t5": ("T5", "T5EncoderModel", {}),
    "gpt-neox": ("GPTNeoX", "GPTNeoXForCausalLM", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_at_prefill(name: str) -> None:
    kind, cls, further = OTHERS[name]
    found = []
    for implementation in ("sdpa", register()):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            **{**SIZES, **further}, attn_implementation=implementation, initializer_range=0.3
        )
        each = getattr(transformers, cls)(config).eval()
        with torch.no_grad():
            out = each(tokens(13))
        found.append(out.logits if hasattr(out, "logits") else out.last_hidden_state)
    assert (found[0] - found[1]).abs().max() < CLOSE * found[0].abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_windows_and_softcaps_count(models: Any, name: str) -> None:
    """Without them the logits are others: what agrees above is what the model asks for."""
    if name == "llama":
        return
    ids, plain = tokens(13), model(name, "frugal_attention")
    for layer in plain.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    plain.config.sliding_window = 64
    plain.config.layer_types = ["full_attention"] * 2
    with torch.no_grad():
        assert (plain(ids).logits - models[name][1](ids).logits).abs().max() > 100 * CLOSE


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache(models: Any, name: str, cache: str | None) -> None:
    ids = tokens(7, 2)
    padded = torch.ones_like(ids)
    padded[1, :3] = 0
    for mask in (torch.ones_like(ids), padded):
        settings: Any = {
            "max_new_tokens": 8, "do_sample": False, "output_logits": True, "attention_mask": mask,
            "return_dict_in_generate": True, "cache_implementation": cache, "disable_compile": True,
        }  # fmt: skip
        expected, found = (each.generate(ids, **settings) for each in models[name])
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert (ours - theirs).abs().max() < CLOSE * theirs.abs().max()


def test_a_long_cache_is_decoded_in_parts(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of each step after the prompt, where nothing is padding."""
    monkeypatch.setattr(attending, "LONG", 8)
    calls: list[Any] = []
    decode = reference.split_kv_attention

    def counted(*arrays: Any, **options: Any) -> Any:
        calls.append(arrays[1].shape[1])
        return decode(*arrays, **options)

    monkeypatch.setattr(reference, "split_kv_attention", counted)
    settings: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found, expected = (each.generate(tokens(9), **settings) for each in reversed(models["llama"]))
    assert torch.equal(found, expected)
    assert calls == [10, 10, 11, 11, 12, 12]


@pytest.mark.parametrize("name", NAMES)
def test_training_has_the_same_gradients(models: Any, name: str) -> None:
    ids = tokens(11, 3)
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    labels = ids.masked_fill(padded == 0, -100)
    labels[
        0, 4
    ] = -100  # the token before it is padding and sees nothing: 0 here, an average where it is eager
    for each in models[name]:
        each.zero_grad()
        each(ids, attention_mask=padded, labels=labels).loss.backward()
    theirs, ours = (dict(each.named_parameters()) for each in models[name])
    for parameter, expected in theirs.items():
        error = (ours[parameter].grad - expected.grad).abs().max()
        assert error < 5 * CLOSE * max(1.0, float(expected.grad.abs().max())), parameter
    assert theirs["model.layers.0.self_attn.k_proj.weight"].grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_window_needs_no_mask_of_all_scores(
    models: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at prefill nor while the cache holds no more than the window; padding does."""
    import cuda_backend.torch_ops

    given: list[Any] = []
    run = cuda_backend.torch_ops.masked_attention

    def seen(*arrays: Any, **options: Any) -> Any:
        given.append((options.get("attn_mask") is not None, options.get("window")))
        return run(*arrays, **options)

    monkeypatch.setattr(cuda_backend.torch_ops, "masked_attention", seen)
    ids = tokens(13)
    with torch.no_grad():
        models[name][1](ids)
    assert given == [(False, 4), (False, 4 if name == "mistral" else None)]
    given.clear()
    models[name][1].generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [mask for mask, _ in given] == [False] * 6
    given.clear()
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    with torch.no_grad():
        models[name][1](ids, attention_mask=padded)
    assert [mask for mask, _ in given] == [True] * 2


def test_our_attention_was_the_one_that_ran(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arrays: Any, **options: Any) -> Any:
        calls.append(options)
        return scaled_dot_product_attention(*arrays, **options)

    monkeypatch.setattr(reference, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        models["llama"][1](torch.ones(1, 3, dtype=torch.long))
    assert len(calls) == 2
    assert all(options["causal"] == "top_left" for options in calls)


def test_weights_are_refused_not_left_out(models: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"output_attentions.*eager"):
        models["llama"][1](tokens(3), output_attentions=True)
    with torch.no_grad():
        models["llama"][1](tokens(3), output_attentions=False)


def test_t5gemmas_encoder_looks_both_ways_in_its_window() -> None:
    """It has no SDPA: eager attention is what it is held to."""
    sizes = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0}
    found = []
    for implementation in ("eager", register()):
        torch.manual_seed(0)
        parts = [
            transformers.T5GemmaModuleConfig(
                **sizes, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
            ).to_dict()
            for _ in range(2)
        ]
        config = transformers.T5GemmaConfig(
            encoder=parts[0], decoder=parts[1], is_encoder_decoder=False, initializer_range=0.3,
            attn_implementation=implementation,
        )  # fmt: skip
        with torch.no_grad():
            found.append(transformers.T5GemmaEncoderModel(config).eval()(tokens(13)).last_hidden_state)
    assert (found[0] - found[1]).abs().max() < CLOSE * found[0].abs().max()


def test_dropout_is_in_the_graph() -> None:
    """No break; the seed is drawn in each call, as without the compiler, and the gradient has the same."""
    ids = tokens(7)

    def built() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **SIZES, attention_dropout=0.4, attn_implementation=register(), initializer_range=0.3
        )
        return transformers.LlamaForCausalLM(config).train()

    one, other = built(), built()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    losses = []
    for each in (one, compiled):
        torch.manual_seed(5)
        each(ids, use_cache=False).logits.square().sum().backward()
        with torch.no_grad():
            losses.append([float(each(ids, labels=ids, use_cache=False).loss) for _ in range(2)])
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < CLOSE * max(1.0, float(a.grad.abs().max()))
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
    assert abs(losses[0][0] - losses[0][1]) > 100 * CLOSE, "other seeds drop other weights"


def test_a_compiled_model_has_one_graph() -> None:
    """Prefill with padding, in training: no break, and the gradients that it has uncompiled."""
    ids = tokens(7)
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    one, other = model("mistral", register()), model("mistral", register())
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for each in (one, compiled):
        each(ids, attention_mask=padded, use_cache=False).logits[:, -1].square().sum().backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < CLOSE * max(1.0, float(a.grad.abs().max()))
