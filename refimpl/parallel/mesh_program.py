"""One rank of a mesh that trains a decoder: its share of the weights, and a step.

A rank has a part of some layers (`refimpl.parallel.decoder_stages`, `tensor_layers`); of that part's model
states the ranks along the data dimension have a chunk each (`refimpl.parallel.zero`), but of experts, which
they have spread among them (`refimpl.parallel.mixture`), each has its own whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.parallel.adam import AdamW
from refimpl.parallel.comm import Comm
from refimpl.parallel.data import add_gradient, sum_over_ranks
from refimpl.parallel.decoder_stages import own_shapes, stage_units
from refimpl.parallel.groups import group
from refimpl.parallel.mesh import Mesh, Place
from refimpl.parallel.mixture import EXPERTS, own_experts
from refimpl.parallel.network import Batch
from refimpl.parallel.passes import Weights
from refimpl.parallel.pipeline_program import run_stages, sum_of_both_ends
from refimpl.parallel.schedules import Schedule, Step, planned_steps
from refimpl.parallel.sharding import shard_vector
from refimpl.parallel.tensor_layers import SPLIT, own_weights
from refimpl.parallel.zero import gather_unit, reduce_gradient, zero_initial, zero_update
from refimpl.transformer.config import DecoderConfig
from refimpl.transformer.layers import Gradients

__all__ = ["MeshPlan", "RankUnit", "Share", "TrainedRank", "rank_units", "train_rank"]


@dataclass(frozen=True)
class MeshPlan:
    """How a decoder is trained on a mesh; `mesh_training` documents the fields."""

    config: DecoderConfig
    mesh: Mesh
    stage: int = 1
    schedule: Schedule | IntArray = "1f1b"
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
    """Weights of a unit as one rank has them, names and shapes: all but experts, or experts alone."""

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


def rank_units(plan: MeshPlan, place: Place) -> tuple[list[RankUnit], list[RankUnit]]:
    """Return the units that a rank has, a tied table once: all but experts, and experts.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=4, width=2, num_heads=2, layers=1, hidden=2)
    >>> plan = MeshPlan(config, Mesh(tensor=2, pipeline=2))
    >>> [[(unit.key, unit.size) for unit in units] for units in rank_units(plan, Place(0, 1, 0))]
    [[('gamma', 2), ('embedding', 4)], []]
    """
    shapes = own_shapes(plan.config, plan.mesh.tensor, plan.mesh.data)
    dense: dict[str, RankUnit] = {}
    experts: dict[str, RankUnit] = {}
    for stage in range(place.pipeline, plan.stages, plan.mesh.pipeline):
        for unit in stage_units(plan.config, stage, plan.stages):
            for kind, wanted in ((dense, False), (experts, True)):
                names = [n for n in unit.names if (n.rpartition(".")[2] in EXPERTS) == wanted]
                if names:
                    kind.setdefault(unit.key, RankUnit(unit.key, {name: shapes[name] for name in names}))
    return list(dense.values()), list(experts.values())


class Share:
    """Units whose model states the ranks of `comm` divide, this rank's part of them, and a step's gradients.

    Experts are a share of one rank: no other has them.
    """

    def __init__(self, comm: Comm, units: Sequence[RankUnit], own: Weights, stage: int) -> None:
        self.comm = comm
        self.units = units
        self.index = {unit.key: number for number, unit in enumerate(units)}
        flat = np.concatenate([unit.flat(own) for unit in units])
        self.state = zero_initial(comm, units, flat, stage=stage)
        self.held: dict[int, FloatArray] = {}

    def weights(self, key: str) -> dict[str, FloatArray]:
        """Return a unit's weights, whole; gathered in stage 3."""
        if key not in self.index:
            return {}
        unit, kept = self.units[self.index[key]], self.state.parameters[self.index[key]]
        return unit.weights(gather_unit(self.comm, unit, kept) if self.state.stage == 3 else kept)

    def take(self, key: str, found: Gradients) -> None:
        """Add a unit's gradients of a micro-batch to those before."""
        if key in self.index:
            number = self.index[key]
            gradient = self.units[number].flat(found)
            whole = self.state.stage == 1
            add_gradient(self.held, number, gradient if whole else reduce_gradient(self.comm, gradient))

    @property
    def nbytes(self) -> int:
        """Bytes of model states and gradients held now."""
        return self.state.nbytes + sum(gradient.nbytes for gradient in self.held.values())

    def reduced(self) -> list[FloatArray]:
        """Return this rank's chunks of the gradients, and forget them."""
        held, self.held = self.held, {}
        whole = self.state.stage == 1
        numbers = range(len(self.units))
        return [reduce_gradient(self.comm, held[n]) if whole else held[n] for n in numbers]


