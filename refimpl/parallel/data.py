"""Data parallelism: replicas, each on its own part of the batch, and one all-reduce of the gradients a step.

The gradient of a step is that of the mean over the tokens that count on all ranks: it is divided once, by the
number of those tokens, not by the number of ranks, which would weigh tokens of a short shard more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from refimpl.errors import OptionError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, round_to
from refimpl.parallel.adam import AdamW
from refimpl.parallel.collectives import ring_all_reduce, sum_pair
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.parallel.mixed_precision import LossScale, OptimizerState, initial_state, optimizer_step
from refimpl.parallel.network import (
    Batch,
    Network,
    attention_network,
    initial_parameters,
    loss_and_gradients,
    split_units,
)
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating

__all__ = [
    "Replicas",
    "add_gradient",
    "data_parallel",
    "data_parallel_step",
    "overflow_skips",
    "sample_training",
    "step_batches",
    "sum_over_ranks",
    "training_arguments",
]


class Replicas(NamedTuple):
    """Every rank's parameters after training, (R, n), and the mean loss a token of each step, (steps,)."""

    parameters: Array
    losses: FloatArray


TRAINING: dict[str, Any] = {
    "axes": {"ranks": (1, 3), "steps": (1, 2), "micro": (1, 2), "B": (1, 2), "T": (2, 3), "width": (1, 4)},
    "edges": (
        {"ranks": 1, "steps": 1, "micro": 1},
        {"ranks": 4, "B": 0, "steps": 1, "micro": 1},
        # Units smaller than the ranks: empty shards.
        {"ranks": 7, "steps": 1, "micro": 1, "B": 1, "width": 1},
        {"ranks": 2, "steps": 0},
    ),
}


def sample_training(
    rng: np.random.Generator, *, ranks: int, steps: int, micro: int, B: int, T: int, width: int, extra: str
) -> Case:
    """Return parameters, tokens and masks of a training run, drawn from `rng`.

    Some ranks have fewer tokens that count than others, or none.  `extra` adds clipping or a weight decay.
    """
    vocabulary = 5
    network = attention_network(vocabulary=vocabulary, width=width, heads=1, head_width=2, blocks=1)
    tokens = rng.integers(0, vocabulary, (steps, micro, ranks, B, T + 1))
    mask = rng.random((steps, micro, ranks, B, T)) < rng.random((1, 1, ranks, 1, 1))
    # A large eps, because Adam turns the rounding error of a gradient that should be 0 into a step of up to
    # lr * error / eps.
    optimizer = AdamW(lr=0.05, eps=1e-3, weight_decay=0.1 if extra == "decay" else 0.0)
    options: dict[str, Any] = {"network": network, "optimizer": optimizer}
    if extra == "clip":
        options["max_norm"] = 0.1
    return Case((initial_parameters(network, rng), tokens, mask), options)


overflow_skips = partial(np.errstate, over="ignore", invalid="ignore")  # what overflows, the step answers


def add_gradient(sums: dict[int, FloatArray], index: int, gradient: FloatArray) -> None:
    """Add a unit's gradient to that of the micro-batches before."""
    sums[index] = sum_pair(sums[index], gradient) if index in sums else gradient


def sum_over_ranks(comm: Comm, value: float) -> float:
    """Return the sum of a number over all ranks, the same on each."""
    with comm.phase("statistics"):
        return float(ring_all_reduce(comm, np.array([value], np.float64))[0])


def data_parallel_step(
    comm: Comm,
    network: Network,
    parameters: Sequence[FloatArray],
    state: OptimizerState,
    batches: Sequence[Batch],
    *,
    optimizer: AdamW,
    max_norm: float | None = None,
    growth_interval: int = 2000,
) -> tuple[list[FloatArray], OptimizerState, float]:
    """Train one step on this rank's micro-batches, together with the other ranks.

    Parameters
    ----------
    comm : Comm
        This rank.
    network : sequence of Unit
        What is trained.
    parameters : sequence of ndarray
        The units' flat parameters, in the format of the model; equal on all ranks.
    state : OptimizerState
        Of all parameters; equal on all ranks.
    batches : sequence of Batch
        Micro-batches, whose gradients are added before anything is sent.
    optimizer, max_norm, growth_interval
        As for `optimizer_step`; the norm is that of the gradient summed over ranks.

    Returns
    -------
    tuple
        Parameters, state, and the mean loss a token; equal on all ranks.

    Notes
    -----
    If no token counts anywhere the gradient and the loss are 0.
    """
    counted = max(sum_over_ranks(comm, float(sum(np.sum(batch.mask) for batch in batches))), 1.0)
    sums: dict[int, FloatArray] = {}
    take = partial(add_gradient, sums)
    factor = state.loss_scale.scale / counted
    loss = sum(loss_and_gradients(network, parameters.__getitem__, batch, factor, take) for batch in batches)
    with comm.phase("gradients"):
        reduced = [ring_all_reduce(comm, sums[index]) for index in range(len(network))]
    state = optimizer_step(
        state,
        np.concatenate(reduced),
        optimizer=optimizer,
        max_norm=max_norm,
        growth_interval=growth_interval,
    )
    dtype = parameters[0].dtype
    updated = [np.array(part) for part in split_units(network, round_to(state.master, dtype))]
    return updated, state, sum_over_ranks(comm, loss) / counted


