"""Programs of ranks that are wrong in one way; the records must catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from refimpl import registry
from refimpl.parallel import run_ranks
from refimpl.parallel.adam import adamw_step
from refimpl.parallel.array_collectives import all_gather, all_reduce, all_to_all, broadcast
from refimpl.parallel.collectives import chunk_length, ring_all_gather, ring_all_reduce, ring_reduce_scatter
from refimpl.parallel.data import data_parallel, sum_over_ranks
from refimpl.parallel.mixed_precision import (
    OptimizerState,
    mixed_precision_steps,
    next_loss_scale,
    optimizer_step,
)
from refimpl.parallel.zero import zero
from refimpl.testing import check

registry.load()
Function = Callable[..., Any]


def changed(f: Function, **replacements: Any) -> Function:
    """Return `f` with names of its module replaced while it runs."""

    def mutant(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.multiple(f.__module__, **replacements):
            return f(*args, **kwargs)

    return mutant


def no_padding(x: Any, /, *, algorithm: str) -> Any:
    """Cut the vector into N chunks of floor(n / N): the rest is never summed."""
    ranks, n = x.shape
    whole = n // ranks * ranks
    return np.concatenate([all_reduce(x[:, :whole]), x[:, whole:]], axis=1)


def last_rank_forgotten(x: Any, /, *, algorithm: str) -> Any:
    total = run_ranks(len(x), lambda comm: ring_all_reduce(comm, x[comm.rank] * (comm.rank < len(x) - 1)))
    return np.stack(total) if len(x) > 1 else x


def ranks_differ_in_the_last_bit(x: Any, /, *, algorithm: str) -> Any:
    total = all_reduce(x)
    total[-1] = np.nextafter(total[-1], np.inf)
    return total


def chunks_turned(x: Any, /) -> Any:
    return np.roll(all_gather(x), x.shape[1], axis=1)


def blocks_not_exchanged(x: Any, /) -> Any:
    return x.copy()


def always_from_rank_zero(x: Any, /, *, root: int) -> Any:
    return broadcast(x, root=0)


def no_bias_correction(*arrays: Any, step: int, optimizer: Any) -> Any:
    return adamw_step(*arrays, step=10**6, optimizer=optimizer)


def eps_inside_the_root(p: Any, g: Any, m: Any, v: Any, /, *, step: int, optimizer: Any) -> Any:
    exact = adamw_step(p, g, m, v, step=step, optimizer=optimizer)
    b1, b2 = optimizer.betas
    root = np.sqrt(exact.variance / (1 - b2**step) + optimizer.eps)
    decayed = p - optimizer.lr * optimizer.weight_decay * p
    return exact._replace(parameters=decayed - optimizer.lr * exact.momentum / (1 - b1**step) / root)


def decay_in_the_gradient(p: Any, g: Any, m: Any, v: Any, /, *, step: int, optimizer: Any) -> Any:
    plain = type(optimizer)(optimizer.lr, optimizer.betas, optimizer.eps)
    return adamw_step(p, g + optimizer.weight_decay * p, m, v, step=step, optimizer=plain)


def clip_before_unscaling(state: OptimizerState, gradient: Any, **options: Any) -> OptimizerState:
    limit = options.pop("max_norm", None)
    norm = float(np.linalg.norm(gradient.astype(np.float64)))
    if limit is not None and norm > limit:
        gradient = gradient.astype(np.float64) * (limit / norm)
    return optimizer_step(state, gradient, **options)


def skipped_step_counts(state: OptimizerState, gradient: Any, **options: Any) -> OptimizerState:
    after = optimizer_step(state, gradient, **options)
    return after._replace(step=state.step + 1)


def streak_survives_overflow(state: Any, *, overflow: bool, growth_interval: int = 2000) -> Any:
    after = next_loss_scale(state, overflow=overflow, growth_interval=growth_interval)
    return after._replace(good_steps=state.good_steps) if overflow else after


def last_micro_batch_alone(sums: dict[int, Any], index: int, gradient: Any) -> None:
    sums[index] = gradient


def mean_over_ranks(comm: Any, value: float) -> float:
    """As if each rank divided by its own tokens and ranks were then averaged."""
    return value * comm.size


def reduce_scatter_by_all_reduce(comm: Any, x: Any) -> Any:
    total = np.zeros(comm.size * chunk_length(x.size, comm.size), x.dtype)
    total[: x.size] = ring_all_reduce(comm, x).ravel()
    return np.array(total.reshape(comm.size, -1)[comm.rank])


def last_shard_dropped(comm: Any, chunk: Any) -> Any:
    return ring_all_gather(comm, chunk * (comm.rank < comm.size - 1 or comm.size == 1))


def norm_of_the_own_shard(state: OptimizerState, gradient: Any, **options: Any) -> OptimizerState:
    own = options.pop("sum_over_shards")
    own(0.0)  # sends what it should
    return optimizer_step(state, gradient, **options)


def neighbours_chunk(comm: Any, x: Any) -> Any:
    """Rank r gets the chunk of rank r + 1."""
    chunk = ring_reduce_scatter(comm, x)
    comm.send((comm.rank - 1) % comm.size, chunk) if comm.size > 1 else None
    return comm.recv((comm.rank + 1) % comm.size) if comm.size > 1 else chunk


def divides_less(*args: Any, stage: int, **options: Any) -> Any:
    return zero(*args, stage=max(stage - 1, 1), **options)


TRAINING = {
    "ranks": 3, "steps": 2, "micro": 1, "B": 1, "T": 3, "width": 3, "extra": "clip", "stage": 2
}  # fmt: skip
REPLICAS = {name: value for name, value in TRAINING.items() if name != "stage"}
STEPS = mixed_precision_steps
MUTANTS: dict[str, tuple[str, Function, dict[str, Any] | None]] = {
    "no padding": ("parallel.collectives", no_padding, None),
    "last rank forgotten": ("parallel.collectives", last_rank_forgotten, None),
    "ranks differ": ("parallel.collectives", ranks_differ_in_the_last_bit, None),
    "chunks turned": ("parallel.collectives.all_gather", chunks_turned, None),
    "not exchanged": ("parallel.collectives.all_to_all", blocks_not_exchanged, None),
    "wrong root": ("parallel.collectives.broadcast", always_from_rank_zero, None),
    "one step not corrected": ("parallel.mixed_precision.adamw", no_bias_correction, None),
    "eps inside the root": ("parallel.mixed_precision.adamw", eps_inside_the_root, None),
    "coupled decay": ("parallel.mixed_precision.adamw", decay_in_the_gradient, None),
    "no bias correction": (
        "parallel.mixed_precision", changed(STEPS, adamw_step=no_bias_correction), None
    ),
    "clip before unscaling": (
        "parallel.mixed_precision", changed(STEPS, optimizer_step=clip_before_unscaling), None
    ),
    "skipped step counts": (
        "parallel.mixed_precision", changed(STEPS, optimizer_step=skipped_step_counts), None
    ),
    "streak survives": (
        "parallel.mixed_precision", changed(STEPS, next_loss_scale=streak_survives_overflow), None
    ),
    "mean over ranks": (
        "parallel.data", changed(data_parallel, sum_over_ranks=mean_over_ranks), REPLICAS
    ),
    "nothing reduced": ("parallel.data", changed(data_parallel, ring_all_reduce=lambda _, x: x), REPLICAS),
    "last micro-batch alone": (
        "parallel.data", changed(data_parallel, add_gradient=last_micro_batch_alone), {**REPLICAS, "micro": 2}
    ),
    "last micro-batch alone, sharded": (
        "parallel.zero", changed(zero, add_gradient=last_micro_batch_alone), {**TRAINING, "micro": 2}
    ),
    "mean over ranks, sharded": ("parallel.zero", changed(zero, sum_over_ranks=mean_over_ranks), TRAINING),
    "last shard dropped": ("parallel.zero", changed(zero, ring_all_gather=last_shard_dropped), TRAINING),
    "norm of the own shard": ("parallel.zero", changed(zero, optimizer_step=norm_of_the_own_shard), TRAINING),
    "neighbour's chunk": ("parallel.zero", changed(zero, ring_reduce_scatter=neighbours_chunk), TRAINING),
    "divides less": ("parallel.zero", divides_less, TRAINING),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTANTS)
def test_mutant_is_caught(what: str) -> None:
    name, mutant, axes = MUTANTS[what]
    report = check(name, mutant, examples=6, axes=axes)
    assert report.failed, f"survived {report.counts()}"
    assert "raised" not in report.failed[0].detail, report.failed[0].detail


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_reduce_for_reduce_scatter_shows_in_the_bytes_alone(stage: int) -> None:
    mutant = changed(zero, ring_reduce_scatter=reduce_scatter_by_all_reduce)
    report = check("parallel.zero", mutant, axes={**TRAINING, "stage": stage})
    assert {o.check for o in report.failed} == {"parallel.one_and_two_send_twice_the_model_three_thrice"}


def test_the_unbroken_pass() -> None:
    for name, f in (("parallel.collectives", all_reduce), ("parallel.collectives.all_to_all", all_to_all)):
        assert check(name, f, examples=3).ok
    assert check("parallel.zero", changed(zero, sum_over_ranks=sum_over_ranks), axes=TRAINING).ok
