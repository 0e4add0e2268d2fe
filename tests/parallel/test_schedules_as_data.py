"""Schedules that nobody named: ranks execute what the validator accepts, and nothing else."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.timeline import replay
from refimpl.errors import OptionError
from refimpl.parallel import DeadlockError
from refimpl.parallel.adam import AdamW
from refimpl.parallel.comm import run_ranks
from refimpl.parallel.decoder_stages import stage_units
from refimpl.parallel.laws_mesh import trained_on_one_device
from refimpl.parallel.laws_pipeline import on_one_device
from refimpl.parallel.mesh import Axes, Mesh
from refimpl.parallel.mesh_training import mesh_training
from refimpl.parallel.network import Batch
from refimpl.parallel.pipeline import pipeline_parallel, small_decoder
from refimpl.parallel.pipeline_program import execute
from refimpl.parallel.schedules import ScheduleError, Step, check_schedule, pipeline_schedule, steps_of
from refimpl.registry import Case
from refimpl.transformer import DecoderConfig, initial_decoder


def drawn_schedule(rng: np.random.Generator, ranks: int, micro: int, chunks: int) -> Any:
    """Draw steps one at a time among those whose turn could be next, as a rank without a plan might."""
    stages = ranks * chunks
    rows: list[list[Step]] = [[] for _ in range(ranks)]
    left = {Step(way, m, s) for way in (False, True) for m in range(micro) for s in range(stages)}
    while left:
        ready = sorted(step for step in left if not left.intersection(step.needs(stages)))
        step = ready[rng.integers(len(ready))]
        rows[step.stage % ranks].append(step)
        left.remove(step)
    return np.array([[tuple(map(int, step)) for step in row] for row in rows])


def held_at_most(row: Any) -> int:
    return int(np.cumsum(1 - 2 * row[:, 0]).max())


def training(rng: np.random.Generator, micro: int, layers: int) -> Case:
    config, start = small_decoder(rng, "llama", layers=layers)
    tokens = rng.integers(0, config.vocabulary, (micro, 1, 3))
    return Case((start, tokens, rng.random((micro, 1, 2)) < 0.8), {"config": config})


@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.integers(1, 3),
    micro=st.integers(1, 4),
    chunks=st.integers(1, 2),
)
@settings(max_examples=15, deadline=None)
def test_any_order_that_the_validator_accepts_gives_the_gradient(
    seed: int, ranks: int, micro: int, chunks: int
) -> None:
    rng = np.random.default_rng(seed)
    plan = drawn_schedule(rng, ranks, micro, chunks)
    held = [held_at_most(row) for row in plan]
    assert check_schedule(plan, micro_batches=micro, chunks=chunks, in_flight=held) == held
    case = training(rng, micro, layers=ranks * chunks)
    found = case.replace(ranks=ranks, schedule=plan, chunks=chunks).call(pipeline_parallel)
    gradient, loss = on_one_device(case)
    np.testing.assert_allclose(found.dparameters, gradient, rtol=0, atol=1e-12)
    assert float(found.loss) == pytest.approx(loss, abs=1e-12)
    assert found.in_flight.tolist() == replay(plan).in_flight == held


@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(1, 3), micro=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_the_validator_refuses_what_would_wait_for_ever_and_nothing_else(
    seed: int, ranks: int, micro: int
) -> None:
    """Any order of each rank's steps: ranks that only send and receive get through, or they do not."""
    rng = np.random.default_rng(seed)
    plan = rng.permuted(
        pipeline_schedule(schedule="gpipe", ranks=ranks, micro_batches=micro).view("i8,i8,i8"), axis=1
    )
    rows = [[Step(bool(way), int(m), int(s)) for way, m, s in row[:, 0]] for row in plan]
    numbers = plan.view("i8").reshape(ranks, -1, 3)

    def program(comm: Any) -> int:
        return execute(comm, rows[comm.rank], ranks, lambda step, x: (np.zeros(1), lambda dy: np.zeros(1)))

    try:
        most = run_ranks(ranks, program, timeout=5.0)
    except (DeadlockError, KeyError):  # KeyError: backward before this rank's own forward
        with pytest.raises(ScheduleError, match="waits: "):
            check_schedule(numbers, micro_batches=micro)
    else:
        assert check_schedule(numbers, micro_batches=micro) == most


