"""A model's description from the ``config.json`` that its checkpoint on Hugging Face comes with.

>>> found = model_of_config({
...     "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
...     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
... })
>>> from memsim.parameters import parameters
>>> parameters(model=found).total
7241732096
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from memsim.huggingface_blocks import (
    Layer,
    attention,
    deepseek_network,
    embedding,
    ffn,
    head,
    jamba_layer,
    latent_attention,
    mamba_layer,
    mixtral_network,
    norm,
    plain_network,
    qwen_network,
)
from memsim.model import Model, Part, Stack
from memsim.settings import Settings, shown
from refimpl.checkpoint import read_object
from refimpl.errors import OptionError

__all__ = ["MODEL_TYPES", "model_of_config", "read_model"]

# Layers are gone through one by one, so their number is bounded; no model has a tenth of it.
MOST_LAYERS = 10_000

Mixer = Callable[[Settings, int], Part]
Network = Callable[[Settings, int, int], Layer]


def read_model(path: str | os.PathLike[str]) -> Model:
    """Return the model that a ``config.json``, or the directory with one, describes.

    Parameters
    ----------
    path : path
        The file or its directory.

    Returns
    -------
    Model
        Named after the directory; its parameters are those of transformers' ``AutoModelForCausalLM`` (of
        ``AutoModel`` for an encoder), to the last one.

    Raises
    ------
    CheckpointError
        If there is no such file, or it holds no JSON object.
    OptionError
        If its ``model_type`` is not known here, or a value is missing, of the wrong type or out of range.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return model_of_config(read_object(file), name=name or "model", where=str(file))


def model_of_config(config: Mapping[str, Any], *, name: str = "model", where: str = "config.json") -> Model:
    """Return the model that the values of a ``config.json`` describe.

    Parameters
    ----------
    config : mapping
        The parsed file.
    name, where : str
        What the model is called, and what errors call the file.

    Returns
    -------
    Model

    Raises
    ------
    OptionError
        If the ``model_type`` is not known here, or a value is missing, of the wrong type or out of range.

    Notes
    -----
    Layers that multi-token prediction adds (DeepSeek-V3) are left out, as transformers leaves them out.
    """
    settings = Settings(where, config)
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise OptionError(f"{where}: model_type: expected one of {known}; got {shown(kind)}")
    width = settings.whole("hidden_size", "n_embd")
    stacks = tuple(MODEL_TYPES[kind](settings, width))
    source = f"{where}, model_type {kind}"
    if settings.whole("num_nextn_predict_layers", default=0, least=0):
        source += ", without the layers of multi-token prediction"
    return Model(name, source, width, stacks)


def _stacked(layers: Iterable[Layer]) -> list[Stack]:
    """Return equal layers as one stack each, in the order in which the kinds first appear."""
    kinds: list[Layer] = []
    counts: list[int] = []
    for layer in layers:
        if layer not in kinds:
            kinds.append(layer)
            counts.append(0)
        counts[kinds.index(layer)] += 1
    return [Stack(name, count, parts) for (name, parts), count in zip(kinds, counts, strict=True)]


def _between_embedding_and_head(
    settings: Settings, blocks: Iterable[Stack], final: Part, *, tied: bool
) -> list[Stack]:
    ends = final, head(settings, tied=tied)
    return [Stack("embeddings", 1, (embedding(settings),)), *blocks, Stack("output", 1, ends)]


def _layers(settings: Settings) -> int:
    return settings.whole("num_hidden_layers", "n_layer", most=MOST_LAYERS)


def _decoder(mixer: Mixer, network: Network, *, tied: bool, style: str = "rms") -> Any:
    """Return the reader of a pre-norm decoder: its mixer and network differ, all else is alike."""

    def stacks(settings: Settings, width: int) -> list[Stack]:
        mixed = mixer(settings, width)
        keys: tuple[Part, ...] = ()
        if settings.get("model_type") in _KEY_NORMS:  # of each head's queries and keys
            keys = tuple(norm(f"{of} norm", style, mixed.sizes["head_width"]) for of in ("query", "key"))

        def layer(index: int) -> Layer:
            name, parts = network(settings, width, index)
            return name, (norm("attention norm", style), mixed, *keys, norm("ffn norm", style), *parts)

        blocks = _stacked(map(layer, range(_layers(settings))))
        return _between_embedding_and_head(settings, blocks, norm("final norm", style), tied=tied)

    return stacks


_KEY_NORMS = ("qwen3", "qwen3_moe")


def _gpt2(settings: Settings, width: int) -> list[Stack]:
    settings.refuse("add_cross_attention", False, "expected a decoder without an encoder")
    inner = settings.whole("n_inner", default=4 * width)
    block = (
        norm("attention norm"),
        Part("attention", "attention", {"heads": settings.whole("n_head")}, {"bias": "all"}),
        norm("ffn norm"),
        ffn(inner, gated=False, bias=True),
    )
    positions = Part("embedding", "positions", {"rows": settings.whole("n_positions", "n_ctx")})
    return [
        Stack("embeddings", 1, (embedding(settings), positions)),
        Stack("block", _layers(settings), block),
        Stack("output", 1, (norm("final norm"), head(settings, tied=True))),
    ]


