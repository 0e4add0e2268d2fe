"""Decoders of one pattern: norms, a mixer and a network in every layer, between an embedding and a head.

What tells the families of a ``config.json`` apart is a line of `DECODERS` each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from memsim.formats import huggingface_networks as networks
from memsim.formats.huggingface_blocks import (
    Layer,
    Mixer,
    Network,
    Reader,
    attention,
    embedding,
    head,
    latent_attention,
    layers_of,
    norm,
    stacked,
)
from memsim.formats.settings import Settings
from memsim.model import Part, Stack

__all__ = ["DECODERS"]

KeyNorms = Callable[[Settings, Part, str], tuple[Part, ...]]


def _biased(key: str = "attention_bias", which: str = "all", *, default: bool = False) -> Mixer:
    """Return attention whose biases, all or those of queries, keys and values, a setting switches."""

    def mixer(settings: Settings, width: int) -> Part:
        on = settings.flag(key, default=default)
        return attention(settings, width, bias=which if on else "none")

    return mixer


def _fixed(bias: str) -> Mixer:
    return lambda settings, width: attention(settings, width, bias=bias)


def _with_sinks(settings: Settings, width: int) -> Part:
    bias = "all" if settings.flag("attention_bias", default=False) else "none"
    return attention(settings, width, bias=bias, sinks=True)


def _no_norms(_settings: Settings, _mixed: Part, _style: str) -> tuple[Part, ...]:
    return ()


def _of_heads(key: str = "", *, style: str = "", own: bool = False) -> KeyNorms:
    """Return the norms of each head's queries and keys; `own` gives every head a weight of its own."""

    def norms(settings: Settings, mixed: Part, usual: str) -> tuple[Part, ...]:
        if key and not settings.flag(key, default=False):
            return ()
        sizes = mixed.sizes
        made = (
            norm(f"{of} norm", style or usual, sizes["head_width"], sizes[heads])
            for of, heads in (("query", "heads"), ("key", "key_heads"))
        )
        return tuple(Part(p.kind, p.name, p.sizes, {**p.choices, "own": True}) if own else p for p in made)

    return norms


def _of_all(_settings: Settings, mixed: Part, style: str) -> tuple[Part, ...]:
    """Return norms of all queries of a token and of all its keys, as OLMo 2 has."""
    wide = mixed.sizes["head_width"]
    return tuple(
        norm(f"{of} norm", style, mixed.sizes[heads] * wide, 1)
        for of, heads in (("query", "heads"), ("key", "key_heads"))
    )


@dataclass(frozen=True, slots=True)
class Decoder:
    """One family.

    Attributes
    ----------
    mixer, network : callable
        What reads attention, and the network of a layer.
    tied : bool
        Whether the head is the embedding where the file is silent.
    norms : {"before", "after", "around", "one"}
        Of mixer and network: before each, after each, both; or one for the two, which then stand in parallel.
    style, precise : str, bool
        Of all norms; precise ones multiply with their weight in fp32.
    key_norms : callable
        What reads the norms of queries and keys.
    head_bias : str
        The setting that gives the head a bias, ``"always"``, or nothing.
    parallel : str
        The setting with which there is one norm for mixer and network.
    """

    mixer: Mixer
    network: Network
    tied: bool = False
    norms: Literal["before", "after", "around", "one"] = "before"
    style: str = "rms"
    precise: bool = False
    key_norms: KeyNorms = _no_norms
    head_bias: str = ""
    parallel: str = ""

    def __call__(self, settings: Settings, width: int) -> list[Stack]:
        """Return the stacks that a file describes."""
        mixed = self.mixer(settings, width)
        keys = tuple(map(self._made, self.key_norms(settings, mixed, self.style)))

        def layer(index: int) -> Layer:
            name, parts = self.network(settings, width, index)
            return name, self._layer(settings, (mixed, *keys), parts)

        bias = self.head_bias == "always" or (
            bool(self.head_bias) and settings.flag(self.head_bias, default=False)
        )
        ends = self._norm("final norm"), head(settings, tied=self.tied, bias=bias)
        blocks = stacked(map(layer, range(layers_of(settings))))
        return [Stack("embeddings", 1, (embedding(settings),)), *blocks, Stack("output", 1, ends)]

    def _layer(
        self, settings: Settings, mixed: tuple[Part, ...], network: tuple[Part, ...]
    ) -> tuple[Part, ...]:
        if self.norms == "one" or (self.parallel and settings.flag(self.parallel, default=False)):
            return self._norm("norm"), *mixed, *network
        first, second = (self._norm(f"{of} norm") for of in ("attention", "ffn"))
        if self.norms == "before":
            return first, *mixed, second, *network
        if self.norms == "after":
            return *mixed, first, *network, second
        third, fourth = (_added(self._norm(f"{of} norm after")) for of in ("attention", "ffn"))
        return first, *mixed, third, second, *network, fourth

    def _norm(self, name: str) -> Part:
        return self._made(norm(name, self.style))

    def _made(self, part: Part) -> Part:
        return replace(part, choices={**part.choices, "precise": True}) if self.precise else part


