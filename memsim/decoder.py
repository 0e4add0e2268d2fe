"""The letters of a decoder: what the formulas of a training or inference step need to know of a model.

Totals over all layers, so that a model whose layers differ, dense ones and then experts, is no special case.

>>> letters = decoder_letters("gpt3-175b")
>>> letters["L"], letters["h"], letters["W_q"] + letters["W_o"] + letters["W_f"] == 12 * 96 * 12288**2
(96, 12288, True)
>>> sum(letters[name] for name in PARAMETERS)
174604259328
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from memsim.formula import evaluate
from memsim.model import Model, Part
from memsim.parameters import model_of
from memsim.parts import PARTS
from memsim.units import Number
from refimpl.errors import OptionError

__all__ = ["LETTERS", "PARAMETERS", "decoder_letters"]

LETTERS: dict[str, str] = {
    "h": "width of the model",
    "V": "rows of the vocabulary",
    "L": "layers",
    "L_f": "layers with a dense feed-forward network, or experts that every token goes through",
    "L_x": "layers with experts",
    "H": "query heads",
    "H_k": "key and value heads",
    "A_q": "width of all queries of a token and layer",
    "A_k": "width of its keys",
    "A_v": "width of its values",
    "A_o": "width of what attention puts out",
    "A_c": "elements that a cache keeps of a token and layer",
    "A_d": "width of the products of a query with the cache and of the scores with it, in a step of decoding",
    "H_c": "parts into which ranks can divide the cache",
    "W_q": "weights that make queries, keys and values",
    "W_o": "weights of the output projections",
    "j": "matrices of a feed-forward network",
    "F": "width of the dense networks, summed over layers",
    "W_f": "weights of the dense networks",
    "E": "experts of a layer",
    "K_x": "experts that a token goes through, summed over layers",
    "F_x": "their width, summed over layers",
    "W_x": "weights of all experts",
    "W_a": "weights of the experts that a token goes through",
    "W_h": "weights of the output head, its own or the embedding's",
    "P_a": "parameters of attention",
    "P_f": "parameters of dense networks",
    "P_x": "parameters of experts",
    "P_r": "parameters of norms, routers and what else no rank divides",
    "P_i": "parameters before the first layer",
    "P_o": "parameters after the last layer",
    "P_e": "parameters of a tied head, which the last stage of a pipeline holds again",
}
PARAMETERS = ("P_a", "P_f", "P_x", "P_r", "P_i", "P_o")


class _Attention(NamedTuple):
    heads: int
    key_heads: int
    queries: int
    keys: int
    values: int
    out: int
    cached: int
    scored: int
    parts: int


def decoder_letters(model: str | Model, *, pad_vocabulary: int = 1) -> dict[str, Number]:
    """Return the values of `LETTERS`, exact.

    Parameters
    ----------
    model : str or Model
        A name (`memsim.model.model_names`), or a description.
    pad_vocabulary : int
        Round the vocabulary up to a multiple.

    Returns
    -------
    dict of str to int

    Raises
    ------
    UnknownNameError
        If no model has that name.
    OptionError
        If the model is no decoder whose layers all attend alike: an encoder with a decoder, or Mamba.
    """
    described = model_of(model)
    layers = [stack for stack in described.stacks if any(map(_attends, stack.parts))]
    kinds = {_attention(part, described.width) for stack in layers for part in stack.parts if _attends(part)}
    several = any(sum(map(_attends, stack.parts)) != 1 for stack in layers)
    other = {part.kind for stack in described.stacks for part in stack.parts} & {"mamba", "mamba2"}
    if len(kinds) != 1 or several or other:
        raise OptionError(
            f"{described.name}: expected a decoder whose layers attend once and alike; got "
            f"{len(kinds)} kinds of attention{' beside Mamba' if other else ''}"
        )
    found: dict[str, Number] = dict.fromkeys(LETTERS, 0)
    (attention,) = kinds
    found |= {"h": described.width, "H": attention.heads, "H_k": attention.key_heads}
    found |= {"A_q": attention.queries, "A_k": attention.keys, "A_v": attention.values}
    found |= {"A_o": attention.out, "A_c": attention.cached, "A_d": attention.scored, "H_c": attention.parts}
    matrices: set[int] = set()
    for name, value in _counted(described, pad_vocabulary, matrices):
        found[name] = max(found[name], value) if name in ("E", "V") else found[name] + value
    if len(matrices) > 1:
        raise OptionError(f"{described.name}: expected feed-forward networks of one kind; got {matrices}")
    found["j"] = matrices.pop() if matrices else 2
    return found


def _attends(part: Part) -> bool:
    return part.kind in ("attention", "latent_attention")


def _attention(part: Part, width: int) -> _Attention:
    """Return the widths of an attention; a latent one expands its keys and values when it trains."""
    sizes, heads = part.sizes, part.sizes["heads"]
    if part.kind == "latent_attention":
        keys = heads * (sizes["plain"] + sizes["rotary"])
        values = heads * sizes["value_width"]
        cached = sizes["key_rank"] + sizes["rotary"]
        # Decoding folds the expansion into queries and output, which then meet the cache itself.
        scored = heads * (cached + sizes["key_rank"])
        return _Attention(heads, heads, keys, keys, values, values, cached, scored, 1)
    one = sizes.get("head_width", width // heads)
    key_heads = sizes.get("key_heads", heads)
    keys = key_heads * one
    return _Attention(
        heads, key_heads, heads * one, keys, keys, heads * one, 2 * keys, 2 * heads * one, key_heads
    )


def _counted(model: Model, pad: int, matrices: set[int]) -> Iterator[tuple[str, int]]:
    """Yield addends of letters, part by part."""
    inside = False
    for stack in model.stacks:
        blocks = any(map(_attends, stack.parts))
        inside |= blocks
        if blocks:
            yield "L", stack.layers
        for part in stack.parts:
            times = stack.layers
            count, weights = (times * size for size in _sizes(part, model.width, pad))
            match part.kind:
                case _ if not blocks:
                    yield ("P_o" if inside else "P_i"), count
                    if part.kind == "head":
                        rows = -(-part.sizes["rows"] // pad) * pad
                        tied = bool(part.choices.get("tied"))
                        yield from (("V", rows), ("W_h", rows * part.sizes.get("width", model.width)))
                        yield "P_e", rows * part.sizes.get("width", model.width) if tied else 0
                case "attention" | "latent_attention":
                    out = times * _attention(part, model.width).out * model.width
                    yield from (("P_a", count), ("W_o", out), ("W_q", weights - out))
                case "ffn":
                    matrices.add(3 if part.choices.get("gated") else 2)
                    yield from (("P_f", count), ("W_f", weights), ("L_f", times))
                    yield "F", times * part.sizes["width"]
                case "experts":
                    matrices.add(3 if part.choices.get("gated") else 2)
                    active = part.sizes["active"]
                    yield from (("P_x", count), ("W_x", weights), ("L_x", times), ("K_x", times * active))
                    yield from (("E", part.sizes["experts"]), ("F_x", times * active * part.sizes["width"]))
                    yield "W_a", weights * active // part.sizes["experts"]
                case _:
                    yield "P_r", count


def _sizes(part: Part, width: int, pad: int) -> tuple[int, int]:
    """Return the parameters of a part, and those of them that are multiplied: no biases, no norms inside."""
    bare: Mapping[str, str | bool] = {
        key: value for key, value in part.choices.items() if key not in ("bias", "sinks")
    }
    all_of_it, values = PARTS[part.kind](part, width, pad)
    formula, _ = PARTS[part.kind](replace(part, choices=bare), width, pad)
    if part.kind == "latent_attention":
        formula = formula.replace(" + q + ", " + ").replace(" + c + ", " + ")
    return int(evaluate(all_of_it, values)), int(evaluate(formula, values))