def _opt(settings: Settings, width: int) -> list[Stack]:
    settings.refuse("layer_norm_elementwise_affine", True, "norms without parameters are not known here")
    inner = settings.whole("word_embed_proj_dim", default=width)
    before = settings.flag("do_layer_norm_before", default=True)
    bias = settings.flag("enable_bias", default=True)
    biased: dict[str, str | bool] = {"bias": "all"} if bias else {}
    rows = settings.whole("max_position_embeddings") + 2  # the released tables start at position 2
    first, last = [embedding(settings, inner)], []
    first.append(Part("embedding", "positions", {"rows": rows}))
    if inner != width:
        first.append(Part("linear", "projection in", {"inputs": inner}))
        last.append(Part("linear", "projection out", {"outputs": inner}))
    mixed = Part("attention", "attention", {"heads": settings.whole("num_attention_heads")}, biased)
    relu = settings.get("activation_function") in (None, "relu")
    network = ffn(settings.whole("ffn_dim"), gated=False, bias=bias, relu=relu)
    norms = norm("attention norm"), norm("ffn norm")
    block = (norms[0], mixed, norms[1], network) if before else (mixed, norms[0], network, norms[1])
    final = (
        [norm("final norm")]
        if before and not settings.flag("_remove_final_layer_norm", default=False)
        else []
    )
    return [
        Stack("embeddings", 1, tuple(first)),
        Stack("block", _layers(settings), block),
        Stack("output", 1, (*final, *last, head(settings, tied=True, width=inner))),
    ]


def _bert(settings: Settings, _width: int) -> list[Stack]:
    settings.refuse("is_decoder", False, "expected an encoder")
    tables = (
        embedding(settings),
        Part("embedding", "positions", {"rows": settings.whole("max_position_embeddings")}),
        Part("embedding", "segments", {"rows": settings.whole("type_vocab_size")}),
        norm("norm"),
    )
    block = (
        Part("attention", "attention", {"heads": settings.whole("num_attention_heads")}, {"bias": "all"}),
        norm("attention norm"),
        ffn(settings.whole("intermediate_size"), gated=False, bias=True),
        norm("ffn norm"),
    )
    pooler = Part("linear", "pooler", {}, {"bias": "all"})
    return [
        Stack("embeddings", 1, tables),
        Stack("block", _layers(settings), block),
        Stack("output", 1, (pooler,)),
    ]


def _gpt_neox(settings: Settings, width: int) -> list[Stack]:
    block = (
        norm("attention norm"),
        attention(settings, width, bias="all" if settings.flag("attention_bias", default=True) else "none"),
        norm("ffn norm"),
        ffn(settings.whole("intermediate_size"), gated=False, bias=True),
    )
    blocks = [Stack("block", _layers(settings), block)]
    return _between_embedding_and_head(settings, blocks, norm("final norm"), tied=False)


def _falcon(settings: Settings, width: int) -> list[Stack]:
    new = settings.flag("new_decoder_architecture", default=False)
    heads = settings.whole("num_attention_heads", "n_head")
    keys = heads if not settings.flag("multi_query", default=True) else 1
    if new:
        keys = settings.whole("num_kv_heads", "n_head_kv", default=heads)
    bias = settings.flag("bias", default=False)
    mixed = Part(
        "attention", "attention", {"heads": heads, "key_heads": keys}, {"bias": "all"} if bias else {}
    )
    norms_in_parallel = settings.whole("num_ln_in_parallel_attn", default=2 if new else 1, most=2)
    two = norms_in_parallel == 2 or not settings.flag("parallel_attn", default=True)
    norms = [norm("attention norm"), norm("ffn norm")] if two else [norm("norm")]
    network = ffn(settings.whole("ffn_hidden_size", default=4 * width), gated=False, bias=bias)
    blocks = [Stack("block", _layers(settings), (*norms[:1], mixed, *norms[1:], network))]
    return _between_embedding_and_head(settings, blocks, norm("final norm"), tied=True)


def _mamba(settings: Settings, width: int) -> list[Stack]:
    blocks = [Stack("block", _layers(settings), (norm("norm", "rms"), mamba_layer(settings, width)))]
    return _between_embedding_and_head(settings, blocks, norm("final norm", "rms"), tied=True)


def _jamba(settings: Settings, width: int) -> list[Stack]:
    blocks = _stacked(jamba_layer(settings, width, index) for index in range(_layers(settings)))
    return _between_embedding_and_head(settings, blocks, norm("final norm", "rms"), tied=False)


def _biased(key: str, default: str) -> Mixer:
    """Return attention whose biases a setting switches: all, or those of queries, keys and values."""

    def mixer(settings: Settings, width: int) -> Part:
        which = "qkv" if default == "qkv" else "all"
        on = settings.flag(key, default=default != "none")
        return attention(settings, width, bias=which if on else "none")

    return mixer


MODEL_TYPES: dict[str, Callable[[Settings, int], list[Stack]]] = {
    "bert": _bert,
    "deepseek": _decoder(_biased("attention_bias", "none"), deepseek_network, tied=False),
    "deepseek_v2": _decoder(latent_attention, deepseek_network, tied=False),
    "deepseek_v3": _decoder(latent_attention, deepseek_network, tied=False),
    "falcon": _falcon,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "jamba": _jamba,
    "llama": _decoder(_biased("attention_bias", "none"), plain_network, tied=False),
    "mamba": _mamba,
    "mistral": _decoder(_biased("attention_bias", "none"), plain_network, tied=False),
    "mixtral": _decoder(_biased("attention_bias", "none"), mixtral_network, tied=False),
    "opt": _opt,
    "qwen2": _decoder(_biased("qkv_bias", "qkv"), plain_network, tied=False),
    "qwen2_moe": _decoder(_biased("qkv_bias", "qkv"), qwen_network, tied=False),
    "qwen3": _decoder(_biased("attention_bias", "none"), plain_network, tied=False),
    "qwen3_moe": _decoder(_biased("attention_bias", "none"), qwen_network, tied=False),
}
