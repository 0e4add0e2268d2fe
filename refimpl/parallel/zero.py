"""ZeRO stages 1, 2 and 3: data parallelism in which each rank keeps only its share of the model states.

Every unit's flat vector is cut into N equal chunks, the last ones padded with zeros; rank r owns chunk r of
each unit, and nobody else keeps that chunk of the optimizer states (stage 1), of the gradients (2), of the
parameters (3).  The ring reduces chunk k of a gradient in the same order as plain data parallelism does, so
without clipping and with one micro-batch the parameters are equal to those bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from refimpl.errors import OptionError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, round_to
from refimpl.parallel.adam import AdamW
from refimpl.parallel.collectives import ring_all_gather, ring_reduce_scatter
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.parallel.data import (
    TRAINING,
    add_gradient,
    overflow_skips,
    sample_training,
    step_batches,
    sum_over_ranks,
    training_arguments,
)
from refimpl.parallel.mixed_precision import LossScale, OptimizerState, initial_state, optimizer_step
from refimpl.parallel.network import Batch, Network, Sized, loss_and_gradients, split_units
from refimpl.parallel.sharding import cut_shard, gather_vector, shard_vector
from refimpl.registry import Case, Source, technique

__all__ = [
    "ZeroState",
    "ZeroTraining",
    "gather_unit",
    "reduce_gradient",
    "zero",
    "zero_initial",
    "zero_step",
    "zero_steps",
    "zero_update",
]


class ZeroState(NamedTuple):
    """What one rank keeps between steps.

    Attributes
    ----------
    stage : int
        1, 2 or 3.
    parameters : list of ndarray
        Each unit's flat parameters in the format of the model: whole, or this rank's chunk in stage 3.
    optimizer : OptimizerState
        Of this rank's chunks, all units one behind the other.
    """

    stage: int
    parameters: list[Array]
    optimizer: OptimizerState

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays kept."""
        arrays = (*self.parameters, self.optimizer.master, self.optimizer.momentum, self.optimizer.variance)
        return sum(array.nbytes for array in arrays)


class ZeroTraining(NamedTuple):
    """Parameters after training, (n,), losses, (steps,), and bytes of states that each rank held, (R,)."""

    parameters: Array
    losses: FloatArray
    held_bytes: IntArray


def zero_initial(
    comm: Comm,
    network: Sequence[Sized],
    parameters: FloatArray,
    *,
    stage: int,
    model_dtype: npt.DTypeLike | None = None,
    loss_scale: LossScale | None = None,
) -> ZeroState:
    """Return this rank's part of the states before the first step.

    Parameters
    ----------
    comm : Comm
        This rank.
    network : sequence of Unit
        What is trained.
    parameters : ndarray of float, shape (n,)
        Initial parameters, given to every rank.
    stage : {1, 2, 3}
        1: optimizer states are divided; 2: gradients too; 3: parameters too.
    model_dtype : dtype, optional
        Format of the forward and backward pass.  Default: that of `parameters`.
    loss_scale : LossScale, optional
        At the start.  Default 1.

    Returns
    -------
    ZeroState
        Arrays that share no memory with `parameters`.

    Raises
    ------
    OptionError
        If there is no such stage.
    """
    if stage not in (1, 2, 3):
        raise OptionError(f"stage: expected 1, 2 or 3; got {stage!r}")
    optimizer = initial_state(
        shard_vector(network, parameters, comm.rank, comm.size), loss_scale or LossScale(1.0)
    )
    whole = round_to(parameters, parameters.dtype if model_dtype is None else model_dtype)
    if stage == 3:
        whole = shard_vector(network, whole, comm.rank, comm.size)
        return ZeroState(
            stage, [np.array(chunk) for chunk in cut_shard(network, whole, comm.size)], optimizer
        )
    return ZeroState(stage, [np.array(unit) for unit in split_units(network, whole)], optimizer)


