"""A decoder with mixture-of-experts layers, described by the columns in which papers print it.

>>> mixtral = sparse(
...     layers=32, moe_layers=32, width=4096, heads=32, head_width=128, key_heads=8, experts=8, active=2,
...     expert_width=14336, vocabulary=32000, gated=True, tied=False, norm="rms",
... )
>>> from memsim.parameters import parameters
>>> parameters(model=mixtral).total
46702792704
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from memsim.model import Model, Part, Stack
from refimpl.errors import OptionError
from refimpl.validation import whole

__all__ = ["experts_block", "sparse"]


def experts_block(*, experts: int, active: int, width: int, gated: bool) -> tuple[Part, ...]:
    """Return a router, and the experts that it chooses from.

    Examples
    --------
    >>> [part.kind for part in experts_block(experts=8, active=2, width=64, gated=True)]
    ['linear', 'experts']
    """
    sizes = {"experts": experts, "active": active, "width": width}
    return (
        Part("linear", "router", {"outputs": experts}),
        Part("experts", "experts", sizes, {"gated": True} if gated else {}),
    )


def sparse(
    *,
    layers: int,
    width: int,
    heads: int,
    head_width: int,
    experts: int,
    active: int,
    expert_width: int,
    moe_layers: int | None = None,
    more_experts: Mapping[int, int] | None = None,
    ffn: int = 0,
    shared_width: int = 0,
    key_heads: int | None = None,
    vocabulary: int = 0,
    gated: bool = False,
    tied: bool = True,
    norm: Literal["rms", "layer"] | None = None,
) -> Model:
    """Return a decoder some of whose layers have experts in place of the feed-forward network.

    Parameters
    ----------
    layers, width, heads, head_width : int
        L, d, H and the width of a head, whose product need not be d.
    experts, active, expert_width : int
        Experts of a layer, experts a token, and their width.
    moe_layers : int, optional
        Layers with experts.  Default: all.
    more_experts : mapping of int to int, optional
        Further layers with experts: their number of experts to the number of layers, taken off `moe_layers`.
    ffn : int
        Width of the feed-forward network of the other layers; 0 where there are none.
    shared_width : int
        Width of the network that every token of a layer with experts goes through too; 0 for none.
    key_heads : int, optional
        Default: `heads`.
    vocabulary : int
        Rows of embedding and head; 0 leaves both out.
    gated, tied : bool
        Three matrices in every network; the head is the embedding.
    norm : {"rms", "layer"}, optional
        Two norms a layer and a last one.  Default: none are counted.

    Returns
    -------
    Model

    Raises
    ------
    OptionError
        If numbers of layers do not fit, layers without experts have no network, or a size is below its least.

    Examples
    --------
    >>> shape = dict(layers=4, width=8, heads=2, head_width=4, experts=4, active=1, expert_width=16)
    >>> [(s.name, s.layers) for s in sparse(**shape, moe_layers=2, ffn=32).stacks]
    [('dense block', 2), ('MoE block', 2)]
    """
    others = dict(more_experts or {})
    sparse_layers = whole("layers", layers) if moe_layers is None else whole("moe_layers", moe_layers, 0)
    plain, first = layers - sparse_layers, sparse_layers - sum(others.values())
    if plain < 0 or first < 0:
        raise OptionError(f"moe_layers: expected at most {layers} and at least those of more_experts")
    if plain and not ffn:
        raise OptionError(f"ffn: {plain} layers have no experts and need a width")
    for name, value in {"width": width, "heads": heads, "head_width": head_width}.items():
        whole(name, value)
    attention = {"heads": heads, "head_width": head_width} | ({"key_heads": key_heads} if key_heads else {})
    style: dict[str, str | bool] = {} if norm == "layer" else {"style": "rms"}
    gate: dict[str, str | bool] = {"gated": True} if gated else {}

    def block(*network: Part) -> tuple[Part, ...]:
        norms = [Part("norm", f"{name} norm", {}, style) for name in ("attention", "ffn")] if norm else []
        return (*norms[:1], Part("attention", "attention", attention), *norms[1:], *network)

    shared = (Part("ffn", "shared experts", {"width": shared_width}, gate),) if shared_width else ()
    stacks = [Stack("dense block", plain, block(Part("ffn", "ffn", {"width": ffn}, gate)))] if plain else []
    for number, count in ((experts, first), *others.items()):
        if count:
            chosen = experts_block(experts=number, active=active, width=expert_width, gated=gated)
            name = "MoE block" if number == experts else f"MoE block of {number}"
            stacks.append(Stack(name, count, block(*shared, *chosen)))
    if vocabulary:
        rows = {"rows": whole("vocabulary", vocabulary)}
        tokens = Part("embedding", "tokens", rows, {"vocabulary": True})
        last = (Part("norm", "final norm", {}, style),) if norm else ()
        head = Part("head", "head", rows, {"vocabulary": True, "tied": tied})
        stacks = [Stack("embeddings", 1, (tokens,)), *stacks, Stack("output", 1, (*last, head))]
    return Model("sparse model", "as described by the caller", width, tuple(stacks))
