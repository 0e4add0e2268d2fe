"""What counts each kind of part of a model: a formula for one layer, and the values of its letters.

>>> PARTS["experts"](Part("experts", "experts", {"experts": 8, "active": 2, "width": 14}), 4, 1)
('E*(2d*f)', {'E': 8, 'd': 4, 'f': 14})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from memsim.model import Part
from refimpl.errors import OptionError

__all__ = ["PARTS", "Counted"]

Counted = tuple[str, Mapping[str, int]]


def _embedding(part: Part, width: int, pad: int) -> Counted:
    """A table: V rows of width d.  Rows of a vocabulary are padded to a multiple of m."""
    values = {"V": part.sizes["rows"], "d": part.sizes.get("width", width)}
    if pad > 1 and part.choices.get("vocabulary"):
        return "ceil(V/m)*m*d", values | {"m": pad}
    return "V*d", values


def _head(part: Part, width: int, pad: int) -> Counted:
    """The output projection: no tensor of its own where it is tied to the embedding."""
    if part.choices.get("tied"):
        return "0", {}
    formula, values = _embedding(part, width, pad)
    return (f"{formula} + V", values) if _bias(part, "all") else (formula, values)


# LayerNorm has a weight and a bias, or a weight alone, or neither; RMSNorm a weight.
_NORMS = {"layer": "2d", "rms": "d", "layer without bias": "d", "layer without weights": "0"}


def _norm(part: Part, width: int, _pad: int) -> Counted:
    """A norm of width d; a norm of queries or keys may have a weight for each of G heads."""
    style = str(part.choices.get("style", "layer"))
    if style not in _NORMS:
        raise OptionError(f"{part.name}: expected style {' or '.join(map(repr, _NORMS))}; got {style!r}")
    if _NORMS[style] == "0":
        return "0", {}
    values = {"d": part.sizes.get("width", width)}
    if part.choices.get("own"):
        return f"G*{_NORMS[style]}", values | {"G": part.sizes["heads"]}
    return _NORMS[style], values


def _attention(part: Part, width: int, _pad: int) -> Counted:
    """H query heads and G key and value heads of width k, and the output projection."""
    heads = part.sizes["heads"]
    keys, head_width = part.sizes.get("key_heads", heads), part.sizes.get("head_width")
    if head_width is None:
        if width % heads:
            raise OptionError(f"{part.name}: heads must divide the width; got {heads} and {width}")
        head_width = width // heads
    if heads % keys:
        raise OptionError(f"{part.name}: key heads must divide heads; got {keys} and {heads}")
    formula = "d*k*(H + 2G) + H*k*d"
    if _bias(part, "all", "qkv"):
        formula += " + k*(H + 2G)"
    if _bias(part, "all", "out"):
        formula += " + d"
    if part.choices.get("sinks"):  # a number for each head, beside its scores
        formula += " + H"
    return formula, {"d": width, "H": heads, "G": keys, "k": head_width}


def _ffn(part: Part, width: int, _pad: int) -> Counted:
    """Two matrices between widths d and f, or three with a gate."""
    matrices = 3 if part.choices.get("gated") else 2
    formula = f"{matrices}d*f"
    if _bias(part, "all"):
        formula += " + 2f + d" if matrices == 3 else " + f + d"
    return formula, {"d": width, "f": part.sizes["width"]}


def _linear(part: Part, width: int, _pad: int) -> Counted:
    """A matrix of n inputs and m outputs, the model's width where they are not given."""
    values = {"n": part.sizes.get("inputs", width), "m": part.sizes.get("outputs", width)}
    return "n*m + m" if _bias(part, "all") else "n*m", values


def _experts(part: Part, width: int, pad: int) -> Counted:
    """E feed-forward networks; how many of them a token activates is a size that nothing here reads."""
    experts, active = part.sizes["experts"], part.sizes["active"]
    if not 0 < active <= experts:
        raise OptionError(f"{part.name}: expected 1 to {experts} active experts; got {active}")
    formula, values = _ffn(part, width, pad)
    return f"E*({formula})", {"E": experts, **values}


def _latent_attention(part: Part, width: int, _pad: int) -> Counted:
    """Multi-head latent attention: queries through rank q, keys and values through rank c, both normalised.

    A head's query and key have n entries without a position and r with one; the r of the key is shared by
    all heads.  Without a rank of queries, as in DeepSeek-V2-Lite, one matrix makes them.
    """
    names = {"H": "heads", "c": "key_rank", "n": "plain", "r": "rotary", "v": "value_width"}
    queries, biases = "d*H*(n + r)", " + c + r + d"
    if "query_rank" in part.sizes:
        names["q"] = "query_rank"
        queries, biases = "d*q + q + q*H*(n + r)", " + q + c + r + d"
    formula = f"{queries} + d*(c + r) + c + c*H*(n + v) + H*v*d"
    if _bias(part, "all"):  # of the three maps from and to the width of the model
        formula += biases
    return formula, {"d": width, **{letter: part.sizes[name] for letter, name in names.items()}}


def _mamba(part: Part, width: int, _pad: int) -> Counted:
    """Mamba: in to 2i, convolution of k, to Δ (rank r), B and C, Δ back to i, A of i x n, D, and out."""
    formula = "d*2i + i*k + i + i*(r + 2n) + r*i + i + i*n + i + i*d"
    if _bias(part, "all"):  # of the maps in and out; convolution and Δ always have theirs
        formula += " + 2i + d"
    names = {"i": "inner", "k": "kernel", "r": "rank", "n": "state"}
    return formula, {"d": width, **{letter: part.sizes[name] for letter, name in names.items()}}


def _mamba2(part: Part, width: int, _pad: int) -> Counted:
    """Mamba-2: in to 2i, B and C of G groups and Δ of H heads; convolution; Δ's bias, A, D; norm; out."""
    formula = "d*(2i + 2G*n + H) + (i + 2G*n)*k + 3H + i + i*d"
    if part.choices.get("convolution_bias", True):
        formula += " + i + 2G*n"
    if _bias(part, "all"):  # of the maps in and out
        formula += " + 2i + 2G*n + H + d"
    names = {"i": "inner", "k": "kernel", "n": "state", "G": "groups", "H": "heads"}
    return formula, {"d": width, **{letter: part.sizes[name] for letter, name in names.items()}}


def _bias(part: Part, *which: str) -> bool:
    """Return whether the biases of a part are among `which`."""
    bias = part.choices.get("bias", "none")
    if bias not in ("none", "all", "qkv", "out"):
        raise OptionError(f"{part.name}: expected bias 'none', 'all', 'qkv' or 'out'; got {bias!r}")
    return bias in which


# What counts each kind of part: (part, width of the model, multiple to pad a vocabulary to) to a formula for
# one layer and its values.  A new architecture is a new entry here, and its sizes in a data file.
PARTS: dict[str, Callable[[Part, int, int], Counted]] = {
    "attention": _attention,
    "embedding": _embedding,
    "experts": _experts,
    "ffn": _ffn,
    "head": _head,
    "latent_attention": _latent_attention,
    "linear": _linear,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "norm": _norm,
}
