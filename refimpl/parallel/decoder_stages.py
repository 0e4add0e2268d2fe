"""A decoder cut into stages, and a stage into units: what a rank of a pipeline runs, and with which weights.

The embedding belongs to the first stage, the last normalisation and the loss to the last one, and layers to
all, as evenly as they can be dealt.  A tied table belongs to both ends.  Each unit is a part of the model
whose weights may be split over ranks (`refimpl.parallel.tensor_layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray
from refimpl.parallel.comm import Comm
from refimpl.parallel.mesh import Axes
from refimpl.parallel.mixture import EXPERTS, MixtureConfig, experts_part, model_shapes
from refimpl.parallel.network import Batch
from refimpl.parallel.passes import Back, Part, Weights, in_sequence, local, recomputed
from refimpl.parallel.tensor_layers import SPLIT, gradients_summed, tensor_block
from refimpl.parallel.vocabulary_layers import embedding_part, loss_part
from refimpl.transformer.config import DecoderConfig
from refimpl.transformer.layers import Gradients, Layer, norm_layer
from refimpl.transformer.positions import (
    alibi_slopes,
    learned_positions,
    learned_positions_vjp,
    sinusoidal_positions,
)
from refimpl.transformer.rotary import Rope

__all__ = [
    "StageUnit",
    "decoder_params",
    "decoder_vector",
    "own_shapes",
    "stage_layers",
    "stage_units",
]


class StageUnit(NamedTuple):
    """A part of a stage, its key among the units of a model, and the names of its weights.

    ``part_of(axes, batch)`` returns it as a rank with these groups runs it on a micro-batch.
    """

    key: str
    names: tuple[str, ...]
    part_of: Callable[[Axes, Batch], Part]


def decoder_params(config: DecoderConfig, flat: FloatArray) -> dict[str, FloatArray]:
    """Return the parameters of a decoder by name, views of a vector of all of them.

    Raises
    ------
    ShapeError
        If the vector has another length.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=2, width=2, num_heads=1, layers=0, hidden=1)
    >>> decoder_params(config, np.arange(6.0))["gamma"]
    array([4., 5.])
    """
    shapes = model_shapes(config)
    sizes = [math.prod(shape) for shape in shapes.values()]
    if flat.shape != (sum(sizes),):
        raise ShapeError(f"parameters: expected shape ({sum(sizes)},), got {flat.shape}")
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def decoder_vector(config: DecoderConfig, params: Mapping[str, FloatArray]) -> FloatArray:
    """Return the parameters of a decoder one behind the other: the inverse of `decoder_params`.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=2, width=2, num_heads=1, layers=0, hidden=1)
    >>> decoder_vector(config, decoder_params(config, np.arange(6.0)))
    array([0., 1., 2., 3., 4., 5.])
    """
    return np.concatenate([params[name].ravel() for name in model_shapes(config)])


def own_shapes(config: DecoderConfig, tensor: int, data: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a decoder's parameters as a rank has them: split by tensor, experts by data.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=4, width=2, num_heads=2, layers=0, hidden=1)
    >>> own_shapes(config, tensor=2, data=3)
    {'embedding': (2, 2), 'gamma': (2,)}
    """
    shapes = {}
    for name, shape in model_shapes(config).items():
        last = name.rpartition(".")[2]
        cuts = {0: data} if last in EXPERTS else {}
        if last in SPLIT:
            cuts[SPLIT[last]] = tensor
        shapes[name] = tuple(n // cuts.get(place, 1) for place, n in enumerate(shape))
    return shapes


def stage_layers(layers: int, stage: int, stages: int) -> range:
    """Return which layers a stage has: the first ones have one more where they do not divide.

    Examples
    --------
    >>> [list(stage_layers(5, stage, 3)) for stage in range(3)]
    [[0, 1], [2, 3], [4]]
    """
    ends = [place * (layers // stages) + min(place, layers % stages) for place in (stage, stage + 1)]
    return range(*ends)


def stage_units(
    config: DecoderConfig,
    stage: int,
    stages: int,
    *,
    recompute: bool = False,
    sequence_parallel: bool = False,
) -> list[StageUnit]:
    """Return the units of one stage, in order.

    Parameters
    ----------
    config : DecoderConfig
        The make.
    stage, stages : int
        Which of how many.
    recompute : bool
        Whether layers keep their inputs alone, and run once more on the way back.
    sequence_parallel : bool
        As for `refimpl.parallel.tensor_layers.tensor_block`.

    Returns
    -------
    list of StageUnit
        The first stage's take no input; the last one's give the loss of each token.

    Examples
    --------
    >>> config = DecoderConfig(layers=3)
    >>> [[unit.key for unit in stage_units(config, stage, 2)] for stage in (0, 1)]
    [['embedding', 'layers.0', 'layers.1'], ['layers.2', 'gamma', 'embedding']]
    """
    shapes = model_shapes(config)
    units = []
    if stage == 0:
        units += _first_units(config, sequence_parallel)
    for layer in stage_layers(config.layers, stage, stages):
        prefix = f"layers.{layer}."
        names = tuple(name for name in shapes if name.startswith(prefix))
        units.append(StageUnit(prefix[:-1], names, _layer(config, prefix, recompute, sequence_parallel)))
    if stage == stages - 1:
        units += _last_units(config, sequence_parallel)
    return units


def _first_units(config: DecoderConfig, sequence_parallel: bool) -> list[StageUnit]:
    def own_positions(comm: Comm, batch: Batch) -> Any:
        positions = np.arange(batch.tokens.shape[1] - 1)
        return np.split(positions, comm.size)[comm.rank] if sequence_parallel else positions

    def embed(axes: Axes, batch: Batch) -> Part:
        comm = axes.tensor
        part = embedding_part(
            comm, batch.tokens[:, :-1], scale=config.embedding_scale, sequence_parallel=sequence_parallel
        )
        if config.positions != "sinusoidal":
            return part
        waves = sinusoidal_positions(own_positions(comm, batch), width=config.width)
        return in_sequence(part, local(lambda _: Layer(lambda x: x + waves, lambda _, dx: (dx, {}))))

    def place(axes: Axes, batch: Batch) -> Part:
        comm = axes.tensor
        positions = own_positions(comm, batch)

        def layer_of(weights: Weights) -> Layer:
            table = weights["positions"]

            def vjp(_: FloatArray, dx: FloatArray) -> tuple[FloatArray, Gradients]:
                dtable = learned_positions_vjp(table, positions, dx.sum(axis=0)).dtable
                return dx, {"positions": dtable}

            return Layer(lambda x: x + learned_positions(table, positions), vjp)

        return gradients_summed(comm, local(layer_of)) if sequence_parallel else local(layer_of)

    units = [StageUnit("embedding", ("embedding",), embed)]
    return [*units, StageUnit("positions", ("positions",), place)] if config.positions == "learned" else units


def _layer(
    config: DecoderConfig, prefix: str, recompute: bool, sequence_parallel: bool
) -> Callable[[Axes, Batch], Part]:
    slopes = alibi_slopes(num_heads=config.num_heads) if config.positions == "alibi" else None

    def part_of(axes: Axes, _: Batch) -> Part:
        mixture = None
        if isinstance(config, MixtureConfig):
            mixture = experts_part(axes.data, axes.tensor, config)
        block = tensor_block(
            axes.tensor,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            order=config.order,
            norm=config.norm,
            eps=config.eps,
            activation=config.activation,
            rope=config.positions if isinstance(config.positions, Rope) else None,
            alibi_slopes=slopes,
            sequence_parallel=sequence_parallel,
            mixture=mixture,
        )
        return _prefixed(recomputed(block) if recompute else block, prefix)

    return part_of


def _last_units(config: DecoderConfig, sequence_parallel: bool) -> list[StageUnit]:
    table = "embedding" if config.tied else "head"

    def normalise(axes: Axes, _: Batch) -> Part:
        part = local(lambda weights: norm_layer(weights, "gamma", "beta", config.norm, config.eps))
        return gradients_summed(axes.tensor, part) if sequence_parallel else part

    def lose(axes: Axes, batch: Batch) -> Part:
        return loss_part(axes.tensor, batch.tokens[:, 1:], table=table, sequence_parallel=sequence_parallel)

    head = StageUnit(table, (table,), lose)
    if config.order != "pre":
        return [head]
    names = ("gamma", "beta") if config.norm == "layer_norm" else ("gamma",)
    return [StageUnit("gamma", names, normalise), head]


def _prefixed(part: Part, prefix: str) -> Part:
    """Return the part with `prefix` before the names of its weights."""

    def own(weights: Weights) -> Weights:
        return {name.removeprefix(prefix): array for name, array in weights.items()}

    def named(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        y, back = part(own(weights), x)

        def named_back(weights: Weights, dy: FloatArray) -> tuple[FloatArray, Gradients]:
            dx, found = back(own(weights), dy)
            return dx, {prefix + name: gradient for name, gradient in found.items()}

        return y, named_back

    return named