def zero_step(
    comm: Comm,
    network: Network,
    state: ZeroState,
    batches: Sequence[Batch],
    *,
    optimizer: AdamW,
    max_norm: float | None = None,
    growth_interval: int = 2000,
) -> tuple[ZeroState, float, int]:
    """Train one step on this rank's micro-batches, together with the other ranks.

    Parameters
    ----------
    comm : Comm
        This rank.
    network : sequence of Unit
        What is trained.
    state : ZeroState
        This rank's part.
    batches : sequence of Batch
        Micro-batches; the same number on all ranks.
    optimizer, max_norm, growth_interval
        As for `optimizer_step`; the norm is that of the whole gradient, summed over shards.

    Returns
    -------
    tuple
        This rank's new state, the mean loss a token, and the bytes of model states that this rank held when
        its gradients were complete: parameters, gradients and optimizer states.

    Notes
    -----
    What is sent, of units padded to multiples of N and each time (N - 1) / N of it, with m micro-batches:

    - stage 1: one reduce-scatter of gradients after the last micro-batch, one all-gather of parameters;
    - stage 2: a reduce-scatter a micro-batch, one all-gather;
    - stage 3: two all-gathers, forward and backward, and one reduce-scatter a micro-batch.

    The parameters of stages 1 and 2 are gathered also after a skipped step, which keeps the traffic constant.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, sections 5 and 7.
    """
    counted = max(sum_over_ranks(comm, float(sum(np.sum(batch.mask) for batch in batches))), 1.0)
    held: dict[int, FloatArray] = {}

    def parameters_of(index: int) -> FloatArray:
        kept = state.parameters[index]
        return gather_unit(comm, network[index], kept) if state.stage == 3 else kept

    def take(index: int, gradient: FloatArray) -> None:
        add_gradient(held, index, gradient if state.stage == 1 else reduce_gradient(comm, gradient))

    factor = state.optimizer.loss_scale.scale / counted
    loss = sum(loss_and_gradients(network, parameters_of, batch, factor, take) for batch in batches)
    nbytes = state.nbytes + sum(gradient.nbytes for gradient in held.values())
    shards = [reduce_gradient(comm, held[i]) if state.stage == 1 else held[i] for i in range(len(network))]
    state = zero_update(
        comm, network, state, shards, optimizer=optimizer, max_norm=max_norm, growth_interval=growth_interval
    )
    return state, sum_over_ranks(comm, loss) / counted, nbytes


def reduce_gradient(comm: Comm, gradient: FloatArray) -> FloatArray:
    """Return this rank's chunk of a unit's gradient, summed over ranks."""
    with comm.phase("gradients"):
        return ring_reduce_scatter(comm, gradient)


def gather_unit(comm: Comm, unit: Sized, chunk: FloatArray) -> FloatArray:
    """Return a unit's whole parameters, of which each rank has a chunk."""
    with comm.phase("parameters"):
        return np.array(ring_all_gather(comm, chunk)[: unit.size])


def zero_update(
    comm: Comm,
    network: Sequence[Sized],
    state: ZeroState,
    shards: Sequence[FloatArray],
    *,
    optimizer: AdamW,
    max_norm: float | None = None,
    growth_interval: int = 2000,
    sum_over_shards: Callable[[float], float] | None = None,
) -> ZeroState:
    """Return this rank's state after the optimizer's step, given its chunk of each unit's gradient.

    Parameters
    ----------
    comm, network, state, optimizer, max_norm, growth_interval
        As for `zero_step`.
    shards : sequence of ndarray
        The chunks, summed over ranks.
    sum_over_shards : callable, optional
        As for `optimizer_step`.  Default: over the ranks of `comm`.

    Returns
    -------
    ZeroState
        Up to stage 2 with the parameters of all chunks.
    """
    after = optimizer_step(
        state.optimizer,
        np.concatenate(shards),
        optimizer=optimizer,
        max_norm=max_norm,
        growth_interval=growth_interval,
        sum_over_shards=sum_over_shards or (lambda value: sum_over_ranks(comm, value)),
    )
    rounded = round_to(after.master, state.parameters[0].dtype)
    chunks = [np.array(chunk) for chunk in cut_shard(network, rounded, comm.size)]
    if state.stage < 3:
        chunks = [gather_unit(comm, unit, chunk) for unit, chunk in zip(network, chunks, strict=True)]
    return ZeroState(state.stage, chunks, after)


def zero_steps(
    comm: Comm, network: Network, state: ZeroState, tokens: IntArray, mask: BoolArray, **settings: Any
) -> tuple[ZeroState, list[float], int]:
    """Train as many steps as there are in `tokens` and `mask`, laid out as for `zero`.

    Parameters
    ----------
    comm, network, state
        As for `zero_step`.
    tokens, mask : ndarray
        Of all ranks.
    **settings
        ``optimizer``, ``max_norm``, ``growth_interval`` of `zero_step`.

    Returns
    -------
    tuple
        This rank's state, the mean loss a token of each step, and the most bytes of model states held.
    """
    losses, most = [], state.nbytes
    for batches in step_batches(tokens, mask, comm.rank):
        with overflow_skips():
            state, loss, held = zero_step(comm, network, state, batches, **settings)
        losses.append(loss)
        most = max(most, held)
    return state, losses, most


