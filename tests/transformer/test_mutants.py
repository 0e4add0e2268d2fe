"""Transformers that are wrong in one way: the laws of the records must catch each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.transformer import alibi_slopes, layer_norm, output_head, rms_norm, sinusoidal_positions
from refimpl.transformer.activations import activate, gelu
from refimpl.transformer.blocks import decoder, encoder
from refimpl.transformer.embedding import embedding
from refimpl.transformer.ffn import ffn, gated_ffn
from refimpl.transformer.positions import learned_positions
from refimpl.transformer.rotary import rotary
from tests.survivors import Mutants

registry.load()

Function = Callable[..., Any]
MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("transformer.gelu")
def root_forgotten(x: Any, /, *, form: str = "exact") -> Any:
    return gelu(x * math.sqrt(2), form="exact") / math.sqrt(2) if form == "exact" else gelu(x, form=form)


@mutant("transformer.gelu")
def cubic_of_the_other_sign(x: Any, /, *, form: str = "exact") -> Any:
    u = math.sqrt(2 / math.pi) * (x - 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(u)) if form == "tanh" else gelu(x, form=form)


@mutant("transformer.gelu")
def silu_for_the_sigmoid_form(x: Any, /, *, form: str = "exact") -> Any:
    return activate("silu", x) if form == "sigmoid" else gelu(x, form=form)


@mutant("transformer.ffn")
def output_bias_in_the_units(x: Any, w_1: Any, w_2: Any, /, *, b_2: Any = None, **options: Any) -> Any:
    y = ffn(x, w_1, w_2, **options)
    return y if b_2 is None else y + w_1.shape[1] * b_2


@mutant("transformer.ffn")
def leaky_relu(x: Any, w_1: Any, w_2: Any, /, *, activation: str, b_1: Any = 0, b_2: Any = 0) -> Any:
    before = x @ w_1 + b_1
    hidden = np.maximum(before, 0.01) if activation == "relu" else activate(activation, before)
    return hidden @ w_2 + b_2


@mutant("transformer.ffn")
def tokens_averaged(x: Any, w_1: Any, w_2: Any, /, **options: Any) -> Any:
    return ffn(x - 0.1 * x.mean(axis=0, keepdims=True) if len(x) else x, w_1, w_2, **options)


@mutant("transformer.ffn")
def one_hidden_unit_lost(x: Any, w_1: Any, w_2: Any, /, *, b_1: Any = None, **options: Any) -> Any:
    b_1 = b_1 if b_1 is None else b_1[:-1]
    return ffn(x, w_1[:, :-1], w_2[:-1], b_1=b_1, **options)


@mutant("transformer.gated_ffn")
def other_half_gated(x: Any, w_gate: Any, w_up: Any, w_down: Any, /, **options: Any) -> Any:
    return gated_ffn(x, w_up, w_gate, w_down, **options)


@mutant("transformer.gated_ffn")
def gate_added(x: Any, w_gate: Any, w_up: Any, w_down: Any, /, *, activation: str) -> Any:
    return (activate(activation, x @ w_gate) + x @ w_up) @ w_down


@mutant("transformer.layer_norm")
def variance_over_one_less(x: Any, gamma: Any, beta: Any, /, *, eps: float) -> Any:
    centered, n = x - x.mean(axis=-1, keepdims=True), max(x.shape[-1] - 1, 1)
    return centered / np.sqrt((centered**2).sum(axis=-1, keepdims=True) / n + eps) * gamma + beta


@mutant("transformer.layer_norm")
def eps_outside_the_root(x: Any, gamma: Any, beta: Any, /, *, eps: float) -> Any:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / (np.sqrt((centered**2).mean(axis=-1, keepdims=True)) + eps) * gamma + beta


@mutant("transformer.layer_norm")
def variance_in_one_pass(x: Any, gamma: Any, beta: Any, /, *, eps: float) -> Any:
    variance = (x**2).mean(axis=-1, keepdims=True) - x.mean(axis=-1, keepdims=True) ** 2
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(np.abs(variance) + eps) * gamma + beta


@mutant("transformer.layer_norm")
def shift_scaled_too(x: Any, gamma: Any, beta: Any, /, *, eps: float) -> Any:
    return layer_norm(x, np.ones_like(gamma), beta, eps=eps) * gamma


@mutant("transformer.rms_norm")
def mean_taken_off(x: Any, gamma: Any, /, *, eps: float, convention: str) -> Any:
    return rms_norm(x - x.mean(axis=-1, keepdims=True), gamma, eps=eps)


@mutant("transformer.rms_norm")
def sum_of_squares(x: Any, gamma: Any, /, *, eps: float, convention: str) -> Any:
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + eps) * gamma


@mutant("transformer.rms_norm")
def gain_less_one(x: Any, gamma: Any, /, *, eps: float, convention: str) -> Any:
    return rms_norm(x, 1 + gamma, eps=eps)


@mutant("transformer.positions")
def sines_and_cosines_exchanged(p: Any, /, *, width: int, **options: Any) -> Any:
    y = sinusoidal_positions(p, width=width, **options)
    return y.reshape(*y.shape[:-1], width // 2, 2)[..., ::-1].reshape(y.shape)


@mutant("transformer.positions")
def another_base(p: Any, /, **options: Any) -> Any:
    return sinusoidal_positions(p, base=1000.0, **options)


@mutant("transformer.positions")
def positions_from_one(p: Any, /, **options: Any) -> Any:
    return sinusoidal_positions(p + 1, **options)


@mutant("transformer.positions.learned")
def offset_ignored(table: Any, p: Any, /, *, offset: int) -> Any:
    return learned_positions(table, p)


@mutant("transformer.positions.alibi")
def slopes_from_zero(*, num_heads: int) -> Any:
    return 2.0 ** (-8 * np.arange(num_heads) / num_heads)


@mutant("transformer.positions.alibi")
def one_formula_for_all(*, num_heads: int) -> Any:
    return 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)


@mutant("transformer.positions.alibi")
def other_half_of_the_next_power(*, num_heads: int) -> Any:
    n = 1 << (num_heads.bit_length() - 1)
    return np.concatenate([alibi_slopes(num_heads=n), alibi_slopes(num_heads=2 * n)[1::2][: num_heads - n]])


@mutant("transformer.positions.rotary")
def turned_the_other_way(x: Any, p: Any, /, **options: Any) -> Any:
    return rotary(x, -p, **options)


@mutant("transformer.positions.rotary")
def pairings_exchanged(x: Any, p: Any, /, *, pairing: str, **options: Any) -> Any:
    other = {"half_split": "interleaved", "interleaved": "half_split"}[pairing]
    return rotary(x, p, pairing=other, **options)


@mutant("transformer.positions.rotary")
def everything_turned(x: Any, p: Any, /, *, rotated: Any = None, **options: Any) -> Any:
    return rotary(x, p, **options)


@mutant("transformer.positions.rotary")
def one_angle_for_all_pairs(x: Any, p: Any, /, **options: Any) -> Any:
    return rotary(x, p, base=1.0, **options)


@mutant("transformer.embedding")
def scale_forgotten(table: Any, tokens: Any, /, *, scale: float = 1.0) -> Any:
    return embedding(table, tokens)


@mutant("transformer.embedding")
def next_row(table: Any, tokens: Any, /, *, scale: float = 1.0) -> Any:
    return embedding(np.roll(table, -1, axis=0), tokens, scale=scale)


@mutant("transformer.output_head")
def head_scaled_down(hidden: Any, table: Any, /, **options: Any) -> Any:
    return output_head(hidden / math.sqrt(hidden.shape[-1] + 1), table, **options)


@mutant("transformer.output_head")
def bias_reversed(hidden: Any, table: Any, /, *, bias: Any = None) -> Any:
    return output_head(hidden, table) if bias is None else output_head(hidden, table) + bias[0]


OTHER = {"post": "pre", "pre": "post"}


def _exchanged(options: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    return {**options, a: options[b], b: options[a]} if a in options and b in options else options


@mutant("transformer.encoder")
def orders_exchanged(x: Any, /, *, order: str, **options: Any) -> Any:
    return encoder(x, order=OTHER[order], **options)


@mutant("transformer.encoder")
def gains_exchanged(x: Any, /, **options: Any) -> Any:
    return encoder(x, **_exchanged(options, "gamma_1", "gamma_2"))


@mutant("transformer.encoder")
def mask_inverted(x: Any, /, **options: Any) -> Any:
    if "attn_mask" in options:
        options["attn_mask"] = ~options["attn_mask"]
    return encoder(x, **options)


@mutant("transformer.encoder")
def causal_encoder(x: Any, /, **options: Any) -> Any:
    return encoder(x, causal=True, **options)


@mutant("transformer.encoder")
def batch_mixed(x: Any, /, **options: Any) -> Any:
    return encoder(x + 0.01 * x.mean(axis=0, keepdims=True) if len(x) else x, **options)


@mutant("transformer.decoder")
def decoder_sees_the_future(x: Any, /, **options: Any) -> Any:
    return decoder(x, causal=False, **options)


@mutant("transformer.decoder")
def decoder_orders_exchanged(x: Any, /, *, order: str, **options: Any) -> Any:
    return decoder(x, order=OTHER[order], **options)


@mutant("transformer.decoder")
def context_mask_ignored(x: Any, /, *, context_mask: Any = None, **options: Any) -> Any:
    return decoder(x, **options)


@mutant("transformer.decoder")
def context_seen_causally(x: Any, /, *, context: Any = None, context_mask: Any = None, **options: Any) -> Any:
    if context is not None:
        causal = np.tri(x.shape[1], context.shape[1], dtype=bool)[None, None]
        context_mask = causal if context_mask is None else causal & context_mask
    return decoder(x, context=context, context_mask=context_mask, **options)


@mutant("transformer.decoder")
def cross_norm_exchanged(x: Any, /, **options: Any) -> Any:
    return decoder(x, **_exchanged(options, "cross_gamma", "gamma_2"))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
