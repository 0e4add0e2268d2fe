"""Layers between records: self-attention without positions, padding, errors, and low precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.attention import multi_head_attention, multi_head_attention_vjp
from refimpl.attention.multi_head import sample_multi_head
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from refimpl.testing import check
from refimpl.transformer import alibi_slopes, gelu, layer_norm, output_head, rms_norm, sinusoidal_positions
from refimpl.transformer.block_samples import MAKES, sample_decoder, sample_encoder
from refimpl.transformer.blocks import decoder, decoder_vjp, encoder
from refimpl.transformer.cached_decoder import cached_decoder, decoder_token_by_token
from refimpl.transformer.embedding import embedding
from refimpl.transformer.ffn import ffn, gated_ffn
from refimpl.transformer.positions import learned_positions
from refimpl.transformer.rotary import Rope, rotary
from refimpl.transformer.self_attention import self_attention, self_attention_vjp

SHAPE: dict[str, Any] = {"B": 2, "T": 5, "M": 4, "Hkv": 1, "group": 2, "pairs": 1, "F": 5}


@given(seed=st.integers(0, 2**32 - 1), group=st.integers(1, 2), biases=st.booleans(), causal=st.booleans())
def test_self_attention_without_positions_is_multi_head_attention(
    seed: int, group: int, biases: bool, causal: bool
) -> None:
    rng, extra = np.random.default_rng(seed), "biases" if biases else "none"
    case = sample_multi_head(rng, B=2, T=4, M=5, Hkv=2, group=group, D=3, causal=causal, extra=extra)
    x, *arrays = case.args
    weights = dict(zip(("w_q", "w_k", "w_v", "w_o"), arrays, strict=True))
    weights |= {name: array for name, array in case.kwargs.items() if name.startswith("b_")}
    options: dict[str, Any] = {"num_heads": 2 * group, "num_kv_heads": 2, "causal": causal}
    y, cache = self_attention(x, weights, **options)
    np.testing.assert_allclose(y, case.call(multi_head_attention), rtol=1e-12, atol=1e-12)
    assert cache.k.shape == (2, 4, 2, 3)
    dy = rng.standard_normal(y.shape)
    dx, found = self_attention_vjp(x, weights, dy, **options)
    expected = multi_head_attention_vjp(*case.args, dy, **case.kwargs)
    np.testing.assert_allclose(dx, expected.dx, rtol=1e-11, atol=1e-12)
    for name in weights:
        np.testing.assert_allclose(found[name], getattr(expected, f"d{name}"), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "gelu",
        "ffn",
        "gated_ffn",
        "layer_norm",
        "rms_norm",
        "embedding",
        "output_head",
        "positions.rotary",
        "encoder",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_laws_hold_in_low_precision(name: str, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    report = check(f"transformer.{name}", dtypes=(dtype,), examples=2, edges=False)
    assert not report.failed, report.failed[0]
    assert report.counts()["passed"] > 0


def test_a_gradient_of_a_context_flows_through_every_sublayer_after_it() -> None:
    case = sample_decoder(np.random.default_rng(0), **SHAPE, make="original", extra="cross")
    dy = np.random.default_rng(1).standard_normal(case.args[0].shape)
    found = decoder_vjp(case.args[0], dy, **case.kwargs)
    assert found.dcontext is not None
    given_weights = {name for name, value in case.kwargs.items() if isinstance(value, np.ndarray)}
    assert {name for name in given_weights if getattr(found, f"d{name}") is None} == set()


def test_a_token_that_sees_no_context_gets_the_bias_alone() -> None:
    case = sample_decoder(np.random.default_rng(0), **SHAPE, make="gpt2", extra="cross")
    hidden = case.replace(context_mask=np.zeros((2, 1, 1, 7), bool))
    silent = case.replace(cross_w_o=np.zeros_like(case.kwargs["cross_w_o"]))
    np.testing.assert_allclose(hidden.call(decoder), silent.call(decoder), rtol=1e-12)


def test_blocks_refuse_what_has_no_place() -> None:
    case = sample_encoder(np.random.default_rng(0), **SHAPE, make="bert", extra="none")
    llama = sample_decoder(np.random.default_rng(0), **SHAPE, make="llama", extra="none")
    x, M = case.args[0], 4
    scores, square = np.zeros((1, 1, 5, 5)), np.ones((M, M))
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: case.without("gamma_1").call(encoder), OptionError, "weights: missing gamma_1"),
        (lambda: case.replace(w_gate=square).call(encoder), OptionError, "missing w_down, w_up"),
        (lambda: case.replace(cross_w_q=square).call(decoder), OptionError, "cross_w_q have no place"),
        (lambda: case.replace(norm="rms_norm").call(encoder), OptionError, "beta_1, beta_2 have no place"),
        (lambda: case.replace(order="sandwich").call(encoder), OptionError, "order: expected"),
        (lambda: case.replace(x[0]).call(encoder), ShapeError, r"x: expected 3 axes \(B, T, M\)"),
        (lambda: case.replace(num_heads=3).call(encoder), ShapeError, "do not divide into 3 heads"),
        (lambda: case.replace(w_1=np.ones((3, 5))).call(encoder), ShapeError, r"w_1: expected \(4, N\)"),
        (lambda: llama.replace(beta_1=np.ones(M)).call(decoder), OptionError, "beta_1 have no place here"),
        (lambda: decoder_vjp(llama.args[0], x[:1], **llama.kwargs), ShapeError, "dy: expected the shape"),
        (lambda: llama.replace(bias=scores).call(decoder_token_by_token), UnsupportedError, "bias"),
    ]
    for call, error, says in calls:
        with pytest.raises(error, match=says):
            call()


def test_a_cache_of_other_sequences_is_refused() -> None:
    case = sample_decoder(np.random.default_rng(0), **SHAPE, make="llama", extra="none")
    _, past = cached_decoder(case.args[0], None, **case.kwargs)
    with pytest.raises(ShapeError, match="cache: k has shape"):
        cached_decoder(case.args[0][:1], past, **case.kwargs)
    assert MAKES["llama"]["rope"] == Rope("half_split")


def test_parts_refuse_what_does_not_fit() -> None:
    x, eye, one = np.ones((2, 3)), np.eye(3), np.ones(3)
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: gelu(x, form="fast"), OptionError, "form: expected one of"),
        (lambda: gelu(x > 0), DTypeError, "x: expected float64"),
        (lambda: ffn(x, eye, eye, activation="elu"), OptionError, "activation: expected one of"),
        (lambda: ffn(x, np.eye(4), eye), ShapeError, r"w_1: expected \(3, N\), got shape \(4, 4\)"),
        (lambda: ffn(x, eye, eye, b_2=np.ones(4)), ShapeError, r"b_2: expected shape \(3,\), got \(4,\)"),
        (lambda: gated_ffn(x, eye, eye, np.eye(2)), ShapeError, "w_down"),
        (lambda: layer_norm(x, one, np.ones(2)), ShapeError, r"beta: expected shape \(3,\)"),
        (lambda: layer_norm(x, one, one, eps=0.0), OptionError, "eps: expected a finite number above 0"),
        (lambda: rms_norm(x, one, convention="t5"), OptionError, "convention: expected"),
        (lambda: embedding(eye, np.array([-1])), OptionError, r"tokens: expected numbers in \[0, 3\)"),
        (lambda: embedding(eye, np.array([0.0])), DTypeError, "tokens: expected integers"),
        (lambda: output_head(x, np.eye(4)), ShapeError, "hidden: expected last axis 4"),
        (lambda: output_head(x, eye, bias=np.ones(2)), ShapeError, r"bias: expected shape \(3,\)"),
        (lambda: sinusoidal_positions(np.arange(3), width=5), OptionError, "width: expected an even number"),
        (lambda: learned_positions(eye, np.array([2]), offset=1), OptionError, r"numbers in \[0, 2\)"),
        (lambda: alibi_slopes(num_heads=0), OptionError, "num_heads: expected at least 1"),
        (lambda: Rope("half"), OptionError, "pairing: expected"),  # type: ignore[arg-type]
        (lambda: Rope(rotated=3), OptionError, "rotated: expected an even number"),
        (lambda: rotary(np.ones((1, 2, 1, 3)), np.arange(2)), ShapeError, "cannot turn in pairs"),
        (lambda: rotary(np.ones((1, 2, 1, 4)), np.arange(3)), ShapeError, "positions: expected shape"),
    ]  # fmt: skip
    for call, error, says in calls:
        with pytest.raises(error, match=says):
            call()
