"""One rank of a mesh that trains a decoder: its share of the weights, and a step.

A rank has a part of some layers (`refimpl.parallel.decoder_stages`, `tensor_layers`); of that part's model
states the ranks along the data dimension have a chunk each (`refimpl.parallel.zero`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.parallel.adam import AdamW
from refimpl.parallel.comm import Comm
from refimpl.parallel.data import add_gradient, sum_over_ranks
from refimpl.parallel.decoder_stages import own_shapes, stage_units
from refimpl.parallel.mesh import Mesh, Place
from refimpl.parallel.network import Batch
from refimpl.parallel.passes import Weights
from refimpl.parallel.pipeline_program import run_stages, sum_of_both_ends
from refimpl.parallel.schedules import Schedule, pipeline_schedule, steps_of
from refimpl.parallel.sharding import shard_vector
from refimpl.parallel.tensor_layers import SPLIT, own_weights
from refimpl.parallel.zero import ZeroState, gather_unit, reduce_gradient, zero_initial, zero_update
from refimpl.transformer.config import DecoderConfig
from refimpl.transformer.layers import Gradients

__all__ = ["MeshPlan", "RankUnit", "TrainedRank", "rank_units", "train_rank"]


@dataclass(frozen=True)
class MeshPlan:
    """How a decoder is trained on a mesh; `mesh_training` documents the fields."""

    config: DecoderConfig
    mesh: Mesh
    stage: int = 1
    schedule: Schedule = "1f1b"
    chunks: int = 1
    recompute: bool = False
    sequence_parallel: bool = False
    optimizer: AdamW = field(default_factory=AdamW)
    max_norm: float | None = None

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return self.mesh.pipeline * self.chunks

    def shares_table(self, place: Place) -> bool:
        """Return whether the rank has one of two copies of a tied table."""
        ends = (0, self.mesh.pipeline - 1)
        return self.config.tied and self.mesh.pipeline > 1 and place.pipeline in ends


class RankUnit(NamedTuple):
    """A unit's weights as one rank has them: names and shapes."""

    key: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def flat(self, weights: Weights) -> FloatArray:
        """Return the weights one behind the other."""
        return np.concatenate([weights[name].ravel() for name in self.shapes])

    def weights(self, flat: FloatArray) -> dict[str, FloatArray]:
        """Return the weights that stand one behind the other, as views."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1]
        parts = zip(self.shapes.items(), np.split(flat, ends), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}


def rank_units(plan: MeshPlan, place: Place) -> list[RankUnit]:
    """Return the units that a rank has, a tied table once.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=4, width=2, num_heads=2, layers=1, hidden=2)
    >>> plan = MeshPlan(config, Mesh(tensor=2, pipeline=2))
    >>> [(unit.key, unit.size) for unit in rank_units(plan, Place(0, 1, 0))]
    [('gamma', 2), ('embedding', 4)]
    """
    shapes = own_shapes(plan.config, plan.mesh.tensor)
    own: dict[str, RankUnit] = {}
    for stage in range(place.pipeline, plan.stages, plan.mesh.pipeline):
        for unit in stage_units(plan.config, stage, plan.stages):
            own.setdefault(unit.key, RankUnit(unit.key, {name: shapes[name] for name in unit.names}))
    return list(own.values())


class TrainedRank(NamedTuple):
    """What a rank ends with: parameters of its units, losses, most bytes of states, most activations."""

    parameters: list[FloatArray]
    losses: list[float]
    held_bytes: int
    in_flight: int


def train_rank(comm: Comm, plan: MeshPlan, params: Weights, tokens: IntArray, mask: BoolArray) -> TrainedRank:
    """Train as many steps as there are in `tokens` and `mask`.

    Parameters
    ----------
    comm : Comm
        This rank of the mesh.
    plan : MeshPlan
        What is trained how.
    params : mapping of str to ndarray
        Whole initial parameters, given to every rank.
    tokens, mask : ndarray
        As for `mesh_training`.

    Returns
    -------
    TrainedRank
        Parameters are whole units of this rank's part, or its chunks of them in stage 3.
    """
    place = plan.mesh.place(comm.rank)
    own = own_weights(params, place.tensor, plan.mesh.tensor)
    units = rank_units(plan, place)
    flat = np.concatenate([unit.flat(own) for unit in units])
    data = plan.mesh.axes(comm).data
    state = zero_initial(data, units, flat, stage=plan.stage)
    losses, most_bytes, most_held = [], state.nbytes, 0
    for words, counts in zip(tokens, mask, strict=True):
        batches = [Batch(*pair) for pair in zip(words[:, place.data], counts[:, place.data], strict=True)]
        state, loss, nbytes, held = _train_step(comm, plan, units, state, batches)
        losses.append(loss)
        most_bytes, most_held = max(most_bytes, nbytes), max(most_held, held)
    return TrainedRank(state.parameters, losses, most_bytes, most_held)


def _train_step(
    comm: Comm, plan: MeshPlan, units: Sequence[RankUnit], state: ZeroState, batches: Sequence[Batch]
) -> tuple[ZeroState, float, int, int]:
    """Train one step; return the state, the loss a token, bytes of states and activations held."""
    place, axes = plan.mesh.place(comm.rank), plan.mesh.axes(comm)
    index = {unit.key: number for number, unit in enumerate(units)}
    counted = max(sum_over_ranks(axes.data, float(sum(np.sum(batch.mask) for batch in batches))), 1.0)
    held: dict[int, FloatArray] = {}

    def weights_of(key: str) -> Weights:
        unit, kept = units[index[key]], state.parameters[index[key]]
        return unit.weights(gather_unit(axes.data, unit, kept) if state.stage == 3 else kept)

    def take(key: str, found: Gradients) -> None:
        gradient = units[index[key]].flat(found)
        add_gradient(held, index[key], gradient if state.stage == 1 else reduce_gradient(axes.data, gradient))

    plan_of_steps = pipeline_schedule(
        schedule=plan.schedule,
        ranks=plan.mesh.pipeline,
        micro_batches=len(batches),
        chunks=plan.chunks,
    )
    loss, most = run_stages(
        axes.pipeline,
        axes.tensor,
        plan.config,
        steps=steps_of(plan_of_steps[place.pipeline]),
        stages=plan.stages,
        batches=batches,
        factor=state.optimizer.loss_scale.scale / counted,
        weights_of=weights_of,
        take=take,
        recompute=plan.recompute,
        sequence_parallel=plan.sequence_parallel,
    )
    nbytes = state.nbytes + sum(gradient.nbytes for gradient in held.values())
    shards = [
        reduce_gradient(axes.data, held[number]) if state.stage == 1 else held[number]
        for number in range(len(units))
    ]
    if plan.shares_table(place):
        # After the reduce-scatter: of its chunk alone, a rank sends a share of what it would before.
        shards[index["embedding"]] = sum_of_both_ends(axes.pipeline, shards[index["embedding"]])
    once = shard_vector(units, _counted_here(plan, place, units), axes.data.rank, axes.data.size)
    squares = float(np.sum(np.square(once * np.concatenate(shards) / state.optimizer.loss_scale.scale)))
    after = zero_update(
        axes.data,
        units,
        state,
        shards,
        optimizer=plan.optimizer,
        max_norm=plan.max_norm,
        sum_over_shards=lambda _: sum_over_ranks(comm, squares),
    )
    return after, sum_over_ranks(axes.data, loss) / counted, nbytes, most


def _counted_here(plan: MeshPlan, place: Place, units: Sequence[RankUnit]) -> FloatArray:
    """Return 1 for each parameter that this rank counts in the gradient's norm, so that each counts once.

    What every tensor-parallel rank has counts on the first, a tied table on the first of the pipeline.
    """
    parts = []
    for unit in units:
        for name, shape in unit.shapes.items():
            split = name.rpartition(".")[2] in SPLIT
            copy = name == "embedding" and plan.shares_table(place) and place.pipeline > 0
            counts = (split or place.tensor == 0) and not copy
            parts.append(np.full(math.prod(shape), float(counts)))
    return np.concatenate(parts)
