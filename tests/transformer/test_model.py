"""The decoder as a model: its gradients, decoding through the cache, rollback, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.transformer import (
    DecoderConfig,
    Rope,
    cache_length,
    decoder_logits,
    decoder_logits_vjp,
    decoder_shapes,
    decoder_step,
    initial_decoder,
    truncate,
)
from refimpl.transformer.kv_cache import cache_bytes

SMALL: dict[str, Any] = {"vocabulary": 11, "width": 8, "layers": 2, "num_heads": 4, "hidden": 10}
CLASSIC: dict[str, Any] = {"norm": "layer_norm", "gated": False, "biases": True, "activation": "gelu_tanh"}
CONFIGS = {
    "llama": DecoderConfig(**SMALL, num_kv_heads=2),
    "gptj": DecoderConfig(**SMALL, **CLASSIC, positions=Rope("interleaved", rotated=2), head_width=4),
    "alibi": DecoderConfig(**SMALL, num_kv_heads=1, positions="alibi", tied=False),
    "gpt2": DecoderConfig(**SMALL, **CLASSIC, positions="learned", max_length=40),
    "original": DecoderConfig(
        **SMALL,
        **CLASSIC | {"activation": "relu"},
        positions="sinusoidal",
        order="post",
        embedding_scale=8**0.5,
    ),
}
names = st.sampled_from(sorted(CONFIGS))
seeds = st.integers(0, 2**32 - 1)


def made(name: str, seed: int, T: int = 9, B: int = 2) -> tuple[dict[str, Any], Any, DecoderConfig]:
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    params = initial_decoder(config, rng)
    for key, array in params.items():  # shifts and biases away from 0, gains from 1
        params[key] = array + 0.1 * rng.standard_normal(array.shape)
    return params, rng.integers(0, config.vocabulary, (B, T)), config


@given(name=names, seed=seeds, cuts=st.lists(st.integers(0, 9), max_size=4))
def test_steps_through_the_cache_equal_the_full_pass(name: str, seed: int, cuts: list[int]) -> None:
    params, tokens, config = made(name, seed)
    full = decoder_logits(params, tokens, config=config)
    ends = sorted({*cuts, 0, 9})
    cache, rows = None, []
    for start, end in itertools.pairwise(ends):
        logits, cache = decoder_step(params, tokens[:, start:end], cache, config=config)
        rows.append(logits)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), full, rtol=1e-11, atol=1e-12)
    assert cache_length(cache) == 9
    assert cache_bytes(cache) == 2 * 2 * 2 * 9 * config.kv_heads * config.head_size * 8


@given(name=names, seed=seeds, kept=st.integers(1, 8))
def test_rollback_forgets_rejected_tokens(name: str, seed: int, kept: int) -> None:
    """After a rejected draft the truncated cache, and the old one, go on as if it had never been."""
    params, tokens, config = made(name, seed)
    _, before = decoder_step(params, tokens[:, :kept], config=config)
    rejected = (tokens[:, kept:] + 1) % config.vocabulary
    _, long = decoder_step(params, rejected, before, config=config)
    full = decoder_logits(params, tokens, config=config)[:, kept:]
    for cache in (truncate(long, kept), before):
        assert cache_length(cache) == kept
        logits, _ = decoder_step(params, tokens[:, kept:], cache, config=config)
        np.testing.assert_allclose(logits, full, rtol=1e-11, atol=1e-12)


def test_truncating_beyond_the_cache_is_refused() -> None:
    params, tokens, config = made("llama", 0)
    _, cache = decoder_step(params, tokens, config=config)
    with pytest.raises(ShapeError, match="cannot keep 10 tokens of 9"):
        truncate(cache, 10)
    assert truncate(None, 0) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_every_parameter(name: str) -> None:
    params, tokens, config = made(name, 3, T=5)
    rng = np.random.default_rng(4)
    dlogits = rng.standard_normal((2, 5, config.vocabulary))
    found = decoder_logits_vjp(params, tokens, dlogits, config=config)
    assert list(found) == list(params) == list(decoder_shapes(config))
    step = np.finfo(float).eps ** (1 / 3)
    for key, array in params.items():
        direction = rng.standard_normal(array.shape)
        sides = [
            np.sum(dlogits * decoder_logits({**params, key: array + s * direction}, tokens, config=config))
            for s in (step, -step)
        ]
        numeric, exact = (sides[0] - sides[1]) / (2 * step), np.sum(found[key] * direction)
        terms = 1 + np.sum(np.abs(found[key] * direction))
        assert abs(numeric - exact) <= 1e-7 * terms, f"{key}: {exact}, differences say {numeric}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_low_precision_stays_near(dtype: str) -> None:
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    params, tokens, config = made("llama", 5)
    low = {key: array.astype(kind) for key, array in params.items()}
    exact = decoder_logits({key: a.astype(np.float64) for key, a in low.items()}, tokens, config=config)
    logits = decoder_logits(low, tokens, config=config)
    assert logits.dtype == kind
    eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    assert np.max(np.abs(logits.astype(np.float64) - exact)) < 8 * eps * np.max(np.abs(exact))


def test_initial_logits_are_near_uniform() -> None:
    config = DecoderConfig(width=64, layers=2)
    params = initial_decoder(config, np.random.default_rng(0))
    logits = decoder_logits(params, np.arange(32)[None], config=config)
    assert 0.5 < np.std(logits) < 2


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_heads": 3}, OptionError, "8 features do not divide into 3 heads"),
        ({"num_kv_heads": 3}, OptionError, "num_kv_heads: must divide num_heads"),
        ({"positions": "rotary"}, OptionError, "positions: expected a Rope"),
        ({"eps": 0.0}, OptionError, "eps"),
        ({"layers": -1}, OptionError, "layers"),
        ({"width": 8.0}, DTypeError, "width"),
    ],
)
def test_makes_that_are_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        DecoderConfig(**{**SMALL, **change})


def test_calls_that_are_refused() -> None:
    params, tokens, config = made("llama", 0)
    refused: list[tuple[dict[str, Any], Any, type[Exception], str]] = [
        ({"gamma": None}, tokens, OptionError, r"params: missing \['gamma'\]"),
        ({"beta": np.ones(8)}, tokens, OptionError, r"unknown \['beta'\]"),
        ({"gamma": np.ones(7)}, tokens, ShapeError, r"params\['gamma'\]: expected shape \(8,\)"),
        ({}, tokens[0], ShapeError, r"tokens: expected 2 axes"),
        ({}, tokens - 1 - tokens.min(), OptionError, r"tokens: expected numbers in \[0, 11\), got -1"),
        ({}, tokens.astype(float), DTypeError, r"tokens: expected integers"),
    ]
    for change, given_tokens, error, says in refused:
        broken = {key: value for key, value in {**params, **change}.items() if value is not None}
        with pytest.raises(error, match=says):
            decoder_logits(broken, given_tokens, config=config)
    _, cache = decoder_step(params, tokens, config=config)
    with pytest.raises(ShapeError, match="cache: expected 2 layers, got 1"):
        decoder_step(params, tokens, cache[:1], config=config)
    with pytest.raises(ShapeError, match="cache: k has shape"):
        decoder_step(params, tokens[:1], cache, config=config)
    learned, tokens, config = made("gpt2", 0, T=41)
    with pytest.raises(OptionError, match=r"positions: expected numbers in \[0, 40\)"):
        decoder_logits(learned, tokens, config=config)
