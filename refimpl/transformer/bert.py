"""BERT's encoder, from the tensors of a Hugging Face checkpoint: embeddings, and blocks that normalise last.

The parts are those of this family; here is only how BERT puts them together and what it calls its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError, UnsupportedError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray
from refimpl.safetensors_format import CheckpointError
from refimpl.transformer.activations import Activation, activate
from refimpl.transformer.blocks import encoder
from refimpl.transformer.embedding import embedding
from refimpl.transformer.linear import linear
from refimpl.transformer.norms import layer_norm
from refimpl.transformer.positions import learned_positions
from refimpl.transformer.self_attention import self_attention
from refimpl.validation import as_array, positive, whole

__all__ = [
    "BertConfig",
    "LayerTrace",
    "bert_config",
    "bert_encoder",
    "bert_params",
    "bert_tensors",
    "bert_traces",
    "sentence_embeddings",
]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
# Our name: theirs within a layer.  Matrices are stored as [out, in] there.
_LAYER = {
    "w_q": "attention.self.query.weight", "b_q": "attention.self.query.bias",
    "w_k": "attention.self.key.weight", "b_k": "attention.self.key.bias",
    "w_v": "attention.self.value.weight", "b_v": "attention.self.value.bias",
    "w_o": "attention.output.dense.weight", "b_o": "attention.output.dense.bias",
    "gamma_1": "attention.output.LayerNorm.weight", "beta_1": "attention.output.LayerNorm.bias",
    "w_1": "intermediate.dense.weight", "b_1": "intermediate.dense.bias",
    "w_2": "output.dense.weight", "b_2": "output.dense.bias",
    "gamma_2": "output.LayerNorm.weight", "beta_2": "output.LayerNorm.bias",
}  # fmt: skip
_EMBEDDINGS = {
    "embedding": "embeddings.word_embeddings.weight", "positions": "embeddings.position_embeddings.weight",
    "types": "embeddings.token_type_embeddings.weight",
    "gamma": "embeddings.LayerNorm.weight", "beta": "embeddings.LayerNorm.bias",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The make of an encoder: V, M, layers, heads, F, and the rows of its tables of positions and types."""

    vocabulary: int
    width: int
    layers: int
    num_heads: int
    hidden: int
    max_length: int
    types: int
    eps: float
    activation: Activation


class LayerTrace(NamedTuple):
    """What one block computes on its way: queries, keys, values, and the input [B, T, ...] of each matrix."""

    q: FloatArray
    k: FloatArray
    v: FloatArray
    inputs: Mapping[str, FloatArray]


def bert_config(config: Mapping[str, Any], /) -> BertConfig:
    """Return the make of a BERT from its ``config.json``.

    Parameters
    ----------
    config : mapping
        As `refimpl.checkpoint.read_config` returns it.

    Returns
    -------
    BertConfig

    Raises
    ------
    UnsupportedError
        If it is another architecture: another ``model_type``, positions that are not absolute, a decoder.
    CheckpointError
        If an entry is missing or makes no sense.

    Examples
    --------
    >>> bert_config({"model_type": "llama"})
    Traceback (most recent call last):
    refimpl.errors.UnsupportedError: config.json: expected model_type 'bert', got 'llama'
    """
    kind = config.get("model_type")
    if kind != "bert":
        raise UnsupportedError(f"config.json: expected model_type 'bert', got {kind!r}")
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder", False):
        raise UnsupportedError("config.json: expected an encoder with absolute positions")
    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnsupportedError(f"config.json: expected hidden_act of {known}; got {activation!r}")
    names = {
        "vocabulary": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "hidden": "intermediate_size",
        "max_length": "max_position_embeddings", "types": "type_vocab_size",
    }  # fmt: skip
    try:
        sizes = {ours: whole(theirs, config.get(theirs)) for ours, theirs in names.items()}
        eps = positive("layer_norm_eps", config.get("layer_norm_eps", 1e-12))
    except (OptionError, TypeError) as error:
        raise CheckpointError(f"config.json: {error}") from None
    if sizes["width"] % sizes["num_heads"]:
        raise CheckpointError(
            f"config.json: {sizes['width']} features do not divide into {sizes['num_heads']} heads"
        )
    return BertConfig(**sizes, eps=eps, activation=_ACTIVATIONS[activation])


