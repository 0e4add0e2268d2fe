"""The linear layers of a model's block by name, apart or, where they read one input, several as one.

>>> for layer in layers_of("llama-2-70b", [16], [("k", "v")]):
...     print(layer.shape, ", ".join(layer.names))
(16, 8192, 8192) q, o
(16, 8192, 1024) k, v
(16, 8192, 28672) gate, up
(16, 28672, 8192) down
(16, 8192, 2048) k+v
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from memsim.model import Part

__all__ = ["JOINT", "NAMES", "Layer", "Projection", "layers_of", "projections"]

NAMES = ("q", "k", "v", "o", "gate", "up", "down")
JOINT = "+"  # between the names of projections that are one layer


class Projection(NamedTuple):
    """A linear map of a block: what it reads, in words, and how many features it takes and makes."""

    reads: str
    inputs: int
    outputs: int


class Layer(NamedTuple):
    """What `frugal bench` times for a model at once: projections of one size, or several as one.

    `names` are those of all layers of that size; one that is made of several is called ``k+v``, say.
    """

    model: str
    names: tuple[str, ...]
    shape: tuple[int, int, int]


def layers_of(name: str, tokens: Iterable[int], merge: Sequence[Sequence[str]] = ()) -> list[Layer]:
    """Return the layers of a model's block, those of one size once, and then those of `merge` as one each.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    click.UsageError
        If the model has no such block, or no such projections, or those of one layer read different inputs.
    """
    found = projections(name)
    sizes: dict[tuple[int, int], tuple[str, ...]] = {}
    for each, (_, inputs, outputs) in found.items():
        sizes[inputs, outputs] = (*sizes.get((inputs, outputs), ()), each)
    named = [(names, size) for size, names in sizes.items()]
    named += [((JOINT.join(group),), _joined(found, group)) for group in _groups(name, found, merge)]
    return [Layer(name, names, (M, *size)) for M in tokens for names, size in named]


def projections(name: str) -> dict[str, Projection]:
    """Return the linear layers of a model's block; experts, of which each has tokens of its own, are none.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    click.UsageError
        If its blocks are of several kinds, or have no such layers.

    Examples
    --------
    >>> projections("mistral-7b")["k"]
    Projection(reads='input of attention', inputs=4096, outputs=1024)
    """
    from memsim.model import model

    described = model(name)
    blocks = [stack for stack in described.stacks if stack.layers > 1]
    if len(blocks) != 1:
        kinds = ", ".join(stack.name for stack in blocks)
        raise click.UsageError(f"--model: {name} has blocks of several kinds, {kinds}; give sizes as --shape")
    found: dict[str, Projection] = {}
    for part in blocks[0].parts:
        found |= _of_part(part, described.width)
    if not found:
        raise click.UsageError(f"--model: {name} has no attention or feed-forward network with linear layers")
    return found


def _of_part(part: Part, width: int) -> dict[str, Projection]:
    """Return the layers of attention or of a feed-forward network; of other parts none."""
    before = f"input of {part.name}"
    if part.kind == "attention":
        heads = part.sizes["heads"]
        head_width = part.sizes.get("head_width", width // heads)
        queries, keys = heads * head_width, part.sizes.get("key_heads", heads) * head_width
        return {
            "q": Projection(before, width, queries),
            "k": Projection(before, width, keys),
            "v": Projection(before, width, keys),
            "o": Projection("heads", queries, width),
        }
    if part.kind == "ffn":
        inner = part.sizes["width"]
        first = ("gate", "up") if part.choices.get("gated") else ("up",)
        return {
            **{name: Projection(before, width, inner) for name in first},
            "down": Projection("activations", inner, width),
        }
    return {}


def _groups(
    name: str, found: Mapping[str, Projection], merge: Sequence[Sequence[str]]
) -> list[tuple[str, ...]]:
    """Return the names of each layer of several, in the order of the model, and each such layer once."""
    for group in merge:
        for each in group:
            if each not in found:
                raise click.UsageError(
                    f"--merge: {name} has no projection {each!r}; it has {', '.join(found)}"
                )
        if len({found[each].reads for each in group}) != 1:
            raise click.UsageError(
                f"--merge: {', '.join(group)} of {name} read different inputs;"
                f" of one input are {_alike(found)}"
            )
    return list(dict.fromkeys(tuple(each for each in found if each in group) for group in merge))


def _joined(found: Mapping[str, Projection], group: Sequence[str]) -> tuple[int, int]:
    """Return inputs and outputs of one layer that is made of several."""
    return found[group[0]].inputs, sum(found[each].outputs for each in group)


def _alike(found: Mapping[str, Projection]) -> str:
    """Return in words which projections can be one layer."""
    readers: dict[str, list[str]] = {}
    for name, projection in found.items():
        readers.setdefault(projection.reads, []).append(name)
    return "; ".join(", ".join(names) for names in readers.values() if len(names) > 1)
