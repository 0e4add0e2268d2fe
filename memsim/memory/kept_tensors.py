"""What each kind of part keeps from the forward pass for the backward pass: formulas, tensor by tensor.

Letters: T tokens of a micro-batch, of which b sequences; s tokens of a sequence; e bytes of an activation; u
ranks that divide norms and dropouts along the sequence; the sizes of a part are those of one rank
(`rank_model`), so t of tensor parallelism appears nowhere.  What a norm makes is kept by the maps that
read it, and counts with the norm; statistics are fp32, masks a byte.

>>> from memsim.model import Part
>>> [kept.name for kept in kept_by(Part("ffn", "ffn", {"width": 8}, {"gated": True}), 4, Keeping())]
['gate before', 'gate after', 'other branch', 'product']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from memsim.model import Part
from refimpl.errors import OptionError

__all__ = ["Attention", "Keeping", "Kept", "kept_by"]

Attention = Literal["standard", "flash"]


class Kept(NamedTuple):
    """A tensor that a part keeps; those `of_scores` are what selective recomputation spares."""

    name: str
    formula: str
    sizes: Mapping[str, int]
    of_scores: bool = False


@dataclass(frozen=True, slots=True)
class Keeping:
    """How a model is run, as far as it decides what is kept.

    Attributes
    ----------
    attention : {"standard", "flash"}
        With its matrices of scores, or with one number a row.
    dropout : bool
        On scores, on what attention and networks add to the stream, and on embeddings.
    fused_gate, fused_norm : bool
        A gated network whose product is one kernel keeps three tensors and not four.  An RMSNorm that is
        written out, as transformers writes it, keeps its input in fp32 and what it makes before its weight.
    """

    attention: Attention = "flash"
    dropout: bool = False
    fused_gate: bool = False
    fused_norm: bool = True


def kept_by(part: Part, width: int, how: Keeping) -> list[Kept]:
    """Return what one layer's part keeps.

    Raises
    ------
    OptionError
        If the part is of a kind that nothing is known of, such as Mamba-2.
    """
    if part.kind not in _KEEPERS:
        raise OptionError(f"{part.name}: what a part of kind {part.kind} keeps is not known here")
    return _KEEPERS[part.kind](part, width, how)


def _norm(part: Part, width: int, how: Keeping) -> list[Kept]:
    """Its input, what it makes, and a mean and a deviation of each token (RMSNorm: a deviation).

    What it makes is not kept where it is `added` to the stream, as by the second norms of Gemma 2.
    """
    sizes = {"d": part.sizes.get("width", width)}
    rms, precise = part.choices.get("style") == "rms", bool(part.choices.get("precise"))
    if "heads" in part.sizes:
        return _key_norm(sizes | {"G": part.sizes["heads"]}, how, rms=rms, precise=precise)
    if rms:
        kept = _rms_norm("d", sizes, how, precise=precise)
    else:
        kept = [
            Kept("input", "e*T*d/u", sizes),
            Kept("output", "e*T*d/u", sizes),
            Kept("statistics", "8T/u", {}),
        ]
    return [one for one in kept if one.name != "output"] if part.choices.get("added") else kept


def _rms_norm(
    letter: str, sizes: Mapping[str, int], how: Keeping, read: str = "", *, precise: bool = False
) -> list[Kept]:
    """An RMSNorm of a width; `read` is the width of the tensor that its input is a view of.

    A `precise` one, such as Gemma's, multiplies with its weight in fp32, of which it makes a copy first.
    """
    kept = [Kept("output", f"e*T*{letter}/u", sizes), Kept("statistics", "4T/u", {})]
    if how.fused_norm:
        return [Kept("input", f"e*T*{read or letter}/u", sizes), *kept]
    before = f"4T*{letter}/u + 4{letter}" if precise else f"e*T*{letter}/u"
    return [
        Kept("input in fp32", f"4T*{letter}/u", sizes),
        Kept("before the weight", before, sizes),
        *kept,
    ]


def _key_norm(sizes: Mapping[str, int], how: Keeping, *, rms: bool, precise: bool) -> list[Kept]:
    """A norm of the queries or keys of G heads; what it makes is not kept, as it is only rotated."""
    if rms and not how.fused_norm:
        before = "4T*G*d + 4d" if precise else "e*T*G*d"
        kept = [Kept("input in fp32", "4T*G*d", sizes), Kept("before the weight", before, sizes)]
    else:
        kept = [Kept("input", "e*T*G*d", sizes)]
    return [*kept, Kept("statistics", "4T*G" if rms else "8T*G", sizes)]


def _scores(heads: int, how: Keeping, *, cap: bool = False) -> list[Kept]:
    """Rows of softmax, what a cap makes of scores, and dropout; or the logarithm of each row's sum."""
    sizes = {"H": heads}
    if how.attention == "flash":
        return [Kept("logsumexp", "4T*H", sizes)]
    kept = [Kept("softmax", "e*T*s*H", sizes, of_scores=True)]
    if cap:
        kept.append(Kept("capped scores", "e*T*s*H", sizes, of_scores=True))
    if how.dropout:
        kept += [
            Kept("mask of scores", "T*s*H", sizes, of_scores=True),
            Kept("scores after dropout", "e*T*s*H", sizes, of_scores=True),
        ]
    return kept


def _added(width: int, how: Keeping) -> list[Kept]:
    """The mask of the dropout of what is added to the stream."""
    return [Kept("mask", "T*d/u", {"d": width})] if how.dropout else []