def bert_params(tensors: Mapping[str, Array], config: BertConfig, /) -> dict[str, FloatArray]:
    """Return a checkpoint's tensors under our names, matrices as ``x @ w`` wants them.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        As `refimpl.checkpoint.load_tensors` returns them, with or without ``bert.`` before their names.
        What is not part of the encoder (pooler, heads) is left aside.
    config : BertConfig
        The make.

    Returns
    -------
    dict of str to ndarray
        ``embedding``, ``positions``, ``types``, ``gamma``, ``beta``, and ``layers.0.w_q`` and so on; float16
        as float32, because the references round each step.

    Raises
    ------
    CheckpointError
        If a tensor is missing, is not floating, or has another shape than the configuration says.
    """
    M, F = config.width, config.hidden
    shapes = {
        "embedding": (config.vocabulary, M), "positions": (config.max_length, M), "types": (config.types, M),
        "w_1": (F, M), "w_2": (M, F), "b_1": (F,), **dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (M, M)),
    }  # fmt: skip
    found: dict[str, FloatArray] = {}
    for name, place in _places(tensors, config).items():
        array = tensors.get(place, tensors.get(_older(place)))
        if array is None:
            raise CheckpointError(f"there is no tensor {place!r}, which config.json speaks of")
        last = name.rpartition(".")[2]
        if array.shape != shapes.get(last, (M,)) or array.dtype not in (np.float64, np.float32, np.float16):
            raise CheckpointError(
                f"{place}: config.json says floats of shape {shapes.get(last, (M,))}, "
                f"got {array.dtype} of {array.shape}"
            )
        wide = array if array.dtype == np.float64 else array.astype(np.float32, copy=False)
        found[name] = wide.T if last.startswith("w_") else wide
    return found


def bert_tensors(
    params: Mapping[str, FloatArray], tensors: Mapping[str, Array], config: BertConfig, /
) -> dict[str, Array]:
    """Return a checkpoint's tensors with other parameters in them: `bert_params` turned back.

    Parameters
    ----------
    params : mapping of str to ndarray
        As from `bert_params`, perhaps with another number of hidden units.
    tensors : mapping of str to ndarray
        The checkpoint that they came from: it gives names, and the dtype that each is rounded to.
    config : BertConfig
        The make of that checkpoint.

    Returns
    -------
    dict of str to ndarray
        What is not part of the encoder stays as it is.

    Raises
    ------
    CheckpointError
        If a parameter has no place in the checkpoint.
    """
    found = dict(tensors)
    places = _places(tensors, config)
    for name, array in params.items():
        place = places.get(name, "")
        place = place if place in tensors else _older(place)
        if place not in tensors:
            raise CheckpointError(f"params: the checkpoint has no place for {name!r}")
        turned = array.T if name.rpartition(".")[2].startswith("w_") else array
        found[place] = np.ascontiguousarray(turned, tensors[place].dtype)
    return found


def bert_encoder(
    params: Mapping[str, FloatArray],
    tokens: IntArray,
    /,
    *,
    config: BertConfig,
    mask: BoolArray | None = None,
    types: IntArray | None = None,
) -> FloatArray:
    """Return the states of the last layer.

    Parameters
    ----------
    params : mapping of str to ndarray
        As from `bert_params`; the dtype of the computation is theirs.
    tokens : ndarray of int, shape (B, T)
        Token ids.
    config : BertConfig
        The make.
    mask : ndarray of bool, shape (B, T), optional
        True for the tokens of the text, False for padding, to which nothing attends.
    types : ndarray of int, shape (B, T), optional
        Segments.  Default: 0.

    Returns
    -------
    ndarray of float, shape (B, T, M)
        Rows of padding mean nothing.

    Raises
    ------
    ShapeError
        If mask or types have another shape than the tokens, or these exceed the table of positions.
    OptionError
        If a token is outside the vocabulary.

    References
    ----------
    .. [1] Devlin et al., 2019, arXiv:1810.04805, section 3 and figure 2.
    .. [2] github.com/huggingface/transformers, ``models/bert/modeling_bert.py`` (names, epsilon, GeLU).
    """
    x, options = _start(params, tokens, config, mask, types)
    for weights in _layers(params, config):
        x = encoder(x, **options, **weights)
    return x