def test_a_mesh_runs_a_schedule_of_ones_own() -> None:
    rng = np.random.default_rng(2)
    config, start = small_decoder(rng, "llama", layers=2)
    tokens = rng.integers(0, config.vocabulary, (2, 3, 2, 1, 4))
    case = Case((start, tokens, np.ones((2, 3, 2, 1, 3), bool)), {"config": config, "optimizer": AdamW()})
    plan = drawn_schedule(rng, 2, 3, 1)
    found = case.replace(mesh=Mesh(2, 2, 2), schedule=plan, stage=3).call(mesh_training)
    expected, _ = trained_on_one_device(case)
    np.testing.assert_allclose(found.parameters, expected, rtol=0, atol=1e-10)
    assert found.in_flight.reshape(2, 4).T.tolist() == [[held_at_most(row) for row in plan]] * 4


def test_what_is_no_schedule_is_refused() -> None:
    plan = pipeline_schedule(schedule="1f1b", ranks=2, micro_batches=2)
    case = training(np.random.default_rng(0), 2, layers=2).replace(ranks=2)
    for wrong, message in (
        (plan[0], r"expected whole numbers \(ranks, steps, 3\), got int64 of shape \(4, 3\)"),
        (plan[:0], "got int64 of shape"),
        (plan.astype(float), "got float64 of shape"),
        (2 * plan, "expected 0, forward, or 1, backward"),
        (plan[:1], "expected steps of 2 ranks, got those of 1"),
        (pipeline_schedule(schedule="1f1b", ranks=2, micro_batches=3), "must run each of its steps once"),
        (plan[:, ::-1], "rank 0 waits: backward of micro-batch 1 in stage 0"),
    ):
        with pytest.raises(ScheduleError, match=message):
            case.replace(schedule=wrong).call(pipeline_parallel)
    with pytest.raises(ScheduleError, match="in_flight: expected a number for each of 2 ranks, got 1"):
        check_schedule(plan, micro_batches=2, in_flight=[2])
    for micro, chunks in ((0, 1), (2, 0)):
        with pytest.raises(OptionError):
            check_schedule(plan, micro_batches=micro, chunks=chunks)
    assert steps_of(plan[1])[0] == Step(False, 0, 1)


@pytest.mark.parametrize("pipeline", [3, 5])
def test_ranks_without_layers_pass_on_what_they_get(pipeline: int) -> None:
    """Two layers on more stages: with 5 there are ranks that hold nothing at all."""
    rng = np.random.default_rng(0)
    config, start = small_decoder(rng, "llama", layers=2)
    tokens = rng.integers(0, config.vocabulary, (2, 2, 1, 1, 4))
    case = Case((start, tokens, np.ones((2, 2, 1, 1, 3), bool)), {"config": config, "optimizer": AdamW()})
    found = case.replace(mesh=Mesh(pipeline=pipeline), max_norm=0.1).call(mesh_training)
    expected, losses = trained_on_one_device(case.replace(max_norm=0.1))
    np.testing.assert_allclose(found.parameters, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.losses, losses, rtol=0, atol=1e-10)
    assert (found.held_bytes == 0).sum() == max(pipeline - 3, 0)


def test_recomputation_keeps_inputs_alone() -> None:
    """What a layer leaves behind for the way back: nothing but its input, or several times as much."""
    config = DecoderConfig(vocabulary=4, width=16, layers=1, num_heads=2, hidden=32)
    weights = initial_decoder(config, np.random.default_rng(0))
    batch = Batch(np.zeros((4, 65), int), np.ones((4, 64), bool))
    x = np.ones((4, 64, config.width))

    def program(comm: Any, recompute: bool) -> int:
        axes = Axes(comm, comm, comm)
        _, layer, *_ = stage_units(config, 0, 1, recompute=recompute)
        part, own = layer.part_of(axes, batch), {name: weights[name] for name in layer.names}
        tracemalloc.start()
        y, back = part(own, x)
        left, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert back(own, y)[0].shape == x.shape
        return left - y.nbytes

    (kept,), (everything,) = (run_ranks(1, program, recompute) for recompute in (True, False))
    assert kept < x.nbytes / 4  # a few closures: the input is the caller's
    assert everything > 2 * x.nbytes


def test_without_steps_options_are_looked_at_all_the_same() -> None:
    config, start = small_decoder(np.random.default_rng(0), "llama", layers=1)
    case = Case((start, np.zeros((0, 2, 1, 1, 3), int), np.ones((0, 2, 1, 1, 2), bool)), {"config": config})
    assert case.replace(mesh=Mesh()).call(mesh_training).losses.size == 0
    for wrong in ({"schedule": "zero bubble"}, {"chunks": 0}, {"chunks": 2}, {"stage": 4}):
        with pytest.raises(OptionError):
            case.replace(mesh=Mesh(), **wrong).call(mesh_training)
