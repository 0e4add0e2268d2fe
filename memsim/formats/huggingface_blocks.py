"""The parts that the families of `huggingface` are made of, from the keys of a ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from memsim.formats.settings import Settings
from memsim.model import Part, Stack
from refimpl.errors import OptionError

__all__ = [
    "Layer",
    "Mixer",
    "Network",
    "Reader",
    "attention",
    "between_embedding_and_head",
    "embedding",
    "ffn",
    "head",
    "latent_attention",
    "layers_of",
    "norm",
    "positions",
    "stacked",
]

Layer = tuple[str, tuple[Part, ...]]  # its name and what it is made of
Mixer = Callable[[Settings, int], Part]
Network = Callable[[Settings, int, int], Layer]
Reader = Callable[[Settings, int], list[Stack]]

# Layers are gone through one by one, so their number is bounded; the deepest that was trained has 2,500
# sublayers (DeepNet, arXiv:2203.00555).
MOST_LAYERS = 2_500
# Their sliding window is that of some layers only; which, makes no difference to anything counted here.
_SOME_LAYERS_SEE_ALL = ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3")


def layers_of(settings: Settings, *names: str) -> int:
    """Return how many layers there are."""
    return settings.whole(*(names or ("num_hidden_layers", "n_layer")), most=MOST_LAYERS)


def stacked(layers: Iterable[Layer]) -> list[Stack]:
    """Return equal layers as one stack each, in the order in which the kinds first appear."""
    kinds: list[Layer] = []
    counts: list[int] = []
    for layer in layers:
        if layer not in kinds:
            kinds.append(layer)
            counts.append(0)
        counts[kinds.index(layer)] += 1
    return [Stack(name, count, parts) for (name, parts), count in zip(kinds, counts, strict=True)]


def between_embedding_and_head(
    settings: Settings, blocks: Iterable[Stack], final: Part, *, tied: bool, before: tuple[Part, ...] = ()
) -> list[Stack]:
    """Return a whole decoder; `before` is what follows the table of tokens, such as one of positions."""
    ends = final, head(settings, tied=tied)
    return [Stack("embeddings", 1, (embedding(settings), *before)), *blocks, Stack("output", 1, ends)]


def embedding(settings: Settings, width: int | None = None) -> Part:
    """Return the table of tokens, of the width of the model unless it has its own."""
    return Part("embedding", "tokens", _rows(settings, width), {"vocabulary": True})


def positions(settings: Settings, *names: str, more: int = 0, name: str = "positions") -> Part:
    """Return a learned table of positions; `more` rows of it are never used."""
    rows = settings.whole(*(names or ("max_position_embeddings",))) + more
    return Part("embedding", name, {"rows": rows})


def head(settings: Settings, *, tied: bool, width: int | None = None, bias: bool = False) -> Part:
    """Return the output projection; `tied` is what the family does where the file is silent."""
    tied = settings.flag("tie_word_embeddings", default=tied)
    choices: dict[str, str | bool] = {"vocabulary": True, "tied": tied} | ({"bias": "all"} if bias else {})
    if settings.get("final_logit_softcapping") is not None:
        choices["cap"] = True
    return Part("head", "head", _rows(settings, width), choices)


def _rows(settings: Settings, width: int | None) -> dict[str, int]:
    return {"rows": settings.whole("vocab_size")} | ({} if width is None else {"width": width})


def norm(name: str, style: str = "layer", width: int | None = None, heads: int | None = None) -> Part:
    """Return a norm, of the width of the model unless it has its own; with `heads`, of each head's."""
    choices: dict[str, str | bool] = {} if style == "layer" else {"style": style}
    sizes = {} if width is None else {"width": width}
    return Part("norm", name, sizes | ({} if heads is None else {"heads": heads}), choices)


def ffn(width: int, *, gated: bool, bias: bool, name: str = "ffn", relu: bool = False) -> Part:
    """Return a feed-forward network; ReLU is told apart, as what it makes is all that it keeps."""
    choices: dict[str, str | bool] = ({"gated": True} if gated else {}) | ({"bias": "all"} if bias else {})
    if relu:
        choices["activation"] = "relu"
    return Part("ffn", name, {"width": width}, choices)


def attention(settings: Settings, width: int, *, bias: str, sinks: bool = False) -> Part:
    """Return attention with as many key heads and as wide ones as the file says."""
    heads = settings.whole("num_attention_heads")
    keys = settings.whole("num_key_value_heads", default=heads)
    wide = settings.whole("head_dim", default=max(width // heads, 1))
    if settings.get("head_dim") is None and width % heads:
        raise OptionError(f"{settings.where}: {heads} heads do not divide a width of {width}")
    if heads % keys:
        raise OptionError(f"{settings.where}: {keys} key heads do not divide {heads} heads")
    sizes = {"heads": heads, "key_heads": keys, "head_width": wide}
    window = settings.whole("sliding_window", default=0, least=0)
    everywhere = settings.get("model_type") not in _SOME_LAYERS_SEE_ALL
    if window and everywhere and settings.flag("use_sliding_window", default=True):
        sizes["window"] = window
    choices: dict[str, str | bool] = {} if bias == "none" else {"bias": bias}
    if sinks:
        choices["sinks"] = True
    if settings.get("attn_logit_softcapping") is not None:
        choices["cap"] = True
    return Part("attention", "attention", sizes, choices)


def latent_attention(settings: Settings, _width: int) -> Part:
    """Return the latent attention of DeepSeek-V2 and V3."""
    sizes = {
        "heads": settings.whole("num_attention_heads"),
        "key_rank": settings.whole("kv_lora_rank"),
        "plain": settings.whole("qk_nope_head_dim"),
        "rotary": settings.whole("qk_rope_head_dim"),
        "value_width": settings.whole("v_head_dim"),
    }
    if settings.get("q_lora_rank") is not None:
        sizes["query_rank"] = settings.whole("q_lora_rank")
    bias = settings.flag("attention_bias", default=False)
    return Part("latent_attention", "latent_attention", sizes, {"bias": "all"} if bias else {})