def bert_traces(
    params: Mapping[str, FloatArray],
    tokens: IntArray,
    /,
    *,
    config: BertConfig,
    mask: BoolArray | None = None,
    types: IntArray | None = None,
) -> Iterator[LayerTrace]:
    """Yield what each block of `bert_encoder` computes on its way.

    Parameters
    ----------
    params, tokens, config, mask, types
        As for `bert_encoder`.

    Yields
    ------
    LayerTrace
        ``inputs`` has what is multiplied by ``w_q`` (and ``w_k``, ``w_v``), ``w_o``, ``w_1`` and ``w_2``.
    """
    x, options = _start(params, tokens, config, mask, types)
    H = config.num_heads
    shown: dict[str, Any] = {name: options[name] for name in options if name == "attn_mask"}
    for weights in _layers(params, config):
        B, T, M = x.shape
        q, k, v = (linear(x, weights[f"w_{n}"], weights[f"b_{n}"]).reshape(B, T, H, -1) for n in "qkv")
        # With the identity in place of w_o, attention returns what w_o is multiplied with.
        plain = {**weights, "w_o": np.eye(M, dtype=x.dtype), "b_o": np.zeros(M, x.dtype)}
        joined, _ = self_attention(x, plain, num_heads=H, num_kv_heads=H, **shown)
        attended = linear(joined, weights["w_o"], weights["b_o"])
        y = layer_norm(x + attended, weights["gamma_1"], weights["beta_1"], eps=config.eps)
        units = activate(config.activation, linear(y, weights["w_1"], weights["b_1"]))
        yield LayerTrace(q, k, v, {"w_q": x, "w_k": x, "w_v": x, "w_o": joined, "w_1": y, "w_2": units})
        x = encoder(x, **options, **weights)


def sentence_embeddings(states: FloatArray, mask: BoolArray, /) -> FloatArray:
    """Return the mean of the states of each text's tokens, divided by its length: unit vectors.

    Parameters
    ----------
    states : ndarray of float, shape (B, T, M)
        As from `bert_encoder`.
    mask : ndarray of bool, shape (B, T)
        True for the tokens of the text.

    Returns
    -------
    ndarray of float, shape (B, M)
        A text without tokens gives 0.

    References
    ----------
    .. [1] Reimers and Gurevych, 2019, arXiv:1908.10084, section 3 (mean pooling).

    Examples
    --------
    >>> sentence_embeddings(np.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]]), np.array([[True, True, False]]))
    array([[0.6, 0.8]])
    """
    if np.shape(mask) != np.shape(states)[:2]:
        raise ShapeError(f"mask: expected shape {np.shape(states)[:2]}, got {np.shape(mask)}")
    total = np.where(mask[..., None], states, 0).sum(axis=1)
    length = np.sqrt(np.sum(np.square(total), axis=-1, keepdims=True))
    return np.asarray(total / np.where(length > 0, length, 1))


def _start(
    params: Mapping[str, FloatArray],
    tokens: IntArray,
    config: BertConfig,
    mask: BoolArray | None,
    types: IntArray | None,
) -> tuple[FloatArray, dict[str, Any]]:
    """Return the states before the first block, and the options of every block."""
    tokens = as_array("tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[1] > config.max_length:
        raise ShapeError(
            f"tokens: expected (B, T) with T up to {config.max_length}, got shape {tokens.shape}"
        )
    options: dict[str, Any] = {
        "num_heads": config.num_heads, "order": "post", "norm": "layer_norm", "eps": config.eps,
        "activation": config.activation,
    }  # fmt: skip
    for name, value in (("mask", mask), ("types", types)):
        if value is not None and np.shape(value) != tokens.shape:
            raise ShapeError(f"{name}: expected shape {tokens.shape}, got {np.shape(value)}")
    if mask is not None:
        options["attn_mask"] = np.asarray(mask, bool)[:, None, None, :]
    segments = np.zeros_like(tokens) if types is None else types
    x = embedding(params["embedding"], tokens) + embedding(params["types"], segments)
    x = x + learned_positions(params["positions"], np.arange(tokens.shape[1]))
    return layer_norm(x, params["gamma"], params["beta"], eps=config.eps), options


def _layers(params: Mapping[str, FloatArray], config: BertConfig) -> Iterator[dict[str, Any]]:
    for layer in range(config.layers):
        yield {name: params[f"layers.{layer}.{name}"] for name in _LAYER}


def _places(tensors: Mapping[str, Array], config: BertConfig) -> dict[str, str]:
    """Return what the checkpoint calls each parameter."""
    before = "bert." if "bert.embeddings.word_embeddings.weight" in tensors else ""
    places = {name: before + theirs for name, theirs in _EMBEDDINGS.items()}
    for layer in range(config.layers):
        at = f"{before}encoder.layer.{layer}."
        places |= {f"layers.{layer}.{name}": at + theirs for name, theirs in _LAYER.items()}
        if places[f"layers.{layer}.w_q"] not in tensors:
            break  # said by `bert_params`, without going through as many layers as a config.json may claim
    return places


def _older(place: str) -> str:
    """Return the name under which the first checkpoints have a normalisation's gain and shift."""
    return place.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
