"""Cases on which encoder and decoder blocks are judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import Case
from refimpl.transformer.block_weights import weight_names
from refimpl.transformer.positions import alibi_slopes
from refimpl.transformer.rotary import Rope

__all__ = [
    "AXES",
    "DECODER_EDGES",
    "DECODER_OPTIONS",
    "ENCODER_EDGES",
    "ENCODER_OPTIONS",
    "draw_weights",
    "sample_decoder",
    "sample_encoder",
]

# Rows of few features may be nearly constant, and too curved for finite differences: at least 4, or 1.
AXES = {"B": (1, 2), "T": (1, 6), "M": (4, 7), "Hkv": (1, 2), "group": (1, 2), "pairs": (1, 2), "F": (1, 6)}
# What published models are made of: the original Transformer and BERT, GPT-2, LLaMA.
MAKES: dict[str, dict[str, Any]] = {
    "original": {"order": "post", "norm": "layer_norm", "activation": "relu"},
    "bert": {"order": "post", "norm": "layer_norm", "activation": "gelu", "eps": 1e-12},
    "gpt2": {"order": "pre", "norm": "layer_norm", "activation": "gelu_tanh"},
    "llama": {"order": "pre", "norm": "rms_norm", "activation": "silu", "rope": Rope()},
    "gptj": {"order": "pre", "norm": "layer_norm", "activation": "gelu_tanh", "rope": Rope("interleaved")},
}
ENCODER_OPTIONS: dict[str, tuple[Any, ...]] = {
    "make": tuple(MAKES),
    "extra": ("none", "padding", "alibi"),
    "square": (False, True),  # heads together as wide as the tokens
}
DECODER_OPTIONS: dict[str, tuple[Any, ...]] = {
    "make": tuple(MAKES),
    "extra": ("none", "cross", "cross_padding", "alibi"),
    "square": (False, True),
}
_ONE = {"B": 1, "T": 1, "M": 1, "Hkv": 1, "group": 1, "pairs": 1, "F": 1, "extra": "none", "square": False}
_SMALL = {"B": 2, "T": 5, "M": 4, "Hkv": 2, "group": 1, "pairs": 1, "F": 5, "square": True}
ENCODER_EDGES: tuple[dict[str, Any], ...] = (
    {"B": 0, "make": "original"},
    {"T": 0, "make": "gpt2", "extra": "none"},
    {**_ONE, "make": "llama"},
    {**_SMALL, "make": "bert", "extra": "padding"},
    {**_SMALL, "make": "original", "extra": "none"},
    {**_SMALL, "make": "gpt2", "extra": "alibi", "group": 2},
)
DECODER_EDGES: tuple[dict[str, Any], ...] = (
    {"B": 0, "make": "original", "extra": "none"},
    {"T": 0, "make": "gpt2", "extra": "cross"},
    {**_ONE, "make": "llama"},
    {**_SMALL, "make": "original", "extra": "cross_padding"},
    {**_SMALL, "make": "gpt2", "extra": "cross"},
    {**_SMALL, "make": "llama", "extra": "none", "group": 2},
    {**_SMALL, "make": "gptj", "extra": "none", "pairs": 2},
    {**_SMALL, "make": "gpt2", "extra": "alibi"},
)


def draw_weights(
    rng: np.random.Generator,
    names: tuple[str, ...],
    *,
    M: int,
    F: int,
    q_width: int,
    kv_width: int,
) -> dict[str, FloatArray]:
    """Return weights of a block drawn with variance 1 / rows, gains around 1.

    Examples
    --------
    >>> made = draw_weights(np.random.default_rng(0), ("w_k", "gamma_1"), M=4, F=8, q_width=6, kv_width=2)
    >>> [array.shape for array in made.values()]
    [(4, 2), (4,)]
    """
    shapes = {
        "w_q": (M, q_width), "w_k": (M, kv_width), "w_v": (M, kv_width), "w_o": (q_width, M),
        "w_1": (M, F), "w_2": (F, M), "w_gate": (M, F), "w_up": (M, F), "w_down": (F, M),
    }  # fmt: skip
    drawn: dict[str, FloatArray] = {}
    for name in names:
        plain = name.removeprefix("cross_")
        if plain in shapes:
            drawn[name] = rng.standard_normal(shapes[plain]) / np.sqrt(shapes[plain][0])
        elif plain.startswith("b_"):
            drawn[name] = rng.standard_normal(shapes[f"w{plain[1:]}"][1]) / 2
        else:
            drawn[name] = (1.0 if "gamma" in plain else 0.0) + rng.standard_normal(M) / 4
    return drawn


def _sample(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    M: int,
    Hkv: int,
    group: int,
    pairs: int,
    F: int,
    make: str,
    extra: str,
    square: bool = False,
) -> Case:
    settings = MAKES[make]
    if square:
        pairs = max(pairs, 2) if Hkv * group == 1 else pairs
        M = 2 * Hkv * group * pairs
    llama = make == "llama"
    names = weight_names(norm=settings["norm"], gated=llama, biases=not llama, cross="cross" in extra)
    H, D = Hkv * group, 2 * pairs
    weights = draw_weights(rng, names, M=M, F=F, q_width=H * D, kv_width=Hkv * D)
    options = {"num_heads": H, **settings, **weights}
    if group > 1:
        options["num_kv_heads"] = Hkv
    if extra == "alibi":
        options["alibi_slopes"] = alibi_slopes(num_heads=H)
    return Case((rng.standard_normal((B, T, M)),), options)


def sample_encoder(rng: np.random.Generator, *, extra: str, **shape: Any) -> Case:
    """Return one call of `encoder`; "padding" hides some tokens of each sequence, of one perhaps all.

    Examples
    --------
    >>> shape = dict(B=1, T=3, M=4, Hkv=1, group=2, pairs=1, F=5, make="original", extra="none")
    >>> case = sample_encoder(np.random.default_rng(0), **shape)
    >>> case.args[0].shape, case.kwargs["w_q"].shape, case.kwargs["order"]
    ((1, 3, 4), (4, 4), 'post')
    """
    case = _sample(rng, extra=extra, **shape)
    if extra != "padding":
        return case
    B, T, _ = case.args[0].shape
    return case.replace(attn_mask=rng.random((B, 1, 1, T)) < 0.6)


def sample_decoder(rng: np.random.Generator, *, extra: str, **shape: Any) -> Case:
    """Return one call of `decoder`; "cross" adds a context, "cross_padding" hides some of it.

    Examples
    --------
    >>> shape = dict(B=1, T=3, M=4, Hkv=1, group=2, pairs=1, F=5, make="llama", extra="cross")
    >>> sample_decoder(np.random.default_rng(0), **shape).kwargs["context"].shape
    (1, 5, 4)
    """
    case = _sample(rng, extra=extra, **shape)
    if "cross" not in extra:
        return case
    B, T, M = case.args[0].shape
    case = case.replace(context=rng.standard_normal((B, T + 2, M)))
    if extra == "cross_padding":
        return case.replace(context_mask=rng.random((B, 1, 1, T + 2)) < 0.6)
    return case
