"""Oracles of what fine-tuning trains: the shapes of every tensor listed, and modules of PyTorch counted."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.scaling_laws import as_total


def _counted(shapes: list[tuple[int, ...]]) -> Any:
    return as_total("parameters", Fraction(sum(math.prod(shape) for shape in shapes)))


@oracle("cost.lora_parameters")
def pairs_of_factors(*, layers: int, width: int, rank: int, matrices: int) -> Any:
    shapes: list[tuple[int, ...]] = []
    for _ in range(layers * matrices):
        shapes += [(width, rank), (rank, width)]
    return _counted(shapes)


@oracle("cost.adapter_parameters")
def tensors_of_adapters(*, layers: int, width: int, bottleneck: int) -> Any:
    shapes: list[tuple[int, ...]] = []
    for _ in range(layers):
        for _after in ("attention", "feed-forward"):
            shapes += [(width, bottleneck), (bottleneck,), (bottleneck, width), (width,)]  # down, up
            shapes += [(width,), (width,)]  # the layer norm
    return _counted(shapes)


@oracle("cost.adapter_parameters")
def modules_of_pytorch(*, layers: int, width: int, bottleneck: int) -> Any:
    """The modules of one layer, on a device that holds no numbers."""
    if not bottleneck:
        raise NotImplementedError("PyTorch warns of a layer without features")
    nn = library("torch").nn
    adapter = nn.Linear(width, bottleneck, device="meta"), nn.Linear(bottleneck, width, device="meta")
    modules = (*adapter, nn.LayerNorm(width, device="meta"))
    count = sum(p.numel() for m in modules for p in m.parameters())
    return as_total("parameters", Fraction(2 * layers * count))


@oracle("cost.prefix_parameters")
def keys_and_values(*, layers: int, width: int, positions: int) -> Any:
    return _counted([(positions, width) for _ in range(layers) for _ in ("keys", "values")])


@oracle("cost.prompt_parameters")
def rows_of_embeddings(*, width: int, positions: int) -> Any:
    return _counted([(width,)] * positions)