def _attention(part: Part, width: int, how: Keeping) -> list[Kept]:
    heads = part.sizes["heads"]
    keys, head_width = part.sizes.get("key_heads", heads), part.sizes.get("head_width", width // heads)
    # Without flash attention the keys and values of a group are repeated for each of its heads first.
    shared = {"G": keys, "k": head_width} if how.attention == "flash" else {"G": heads, "k": head_width}
    own = {"H": heads, "k": head_width}
    return [
        Kept("queries", "e*T*H*k", own),
        Kept("keys and values", "2e*T*G*k", shared),
        *_scores(heads, how, cap=bool(part.choices.get("cap"))),
        Kept("output", "e*T*H*k", own),
        *_added(width, how),
    ]


def _latent_attention(part: Part, width: int, how: Keeping) -> list[Kept]:
    """The low ranks with their norms, then heads as in any attention; values are a view beside keys."""
    sizes = part.sizes
    ranks = {"c": sizes["key_rank"], "r": sizes["rotary"]}
    heads = {"H": sizes["heads"], "n": sizes["plain"], "r": sizes["rotary"], "v": sizes["value_width"]}
    kept = [
        one._replace(name=f"low rank of keys, {one.name}") for one in _rms_norm("c", ranks, how, "(c + r)")
    ]
    if "query_rank" in sizes:
        low = _rms_norm("q", {"q": sizes["query_rank"]}, how)
        kept += [one._replace(name=f"low rank of queries, {one.name}") for one in low]
    return [
        *kept,
        Kept("queries and keys", "2e*T*H*(n + r)", heads),
        Kept("values", "e*T*H*(n + v)", heads),
        *_scores(sizes["heads"], how),
        Kept("output", "e*T*H*v", heads),
        *_added(width, how),
    ]


def _network(part: Part, how: Keeping, tokens: str, sizes: Mapping[str, int]) -> list[Kept]:
    """The inside of a feed-forward network that sees `tokens` tokens."""
    inside = {**sizes, "f": part.sizes["width"]}
    if part.choices.get("gated"):
        names = ["gate before", *([] if how.fused_gate else ["gate after"]), "other branch", "product"]
    elif part.choices.get("activation") == "relu":
        names = ["after activation"]  # which tells where the input was positive
    else:
        names = ["before activation", "after activation"]
    return [Kept(name, f"e*{tokens}*f", inside) for name in names]


def _ffn(part: Part, width: int, how: Keeping) -> list[Kept]:
    return [*_network(part, how, "T", {}), *_added(width, how)]


def _experts(part: Part, width: int, how: Keeping) -> list[Kept]:
    """A copies of each token, and what experts make of them; no token is dropped.

    Which experts, which tokens stand where by experts, and the way back are indices of eight bytes each.
    """
    sizes = {"A": part.sizes["active"], "d": width}
    return [
        Kept("places and weights of copies", "A*T*(24 + e)", sizes),
        Kept("copies of tokens", "e*A*T*d", sizes),
        *_network(part, how, "A*T", {"A": part.sizes["active"]}),
        Kept("outputs before weighting", "e*A*T*d", sizes),
        *_added(width, how),
    ]


def _linear(part: Part, width: int, _how: Keeping) -> list[Kept]:
    outputs = part.sizes.get("outputs", width)
    if part.name == "router":
        return [Kept("probabilities in fp32", "4T*E", {"E": outputs})]
    if part.name == "shared gate":
        return [Kept("gate", "e*T", {}), Kept("what it weighs", "e*T*d", {"d": width})]
    if part.name == "pooler":  # of the first token, whose state a norm has kept already
        return [Kept("output", "e*b*d", {"d": outputs})]
    if part.name == "projection out":
        return [Kept("output", "e*T*d", {"d": outputs})]
    return [Kept("input", "e*T*d", {"d": part.sizes.get("inputs", width)})]


def _mamba(part: Part, _width: int, _how: Keeping) -> list[Kept]:
    """What Mamba's one kernel saves; convolution and Δ are made again, states kept every 2048 tokens.

    Jamba's norms of Δ, B and C `split` it: convolution, Δ and the gated output are kept then.
    state-spaces/mamba, ops/selective_scan_interface.py, MambaInnerFn and SelectiveScanFn.
    """
    sizes = {"i": part.sizes["inner"], "n": part.sizes["state"], "r": part.sizes["rank"]}
    kept = [
        Kept("both branches", "2e*T*i", sizes),
        Kept("copies of B and C", "2e*T*n", sizes),
        Kept("A, and its exponential, in fp32", "8i*n", sizes),
        Kept("states between chunks in fp32", "8b*i*n*ceil(s/2048)", sizes),
        Kept("output of the scan", "e*T*i", sizes),
    ]
    if part.choices.get("split"):
        return [
            *kept,
            Kept("output of the convolution", "e*T*i", sizes),
            Kept("Δ", "e*T*i", sizes),
            Kept("gated output", "e*T*i", sizes),
        ]
    return [*kept, Kept("low rank of Δ, B and C", "e*T*(r + 2n)", sizes)]


def _embedding(part: Part, width: int, how: Keeping) -> list[Kept]:
    """The ids of the tokens, of eight bytes; dropout follows the last table and counts with the first."""
    if part.name != "tokens":
        return []
    return [Kept("ids", "8T", {}), *_added(width, how)]


def _head(part: Part, _width: int, _how: Keeping) -> list[Kept]:
    sizes = {"V": part.sizes["rows"]}
    capped = [Kept("capped logits", "e*T*V", sizes)] if part.choices.get("cap") else []
    return [*capped, Kept("log-probabilities in fp32", "4T*V", sizes)]


_KEEPERS: dict[str, Callable[[Part, int, Keeping], list[Kept]]] = {
    "attention": _attention,
    "embedding": _embedding,
    "experts": _experts,
    "ffn": _ffn,
    "head": _head,
    "latent_attention": _latent_attention,
    "linear": _linear,
    "mamba": _mamba,
    "norm": _norm,
}