class TrainedRank(NamedTuple):
    """What a rank ends with: parameters by share and unit, losses, most bytes of states, most activations."""

    parameters: list[list[FloatArray]]
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
    place, data = plan.mesh.place(comm.rank), plan.mesh.axes(comm).data
    steps = planned_steps(
        plan.schedule,
        ranks=plan.mesh.pipeline,
        micro_batches=tokens.shape[1],
        chunks=plan.chunks,
    )[place.pipeline]
    own = own_weights(own_experts(params, place.data, plan.mesh.data), place.tensor, plan.mesh.tensor)
    owners = (data, group(comm, [comm.rank]))
    shares = [
        Share(owner, units, own, plan.stage)
        for owner, units in zip(owners, rank_units(plan, place), strict=True)
        if units
    ]
    losses: list[float] = []
    most_bytes, most_held = sum(share.nbytes for share in shares), 0
    for words, counts in zip(tokens, mask, strict=True):
        batches = [Batch(*pair) for pair in zip(words[:, place.data], counts[:, place.data], strict=True)]
        loss, nbytes, held = _train_step(comm, plan, shares, batches, steps)
        losses.append(loss)
        most_bytes, most_held = max(most_bytes, nbytes), max(most_held, held)
    return TrainedRank([share.state.parameters for share in shares], losses, most_bytes, most_held)


def _train_step(
    comm: Comm, plan: MeshPlan, shares: Sequence[Share], batches: Sequence[Batch], steps: Sequence[Step]
) -> tuple[float, int, int]:
    """Train one step; return the loss a token, bytes of states and activations held."""
    place, axes = plan.mesh.place(comm.rank), plan.mesh.axes(comm)
    counted = max(sum_over_ranks(axes.data, float(sum(np.sum(batch.mask) for batch in batches))), 1.0)

    def weights_of(key: str) -> Weights:
        return {name: array for share in shares for name, array in share.weights(key).items()}

    def take(key: str, found: Gradients) -> None:
        for share in shares:
            share.take(key, found)

    # A rank whose stages have no layers has no share either: it passes on what it gets.
    scale = shares[0].state.optimizer.loss_scale.scale if shares else 1.0
    loss, most = run_stages(
        axes,
        plan.config,
        steps=steps,
        stages=plan.stages,
        batches=batches,
        factor=scale / counted,
        weights_of=weights_of,
        take=take,
        recompute=plan.recompute,
        sequence_parallel=plan.sequence_parallel,
    )
    nbytes = sum(share.nbytes for share in shares)
    gradients = [share.reduced() for share in shares]
    if plan.shares_table(place):
        # After the reduce-scatter: of its chunk alone, a rank sends a share of what it would before.
        number = shares[0].index["embedding"]
        gradients[0][number] = sum_of_both_ends(axes.pipeline, gradients[0][number])
    squares = sum_over_ranks(comm, sum(map(partial(_squares, plan, place), shares, gradients)) / scale**2)
    for share, chunks in zip(shares, gradients, strict=True):
        share.state = zero_update(
            share.comm,
            share.units,
            share.state,
            chunks,
            optimizer=plan.optimizer,
            max_norm=plan.max_norm,
            sum_over_shards=lambda _: squares,
        )
    return sum_over_ranks(axes.data, loss) / counted, nbytes, most


def _squares(plan: MeshPlan, place: Place, share: Share, chunks: Sequence[FloatArray]) -> float:
    """Return this rank's part of the squared norm of the gradient, in which each parameter counts once."""
    once = shard_vector(
        share.units, _counted_here(plan, place, share.units), share.comm.rank, share.comm.size
    )
    return float(np.sum(np.square(once * np.concatenate(chunks))))


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
