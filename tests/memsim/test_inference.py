"""Inference against counts written out by hand, limits, and what must rise or fall."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.inference import (
    Serving,
    batch_limit,
    bits_per_weight,
    inference,
    kv_cache,
    quantized_weights,
    served_speculation,
    weight_formats,
)
from memsim.parameters import parameters
from memsim.speculative import speculative_speedup
from refimpl.errors import OptionError, UnknownNameError

LLAMA = Serving("llama-2-7b", "a100-80gb", prompt=1024, generated=256)


@pytest.mark.parametrize(
    ("model", "layers", "elements"),
    [
        ("llama-2-7b", 32, 2 * 32 * 128),
        ("llama-2-70b", 80, 2 * 8 * 128),
        ("llama-3-8b", 32, 2 * 8 * 128),
        ("llama-3.1-405b", 126, 2 * 8 * 128),
        ("gpt2", 12, 2 * 768),
        ("deepseek-v2", 60, 512 + 64),
    ],
)
def test_a_token_in_the_cache(model: str, layers: int, elements: int) -> None:
    assert kv_cache(model=model).total == 2 * layers * elements
    assert kv_cache(model=model, tokens=7, itemsize=1).total == 7 * layers * elements


# Bits of whole blocks, counted from their layout: (bits of a block, weights in it).
BLOCKS = {
    "q4_0": (18 * 8, 32),
    "q8_0": (34 * 8, 32),
    "q4_k": (144 * 8, 256),
    "q5_k": (176 * 8, 256),
    "q6_k": (210 * 8, 256),
    "nf4": (64 * 4 + 32, 64),
    "nf4-double": (256 * (64 * 4 + 8) + 32, 256 * 64),
    "gptq-g128": (128 * 4 + 16 + 4, 128),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_bits_of_a_weight(name: str) -> None:
    bits, weights = BLOCKS[name]
    assert bits_per_weight(format=name).total == Fraction(bits, weights)
    assert quantized_weights(parameters=weights, bits=Fraction(bits, weights)).total * 8 == bits


def test_one_sequence_reads_every_weight() -> None:
    """Llama-2-7B on one A100: all products with weights are bound by memory, all scores by the cache."""
    served = inference(LLAMA)
    hbm, layers, ffn, width = 2_039_000_000_000, 32, 11008, 4096
    weights = layers * (4 * width**2 + 3 * width * ffn)
    assert served.decode["products with weights, a step of decoding"] == Fraction(2 * weights, hbm)
    assert served.decode["head, a step of decoding"] == Fraction(2 * 32000 * width, hbm)
    context = 1024 + Fraction(257, 2)
    cache = (context + 1) * 2 * width * 2 * layers
    assert served.decode["scores and values from the cache, a step of decoding"] == cache / hbm
    # The prompt is bound by computation: 2 operations a weight and token, half of the scores.
    assert served.prefill["products with weights, the prompt"] == Fraction(2 * weights * 1024, 312 * 10**12)
    scores = Fraction(4 * 1024**2 * width * layers, 2 * 312 * 10**12)
    assert served.prefill["scores and values from the cache, the prompt"] == scores
    assert served.memory["weights"] == 2 * parameters(model="llama-2-7b").total
    assert served.bound == {"weights_prompt": "compute", "weights_step": "memory"}


def test_answers_add_up() -> None:
    served = inference(replace(LLAMA, batch=4))
    total = served.prefill.total + 255 * served.decode.total
    assert served.value("answer") == total
    assert served.value("rate") == 4 * 256 / total
    assert sum(term.value for term in served.memory.terms) == served.value("memory")


def test_the_batch_limit_is_where_memory_ends() -> None:
    for serving in (LLAMA, replace(LLAMA, prompt=3000, tensor=4), replace(LLAMA, weights="nf4", cache="fp8")):
        most = batch_limit(serving)
        assert most > 0
        capacity = 80_000_000_000
        assert inference(replace(serving, batch=most)).value("memory") <= capacity
        assert inference(replace(serving, batch=most + 1)).value("memory") > capacity
    assert batch_limit(replace(LLAMA, model="llama-2-70b")) == 0


def test_few_key_heads_and_latents_are_copied_among_ranks() -> None:
    grouped = Serving("llama-2-70b", "h100-sxm", tensor=16, prompt=1000, generated=24)
    assert inference(grouped).value("cache") == Fraction(1024 * 327680, 8)
    latent = Serving("deepseek-v2", "h200", tensor=8, prompt=1000, generated=24)
    assert inference(latent).value("cache") == 1024 * 69120


def test_experts_are_read_as_a_batch_needs_them() -> None:
    one = Serving("mixtral-8x7b", "h100-sxm", tensor=8, prompt=64, generated=64)
    assert inference(one).value("touched_step") == 2  # of 8: those of its one token
    touched = [inference(replace(one, batch=batch)).value("touched_step") for batch in (1, 2, 4, 64)]
    assert touched == sorted(touched)
    assert touched[1] == 8 * (1 - Fraction(6, 8) ** 2)
    assert Fraction(799, 100) < touched[-1] <= 8
    many = inference(replace(one, batch=1000, prompt=100_000))  # an exponent of millions is not computed
    assert many.value("touched_prompt") > Fraction(7999, 1000)


SERVINGS = st.builds(
    Serving,
    model=st.sampled_from(("llama-2-7b", "llama-2-70b", "mixtral-8x7b", "deepseek-v2", "gpt2-xl")),
    hardware=st.sampled_from(("a100-80gb", "h100-sxm", "h200", "mi300x")),
    tensor=st.sampled_from((1, 5)),
    batch=st.integers(1, 200),
    prompt=st.integers(1, 5000),
    generated=st.integers(1, 2000),
    weights=st.sampled_from(("bf16", "nf4", "q8_0")),
    cache=st.sampled_from(("bf16", "fp8")),
)


@settings(max_examples=60, deadline=None)
@given(SERVINGS)
def test_what_rises_and_falls(serving: Serving) -> None:
    if serving.tensor == 5 and serving.model != "gpt2-xl":
        serving = replace(serving, tensor=4)
    if serving.tensor == 4 or serving.model == "gpt2-xl":
        alone = inference(replace(serving, tensor=1))
        assert inference(serving).value("memory") <= alone.value("memory")
    served = inference(serving)
    for name in ("batch", "prompt", "generated"):
        more = inference(replace(serving, **{name: getattr(serving, name) + 1}))
        assert more.value("memory") >= served.value("memory")
        assert more.decode.total >= served.decode.total
    for name in ("compute", "memory", "network"):
        slower = inference(replace(serving, **{name: Fraction(1, 3)}))
        for before, after in ((served.prefill, slower.prefill), (served.decode, slower.decode)):
            assert before.total <= after.total <= 3 * before.total
    wide = inference(replace(serving, weights="fp32"))
    assert wide.value("weights") > served.value("weights")
    assert wide.decode.total >= served.decode.total
    assert set(served.bound.values()) <= {"memory", "compute"}


def test_speculation_at_batch_one_is_the_papers_and_fades_with_the_batch() -> None:
    """Bound by memory, a pass over γ + 1 tokens takes as long as over one, up to the cache: theorem 3.8."""
    served = Serving("llama-2-70b", "h100-sxm", tensor=8, prompt=128, generated=64)
    cost = inference(replace(served, model="llama-2-7b")).decode.total / inference(served).decode.total
    ours = served_speculation(served, "llama-2-7b", alpha=0.8, gamma=4).total
    theirs = speculative_speedup(alpha=0.8, gamma=4, cost=cost).total
    assert 0.98 * theirs < ours <= theirs
    gains = [
        served_speculation(replace(served, batch=batch), "llama-2-7b", alpha=0.8, gamma=4).total
        for batch in (1, 64, 512, 4096)
    ]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] < 1
    assert served_speculation(served, "llama-2-7b", alpha=0.8, gamma=0).total == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tensor": 3}, "heads"),
        ({"batch": 0}, "above 0"),
        ({"prompt": 1.5}, "whole numbers"),
        ({"compute": 1.5}, "up to 1"),
        ({"latency": -1}, "from 0"),
        ({"model": "jamba"}, "decoder"),
    ],
)
def test_bad_numbers_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        inference(replace(LLAMA, **change))


def test_unknown_names_are_refused() -> None:
    for change in ({"weights": "int3"}, {"hardware": "a100"}, {"precision": "fp7"}, {"model": "llama"}):
        with pytest.raises(UnknownNameError):
            inference(replace(LLAMA, **change))  # type: ignore[arg-type]
    assert "nf4" in weight_formats()