def _added(part: Part) -> Part:
    return replace(part, choices={**part.choices, "added": True})


_BARE = "layer without bias"
_LLAMA = Decoder(_biased(), networks.gated())
_QKV = _biased("qkv_bias", "qkv", default=True)

DECODERS: dict[str, Reader] = {
    "cohere": Decoder(
        _biased(), networks.gated(""), tied=True, norms="one", style=_BARE,
        key_norms=_of_heads("use_qk_norm", own=True),
    ),
    "cohere2": Decoder(_biased(), networks.gated(""), tied=True, norms="one", style=_BARE),
    "deepseek": Decoder(_biased(), networks.deepseek),
    "deepseek_v2": Decoder(latent_attention, networks.deepseek),
    "deepseek_v3": Decoder(latent_attention, networks.deepseek),
    "ernie4_5": Decoder(_biased("use_bias"), networks.gated("use_bias"), tied=True),
    "exaone4": Decoder(_fixed("none"), networks.gated(""), norms="after", key_norms=_of_heads()),
    "gemma": Decoder(_biased(), networks.gated(""), tied=True, precise=True),
    "gemma2": Decoder(_biased(), networks.gated(""), tied=True, norms="around", precise=True),
    "gemma3_text": Decoder(
        _biased(), networks.gated(""), tied=True, norms="around", precise=True, key_norms=_of_heads(),
    ),
    "glm": Decoder(_biased(which="qkv"), networks.gated("")),
    "glm4": Decoder(_biased(which="qkv"), networks.gated(""), norms="around"),
    "gpt_oss": Decoder(_with_sinks, networks.biased_experts),
    "granite": _LLAMA,
    "granitemoe": Decoder(_biased(), networks.mixture),
    "llama": _LLAMA,
    "llama4_text": Decoder(_biased(), networks.llama4),
    "mistral": _LLAMA,
    "mixtral": Decoder(_biased(), networks.mixture),
    "nemotron": Decoder(_biased(), networks.two_matrices("mlp_bias", bias=False), style="layer"),
    "olmo": Decoder(_biased(), networks.gated(""), style="layer without weights"),
    "olmo2": Decoder(_biased(), networks.gated(""), norms="after", key_norms=_of_all),
    "olmo3": Decoder(_biased(), networks.gated(""), norms="after", key_norms=_of_all),
    "olmoe": Decoder(_biased(), networks.mixture, key_norms=_of_all),
    "phi": Decoder(
        _fixed("all"), networks.two_matrices(), norms="one", style="layer",
        key_norms=_of_heads("qk_layernorm"), head_bias="always",
    ),
    "phi3": Decoder(_fixed("none"), networks.gated("")),
    "phimoe": Decoder(_biased(), networks.mixture, style="layer", head_bias="lm_head_bias"),
    "qwen2": Decoder(_QKV, networks.gated()),
    "qwen2_moe": Decoder(_QKV, networks.qwen),
    "qwen3": Decoder(_biased(), networks.gated(), key_norms=_of_heads()),
    "qwen3_moe": Decoder(_biased(), networks.qwen, key_norms=_of_heads()),
    "smollm3": Decoder(_biased(), networks.gated(), tied=True),
    "stablelm": Decoder(
        _biased("use_qkv_bias", "qkv"), networks.gated(""), style="layer", parallel="use_parallel_residual",
        key_norms=_of_heads("qk_layernorm", style=_BARE, own=True),
    ),
    "starcoder2": Decoder(
        _biased("use_bias", default=True), networks.two_matrices("use_bias"), tied=True, style="layer"
    ),
}  # fmt: skip