def training_arguments(
    parameters: FloatArray, tokens: IntArray, mask: BoolArray, network: Network
) -> tuple[FloatArray, IntArray, BoolArray]:
    """Check what a training run is given and return it as arrays.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If shapes or dtypes do not fit, or there is no micro-batch.
    """
    (start,) = floating(parameters=parameters)
    split_units(network, start)
    tokens, mask = as_array("tokens", tokens), as_array("mask", mask)
    sizes = bind_axes(
        {"tokens": (tokens, "steps micro ranks B T+1"), "mask": (mask, "steps micro ranks B T")}
    )
    bind_axes({"mask": (mask, "steps micro ranks B T"), "tokens": (tokens[..., 1:], "steps micro ranks B T")})
    for axis in ("micro", "ranks"):
        if sizes[axis] < 1:
            raise OptionError(f"tokens: axis {axis} must be at least 1; got shape {tokens.shape}")
    return start, tokens, mask.astype(bool, copy=False)


def step_batches(tokens: IntArray, mask: BoolArray, rank: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches that one rank trains on in each step."""
    for words, counts in zip(tokens, mask, strict=True):
        yield [Batch(t[rank], m[rank]) for t, m in zip(words, counts, strict=True)]


@technique(
    "parallel.data",
    entries=(91, 97),
    kind="function",
    source=Source("Goyal et al. 2017", "arXiv:1706.02677", "section 2.3, Remark 3"),
    options={"extra": ("none", "clip", "decay")},
    sample=sample_training,
    **TRAINING,
)
def data_parallel(
    parameters: FloatArray,
    tokens: IntArray,
    mask: BoolArray,
    /,
    *,
    network: Network,
    optimizer: AdamW | None = None,
    max_norm: float | None = None,
    model_dtype: npt.DTypeLike | None = None,
    loss_scale: LossScale | None = None,
    growth_interval: int = 2000,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> Replicas:
    """Return what data-parallel ranks end with after training a network with AdamW.

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
    optimizer : AdamW, optional
        Settings.
    max_norm : float, optional
        Clip the gradient of a step to this global norm, after it was summed over ranks.
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
    Replicas
        Every rank's parameters in `model_dtype`, and the mean loss a counted token of each step.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit.
    OptionError
        If there is no micro-batch or no rank.

    References
    ----------
    .. [1] Goyal et al., 2017, arXiv:1706.02677, section 2.3, Remark 3: divide by the size of the whole batch.

    Examples
    --------
    >>> network = attention_network(vocabulary=3, width=2, heads=1, head_width=2, blocks=1)
    >>> tokens, mask = np.array([0, 1, 2] * 2).reshape(1, 1, 2, 1, 3), np.ones((1, 1, 2, 1, 2), bool)
    >>> start = np.zeros(sum(unit.size for unit in network))
    >>> data_parallel(start, tokens, mask, network=network).losses.round(4)  # log 3
    array([1.0986])
    """
    start, tokens, mask = training_arguments(parameters, tokens, mask, network)
    dtype = start.dtype if model_dtype is None else np.dtype(model_dtype)
    settings = optimizer or AdamW()

    def run(comm: Comm) -> tuple[Array, list[float]]:
        state = initial_state(start, loss_scale or LossScale(1.0))
        units = [np.array(part) for part in split_units(network, round_to(start, dtype))]
        losses = []
        for batches in step_batches(tokens, mask, comm.rank):
            with overflow_skips():
                units, state, loss = data_parallel_step(
                    comm,
                    network,
                    units,
                    state,
                    batches,
                    optimizer=settings,
                    max_norm=max_norm,
                    growth_interval=growth_interval,
                )
            losses.append(loss)
        return np.concatenate(units), losses

    results = launch(tokens.shape[2], run, traffic=traffic)
    return Replicas(np.stack([units for units, _ in results]), np.array(results[0][1], np.float64))
