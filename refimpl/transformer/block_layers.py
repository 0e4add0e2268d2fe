"""Encoder and decoder blocks as layers over checked and widened weights."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

from refimpl.attention.scores import AttentionOptions
from refimpl.numerics import BoolArray, FloatArray
from refimpl.transformer.activations import Activation
from refimpl.transformer.block_weights import BlockInput, block_input, weight_names
from refimpl.transformer.kv_cache import LayerCache
from refimpl.transformer.layers import (
    Layer,
    Norm,
    Order,
    chain,
    cross_attention_layer,
    feed_forward_layer,
    norm_layer,
    residual,
    self_attention_layer,
)
from refimpl.transformer.rotary import Rope
from refimpl.transformer.self_attention import Weights
from refimpl.validation import whole

__all__ = ["checked_decoder", "checked_encoder", "decoder_layer", "encoder_layer"]


def encoder_layer(
    weights: Weights,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    order: Order = "post",
    norm: Norm = "layer_norm",
    eps: float = 1e-5,
    activation: Activation = "relu",
    rope: Rope | None = None,
    **options: Unpack[AttentionOptions],
) -> Layer:
    """Return `encoder` as a layer over widened weights.

    Parameters
    ----------
    weights : mapping of str to ndarray
        By name.
    num_heads, num_kv_heads, order, norm, eps, activation, rope, **options
        As for `encoder`.

    Returns
    -------
    Layer
        From tokens to tokens, (B, T, M).
    """
    heads = _head_counts(num_heads, num_kv_heads)
    attention = self_attention_layer(weights, **heads, rope=rope, **options)
    first, last = (norm_layer(weights, f"gamma_{n}", f"beta_{n}", norm, eps) for n in (1, 2))
    hidden = feed_forward_layer(weights, activation)
    return chain(residual(attention, first, order), residual(hidden, last, order))


def decoder_layer(
    weights: Weights,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    order: Order = "post",
    norm: Norm = "layer_norm",
    eps: float = 1e-5,
    activation: Activation = "relu",
    rope: Rope | None = None,
    context_mask: BoolArray | None = None,
    past: LayerCache | None = None,
    present: list[LayerCache] | None = None,
    **options: Unpack[AttentionOptions],
) -> Layer:
    """Return `decoder` as a layer over widened weights, a context being one of them.

    Parameters
    ----------
    weights : mapping of str to ndarray
        By name.
    num_heads, num_kv_heads, order, norm, eps, activation, rope, context_mask, **options
        As for `decoder`.
    past : LayerCache, optional
        Of the tokens before.
    present : list, optional
        The forward pass appends its cache here.

    Returns
    -------
    Layer
        From tokens to tokens, (B, T, M).
    """
    heads = _head_counts(num_heads, num_kv_heads)
    options = {"causal": "bottom_right", **options}
    attention = self_attention_layer(weights, **heads, rope=rope, past=past, present=present, **options)
    first, last = (norm_layer(weights, f"gamma_{n}", f"beta_{n}", norm, eps) for n in (1, 2))
    layers = [residual(attention, first, order)]
    if "context" in weights:
        cross = cross_attention_layer(weights, weights["context"], **heads, context_mask=context_mask)
        layers.append(residual(cross, norm_layer(weights, "cross_gamma", "cross_beta", norm, eps), order))
    layers.append(residual(feed_forward_layer(weights, activation), last, order))
    return chain(*layers)


def checked_encoder(x: FloatArray, given: dict[str, Any]) -> tuple[Layer, BlockInput]:
    """Check a call of `encoder`; return it as a layer, and what the layer is applied to."""
    norm = given.get("norm", "layer_norm")
    block = block_input(x, given, weight_names(norm=norm, gated="w_gate" in given, biases=True, cross=False))
    return encoder_layer(block.weights, **block.options), block


def checked_decoder(x: FloatArray, given: dict[str, Any], **cache: Any) -> tuple[Layer, BlockInput]:
    """Check a call of `decoder`; return it as a layer, and what the layer is applied to."""
    cross = given.get("context") is not None
    norm = given.get("norm", "layer_norm")
    needed = weight_names(norm=norm, gated="w_gate" in given, biases=True, cross=cross)
    block = block_input(x, given, (*needed, "context") if cross else needed)
    options = {name: value for name, value in block.options.items() if name != "context"}
    return decoder_layer(block.weights, **options, **cache), block


class _HeadCounts(TypedDict):
    num_heads: int
    num_kv_heads: int


def _head_counts(num_heads: int, num_kv_heads: int | None) -> _HeadCounts:
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    return {
        "num_heads": whole("num_heads", num_heads),
        "num_kv_heads": whole("num_kv_heads", kv_heads),
    }
