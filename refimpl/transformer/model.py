"""A decoder-only language model: embedding, decoder blocks, last normalisation, output head.

The model is a configuration and a dict of arrays whose names are those of a checkpoint.  Four functions of
both do everything: `decoder_logits` and its vector-Jacobian product for training, `decoder_step` for decoding
with a cache, `initial_decoder` for a start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, widen
from refimpl.transformer.block_layers import decoder_layer
from refimpl.transformer.config import DecoderConfig, decoder_shapes
from refimpl.transformer.embedding import embedding, embedding_vjp, indices, output_head, output_head_vjp
from refimpl.transformer.kv_cache import KVCache, LayerCache, cache_length
from refimpl.transformer.layers import Gradients, Layer, chain, norm_layer
from refimpl.transformer.positions import (
    alibi_slopes,
    learned_positions,
    learned_positions_vjp,
    sinusoidal_positions,
)
from refimpl.transformer.rotary import Rope
from refimpl.validation import as_array, floating

__all__ = ["DecoderParams", "decoder_logits", "decoder_logits_vjp", "decoder_step"]

DecoderParams: TypeAlias = Mapping[str, FloatArray]


def decoder_logits(params: DecoderParams, tokens: IntArray, /, *, config: DecoderConfig) -> FloatArray:
    """Return the logits of the next token after each token, all at once.

    Parameters
    ----------
    params : mapping of str to ndarray
        By the names of `decoder_shapes`, in one dtype.
    tokens : ndarray of int, shape (B, T)
        Token ids in [0, V).
    config : DecoderConfig
        The make.

    Returns
    -------
    ndarray of float, shape (B, T, V)
        In the dtype of the parameters.

    Raises
    ------
    ShapeError
        If tokens have not two axes, or a parameter has another shape than the configuration says.
    OptionError
        If a parameter is missing or unknown, a token is outside the vocabulary, or learned positions end.
    DTypeError
        If tokens are no integers or a parameter is not real.

    Examples
    --------
    >>> from refimpl.transformer import initial_decoder
    >>> config = DecoderConfig(vocabulary=5, width=8, num_heads=2, layers=1, hidden=16)
    >>> params = initial_decoder(config, np.random.default_rng(0))
    >>> decoder_logits(params, np.array([[1, 2, 3]]), config=config).shape
    (1, 3, 5)
    """
    weights, tokens, dtype = _model_input(params, tokens, config)
    return round_to(_model(weights, tokens, config).forward(weights["embedding"]), dtype)


def decoder_logits_vjp(
    params: DecoderParams, tokens: IntArray, dlogits: FloatArray, /, *, config: DecoderConfig
) -> dict[str, FloatArray]:
    """Return the gradients of ``sum(dlogits * decoder_logits(params, tokens, config=config))``.

    Parameters
    ----------
    params, tokens, config
        As for `decoder_logits`.
    dlogits : ndarray of float, shape (B, T, V)
        Gradient of the logits.

    Returns
    -------
    dict of str to ndarray
        Names, shapes and dtype of the parameters.  A tied table has both its gradients, added.

    Raises
    ------
    ShapeError, OptionError, DTypeError
        As for `decoder_logits`.

    Examples
    --------
    >>> from refimpl.transformer import initial_decoder
    >>> config = DecoderConfig(vocabulary=5, width=8, num_heads=2, layers=1, hidden=16)
    >>> params = initial_decoder(config, np.random.default_rng(0))
    >>> found = decoder_logits_vjp(params, np.array([[1, 2]]), np.ones((1, 2, 5)), config=config)
    >>> all(found[name].shape == array.shape for name, array in params.items())
    True
    """
    weights, tokens, dtype = _model_input(params, tokens, config)
    (dlogits,) = floating(dlogits=dlogits)
    if dlogits.shape != (*tokens.shape, config.vocabulary):
        raise ShapeError(f"dlogits: expected {(*tokens.shape, config.vocabulary)}, got {dlogits.shape}")
    table = weights["embedding"]
    dlogits = widen(dlogits).astype(table.dtype, copy=False)
    dtable, found = _model(weights, tokens, config).vjp(table, dlogits)
    found["embedding"] = dtable + found["embedding"] if "embedding" in found else dtable
    return {name: round_to(found[name], dtype) for name in params}


def decoder_step(
    params: DecoderParams, tokens: IntArray, cache: KVCache | None = None, /, *, config: DecoderConfig
) -> tuple[FloatArray, KVCache]:
    """Return the logits after the next tokens, and the cache with them in it.

    Parameters
    ----------
    params, config
        As for `decoder_logits`.
    tokens : ndarray of int, shape (B, T)
        What follows the tokens in the cache: a prompt, one token, or a draft of several to be verified.
    cache : tuple of LayerCache, optional
        What the last step returned, perhaps truncated (`refimpl.transformer.truncate`).  Default: empty.

    Returns
    -------
    tuple of ndarray and tuple of LayerCache
        Logits (B, T, V), the rows that `decoder_logits` gives for all tokens at once; and a new cache.

    Raises
    ------
    ShapeError, OptionError, DTypeError
        As for `decoder_logits`, and if the cache is that of another model or batch.

    Examples
    --------
    >>> from refimpl.transformer import initial_decoder
    >>> config = DecoderConfig(vocabulary=5, width=8, num_heads=2, layers=1, hidden=16)
    >>> params = initial_decoder(config, np.random.default_rng(0))
    >>> logits, cache = decoder_step(params, np.array([[1, 2]]), config=config)
    >>> logits, cache = decoder_step(params, np.array([[3]]), cache, config=config)
    >>> logits.shape, cache_length(cache)
    ((1, 1, 5), 3)
    """
    weights, tokens, dtype = _model_input(params, tokens, config)
    if cache is not None and len(cache) != config.layers:
        raise ShapeError(f"cache: expected {config.layers} layers, got {len(cache)}")
    present: list[LayerCache] = []
    logits = _model(weights, tokens, config, cache, present).forward(weights["embedding"])
    return round_to(logits, dtype), tuple(present)


def _model_input(
    params: DecoderParams, tokens: IntArray, config: DecoderConfig
) -> tuple[dict[str, FloatArray], IntArray, np.dtype[Any]]:
    """Check names, shapes and tokens; return widened parameters, tokens, and the dtype of the result."""
    shapes = decoder_shapes(config)
    if set(shapes) != set(params):
        missing, unknown = sorted(set(shapes) - set(params)), sorted(set(params) - set(shapes))
        raise OptionError(f"params: missing {missing}, unknown {unknown}")
    arrays = dict(zip(params, floating(**params), strict=True))
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ShapeError(f"params[{name!r}]: expected shape {shape}, got {arrays[name].shape}")
    if as_array("tokens", tokens).ndim != 2:
        raise ShapeError(f"tokens: expected 2 axes (B, T), got shape {np.shape(tokens)}")
    dtype = arrays["embedding"].dtype
    weights = {name: widen(array) for name, array in arrays.items()}
    return weights, indices("tokens", tokens, config.vocabulary), dtype


def _model(
    weights: Mapping[str, FloatArray],
    tokens: IntArray,
    config: DecoderConfig,
    cache: KVCache | None = None,
    present: list[LayerCache] | None = None,
) -> Layer:
    """Return the model of given tokens as a function of its embedding table."""
    layers = [_embedding_layer(weights, tokens, config, cache_length(cache))]
    options: dict[str, Any] = {
        "num_heads": config.num_heads, "num_kv_heads": config.kv_heads, "order": config.order,
        "norm": config.norm, "eps": config.eps, "activation": config.activation,
    }  # fmt: skip
    if isinstance(config.positions, Rope):
        options["rope"] = config.positions
    if config.positions == "alibi":
        options["alibi_slopes"] = alibi_slopes(num_heads=config.num_heads)
    for index in range(config.layers):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): a for name, a in weights.items() if name.startswith(prefix)}
        past = None if cache is None else cache[index]
        layers.append(_named(decoder_layer(own, past=past, present=present, **options), prefix))
    if config.order == "pre":
        layers.append(norm_layer(weights, "gamma", "beta", config.norm, config.eps))
    return chain(*layers, _head_layer(weights, "embedding" if config.tied else "head"))


def _embedding_layer(
    weights: Mapping[str, FloatArray], tokens: IntArray, config: DecoderConfig, past: int
) -> Layer:
    positions = past + np.arange(tokens.shape[1])
    scale = config.embedding_scale

    def forward(table: FloatArray) -> FloatArray:
        x = embedding(table, tokens, scale=scale)
        if config.positions == "sinusoidal":
            x = x + sinusoidal_positions(positions, width=config.width).astype(x.dtype)
        if config.positions == "learned":
            x = x + learned_positions(weights["positions"], positions)
        return x

    def vjp(table: FloatArray, dx: FloatArray) -> tuple[FloatArray, Gradients]:
        found: Gradients = {}
        if config.positions == "learned":
            found["positions"] = learned_positions_vjp(weights["positions"], positions, dx.sum(axis=0)).dtable
        return embedding_vjp(table, tokens, dx, scale=scale).dtable, found

    return Layer(forward, vjp)


def _head_layer(weights: Mapping[str, FloatArray], name: str) -> Layer:
    def vjp(x: FloatArray, dlogits: FloatArray) -> tuple[FloatArray, Gradients]:
        found = output_head_vjp(x, weights[name], dlogits)
        return found.dhidden, {name: found.dtable}

    return Layer(lambda x: output_head(x, weights[name]), vjp)


def _named(layer: Layer, prefix: str) -> Layer:
    """Return the layer with `prefix` before the names of its gradients."""

    def vjp(x: FloatArray, dy: FloatArray) -> tuple[FloatArray, Gradients]:
        dx, found = layer.vjp(x, dy)
        return dx, {prefix + name: gradient for name, gradient in found.items()}

    return Layer(layer.forward, vjp)
