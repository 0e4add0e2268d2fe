"""A tiny random Llama computes with our attention what it does with SDPA: prefill, padding, generation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend.transformers_attention import frugal_attention, register
from refimpl.errors import UnsupportedError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
CLOSE = 2e-5  # logits of size 1 in float32, after two layers


def llama(attention: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return llama("sdpa"), llama(register())


def test_prefill_and_padding(models: tuple[Any, Any]) -> None:
    ids = torch.randint(1, 67, (2, 13), generator=torch.Generator().manual_seed(1))
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    for mask in (None, padded):
        with torch.no_grad():
            expected, found = (model(ids, attention_mask=mask).logits for model in models)
        live = torch.ones_like(ids).bool() if mask is None else padded.bool()
        assert (found - expected)[live].abs().max() < CLOSE
        assert expected[live].abs().max() > 0.05


def test_generation_with_a_cache(models: tuple[Any, Any]) -> None:
    ids = torch.randint(1, 67, (2, 7), generator=torch.Generator().manual_seed(2))
    settings: Any = {
        "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    expected, found = (model.generate(ids, **settings) for model in models)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() < CLOSE


def test_our_attention_was_the_one_that_ran(models: tuple[Any, Any], monkeypatch: Any) -> None:
    import refimpl.attention

    calls = []
    reference = refimpl.attention.scaled_dot_product_attention
    monkeypatch.setattr(
        refimpl.attention,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(a) or reference(*a, **k),
    )
    with torch.no_grad():
        models[1](torch.ones(1, 3, dtype=torch.long))
    assert len(calls) == 2


def test_training_is_refused() -> None:
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no gradient"):
        frugal_attention(SimpleNamespace(is_causal=True), x, x, x)
