"""What one rank holds of a model is a model again: a stage of its layers, and a slice of its matrices.

So whatever is counted of a model is counted of a rank by the same code.

>>> whole = model("llama-2-7b")
>>> first = stage_model(whole, pipeline=4, index=0)
>>> [(stack.name, stack.layers) for stack in first.stacks]
[('embeddings', 1), ('block', 8)]
>>> rank_model(first, tensor=8).part("block", "attention").sizes["heads"]
4
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from memsim.model import Model, Part, Stack, model
from refimpl.errors import OptionError
from refimpl.validation import whole

__all__ = ["ENDS", "block_layers", "model", "rank_model", "stage_model"]

# What stands before and after the layers; all other stacks are layers, which stages divide.
ENDS = ("embeddings", "output")


def block_layers(model: Model) -> int:
    """Return how many layers a model has, embeddings and output not counted.

    >>> block_layers(model("deepseek-v3"))
    61
    """
    return sum(stack.layers for stack in model.stacks if stack.name not in ENDS)


def stage_model(model: Model, *, pipeline: int, index: int) -> Model:
    """Return the part of a model that one stage of a pipeline holds.

    Parameters
    ----------
    model : Model
        The whole.
    pipeline, index : int
        Stages, and which of them, from 0.  The first has the embeddings, the last the output; the layers are
        divided as evenly as they can be, more of them to earlier stages.

    Returns
    -------
    Model
        A tied head that stands in another stage than its embedding is a copy and has parameters of its own.

    Raises
    ------
    OptionError
        If there is no such stage, or there are more stages than layers.
    """
    layers = block_layers(model)
    if not 1 <= whole("pipeline", pipeline) <= max(layers, 1):
        raise OptionError(f"pipeline: expected 1 to {layers} stages for as many layers; got {pipeline}")
    if not 0 <= whole("index", index, 0) < pipeline:
        raise OptionError(f"index: expected a stage from 0 to {pipeline - 1}; got {index}")
    each, more = divmod(layers, pipeline)
    start = index * each + min(index, more)
    stop = start + each + (index < more)
    stacks: list[Stack] = []
    seen = 0
    for stack in model.stacks:
        if stack.name == "embeddings":
            stacks += [stack] * (index == 0)
        elif stack.name == "output":
            stacks += [_untied(stack) if pipeline > 1 else stack] * (index == pipeline - 1)
        else:
            held = min(stop, seen + stack.layers) - max(start, seen)
            seen += stack.layers
            stacks += [replace(stack, layers=held)] * (held > 0)
    return replace(model, stacks=tuple(stacks))


def _untied(stack: Stack) -> Stack:
    def copied(part: Part) -> Part:
        return replace(part, choices={**part.choices, "tied": False}) if part.kind == "head" else part

    return replace(stack, parts=tuple(map(copied, stack.parts)))


def rank_model(model: Model, *, tensor: int = 1, expert: int = 1) -> Model:
    """Return what one rank holds of a model when t ranks divide its matrices and e ranks its experts.

    Parameters
    ----------
    model : Model
        The whole, or a stage of it.
    tensor, expert : int
        t and e.  Heads, inner widths, and rows of vocabularies (padded) are divided among t; a key head that
        is not enough for all of them is on several; norms, positions, routers and the maps into low ranks are
        on every rank.  Experts are divided among e, and each of them among t.

    Returns
    -------
    Model

    Raises
    ------
    OptionError
        If t does not divide heads and widths, or e the experts.

    Examples
    --------
    >>> from memsim.parameters import parameters
    >>> parameters(model=rank_model(model("gpt3-175b"), tensor=8)).total
    21853777920
    """
    t, e = whole("tensor", tensor), whole("expert", expert)
    if t == e == 1:
        return model
    stacks = (
        replace(
            stack, parts=tuple(_SLICED.get(part.kind, _all)(part, model.width, t, e) for part in stack.parts)
        )
        for stack in model.stacks
    )
    return replace(model, stacks=tuple(stacks))


def _divided(part: Part, name: str, by: int, what: str) -> int:
    size = part.sizes[name]
    if size % by:
        raise OptionError(
            f"{what}: expected a divisor of the {size} {name.replace('_', ' ')} of {part.name}; got {by}"
        )
    return size // by


def _all(part: Part, _width: int, _t: int, _e: int) -> Part:
    return part


def _rows(part: Part, _width: int, t: int, _e: int) -> Part:
    if not part.choices.get("vocabulary"):
        return part
    return replace(part, sizes={**part.sizes, "rows": -(-part.sizes["rows"] // t)})


def _attention(part: Part, width: int, t: int, _e: int) -> Part:
    heads = part.sizes["heads"]
    keys = part.sizes.get("key_heads", heads)
    sizes = {
        **part.sizes,
        "heads": _divided(part, "heads", t, "tensor"),
        "head_width": part.sizes.get("head_width", width // heads),
    }
    if keys % t and t % keys:
        raise OptionError(f"tensor: expected a divisor or a multiple of {keys} key heads; got {t}")
    return replace(part, sizes=sizes | {"key_heads": max(keys // t, 1)})


def _heads(part: Part, _width: int, t: int, _e: int) -> Part:
    return replace(part, sizes={**part.sizes, "heads": _divided(part, "heads", t, "tensor")})


def _norm(part: Part, _width: int, t: int, _e: int) -> Part:
    """Norms are whole on every rank; one of each head's queries or keys sees the heads of its rank only."""
    if part.sizes.get("heads", 1) == 1:
        return part
    return replace(part, sizes={**part.sizes, "heads": max(part.sizes["heads"] // t, 1)})


def _ffn(part: Part, _width: int, t: int, _e: int) -> Part:
    return replace(part, sizes={**part.sizes, "width": _divided(part, "width", t, "tensor")})


def _experts(part: Part, _width: int, t: int, e: int) -> Part:
    held = _divided(part, "experts", e, "expert")
    sizes = {**part.sizes, "width": _divided(part, "width", t, "tensor"), "experts": held}
    return replace(part, sizes=sizes | {"active": min(part.sizes["active"], held)})


def _mamba(part: Part, _width: int, t: int, _e: int) -> Part:
    return replace(part, sizes={**part.sizes, "inner": _divided(part, "inner", t, "tensor")})


_SLICED: dict[str, Callable[[Part, int, int, int], Part]] = {
    "attention": _attention,
    "embedding": _rows,
    "experts": _experts,
    "ffn": _ffn,
    "head": _rows,
    "latent_attention": _heads,
    "mamba": _mamba,
    "norm": _norm,
}