def sample_zero(rng: np.random.Generator, *, stage: int, **shape: int | str) -> Case:
    """Return one call of `zero`: a training run as `sample_training` draws it, and the stage."""
    return sample_training(rng, **shape).replace(stage=stage)  # type: ignore[arg-type]


@technique(
    "parallel.zero",
    entries=(98, 99, 100),
    kind="function",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "sections 5 and 7"),
    axes=TRAINING["axes"],
    options={"stage": (1, 2, 3), "extra": ("none", "clip", "decay")},
    edges=(
        *TRAINING["edges"],
        *({"ranks": 3, "steps": 1, "micro": 2, "stage": stage} for stage in (1, 2, 3)),
    ),
    sample=sample_zero,
)
def zero(
    parameters: FloatArray,
    tokens: IntArray,
    mask: BoolArray,
    /,
    *,
    network: Network,
    stage: int,
    optimizer: AdamW | None = None,
    max_norm: float | None = None,
    model_dtype: npt.DTypeLike | None = None,
    loss_scale: LossScale | None = None,
    growth_interval: int = 2000,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> ZeroTraining:
    """Return the parameters after training a network with AdamW on ranks that divide the model states.

    Parameters
    ----------
    parameters : ndarray of float, shape (n,)
        Initial parameters, all units one behind the other; the master copy has their wide dtype.
    tokens : ndarray of int, shape (steps, micro, R, B, T + 1)
        For each step and micro-batch what each of R ranks trains on.
    mask : ndarray of bool, shape (steps, micro, R, B, T)
        True: predicting ``tokens[..., t + 1]`` counts in the loss.
    network : sequence of Unit
        What is trained.
    stage : {1, 2, 3}
        1: optimizer states are divided; 2: gradients too; 3: parameters too.
    optimizer : AdamW, optional
        Settings.
    max_norm : float, optional
        Clip the gradient of a step to this norm, over all shards.
    model_dtype : dtype, optional
        Format of the forward and backward pass.  Default: that of `parameters`.
    loss_scale : LossScale, optional
        At the start.  Default 1, growing by `growth_interval`.
    growth_interval : int
        Good steps after which the loss scale doubles.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ZeroTraining
        The parameters in `model_dtype`, the mean loss a counted token of each step, and the most bytes of
        model states that each rank held.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit.
    OptionError
        If there is no such stage, no micro-batch or no rank.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, sections 5 and 7.

    Examples
    --------
    Float16 parameters and gradients, float32 optimizer states, 4 ranks: 16 bytes a parameter divided by 4.

    >>> from refimpl.parallel.network import attention_network, parameter_count
    >>> network = attention_network(vocabulary=4, width=4, heads=1, head_width=4, blocks=1)
    >>> tokens, mask = np.zeros((1, 1, 4, 1, 3), int), np.ones((1, 1, 4, 1, 2), bool)
    >>> start = np.zeros(parameter_count(network), np.float32)
    >>> zero(start, tokens, mask, network=network, stage=3, model_dtype="float16").held_bytes
    array([384, 384, 384, 384])
    >>> 16 * parameter_count(network) // 4
    384
    """
    start, tokens, mask = training_arguments(parameters, tokens, mask, network)
    settings = {"max_norm": max_norm, "growth_interval": growth_interval}

    def run(comm: Comm) -> tuple[list[Array], list[float], int]:
        state = zero_initial(
            comm, network, start, stage=stage, model_dtype=model_dtype, loss_scale=loss_scale
        )
        state, losses, most = zero_steps(
            comm, network, state, tokens, mask, optimizer=optimizer or AdamW(), **settings
        )
        return state.parameters, losses, most

    results = launch(tokens.shape[2], run, traffic=traffic)
    kept = [np.concatenate(units) for units, _, _ in results]
    return ZeroTraining(
        gather_vector(network, kept) if stage == 3 else kept[0],
        np.array(results[0][1], np.float64),
        np.array([held for _, _, held in results]),
    )
