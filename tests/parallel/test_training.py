"""Data parallelism, mixed precision and ZeRO on a real network: equal values, divided states, counts."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import pytest

from memsim.communication import partitioned_communication, zero_communication
from memsim.zero import partitioned_memory, zero_memory
from memsim.zero_r import checkpoint_communication, zero_r
from refimpl.errors import OptionError, ShapeError
from refimpl.parallel import (
    AdamW,
    Batch,
    LossScale,
    Traffic,
    Unit,
    attention_network,
    data_parallel,
    initial_parameters,
    run_ranks,
    zero_initial,
    zero_step,
)
from refimpl.parallel.network import loss_and_gradients, parameter_count, split_units
from refimpl.parallel.sharding import gather_vector, shard_vector
from refimpl.parallel.zero import ZeroState, zero
from refimpl.parallel.zero_r import PartitionedKeep
from tests.oracles.parallel import torch_training
from tests.parallel.runs import NETWORK, RANKS, run_of


@pytest.mark.parametrize(("ranks", "max_norm"), [*((ranks, None) for ranks in RANKS), (3, 0.5)])
def test_ten_steps_equal_plain_adam_on_one_device(ranks: int, max_norm: float | None) -> None:
    arrays = run_of(ranks)
    settings = AdamW(lr=0.01, weight_decay=0.01)  # the usual eps, 1e-8
    options: dict[str, Any] = {"network": NETWORK, "optimizer": settings, "max_norm": max_norm}
    expected, losses = torch_training(*arrays, **options)
    assert losses[-1] < losses[0]
    replicas = data_parallel(*arrays, **options)
    np.testing.assert_allclose(replicas.parameters, np.tile(expected, (ranks, 1)), rtol=0, atol=1e-12)
    for stage in (1, 2, 3):
        found = zero(*arrays, stage=stage, **options)
        np.testing.assert_allclose(found.parameters, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.losses, losses, rtol=0, atol=1e-12)
        if max_norm is None:
            np.testing.assert_array_equal(found.parameters, replicas.parameters[0])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_holds_its_share_and_nothing_else(ranks: int, stage: int) -> None:
    """In float16 with float32 states: the bytes of ZeRO's formula with each unit padded, array by array."""
    start, tokens, mask = run_of(ranks, steps=1)

    def program(comm: Any) -> tuple[ZeroState, int]:
        state = zero_initial(comm, NETWORK, start.astype(np.float32), stage=stage, model_dtype=np.float16)
        batches = [Batch(tokens[0, 0, comm.rank], mask[0, 0, comm.rank])]
        after, _, held = zero_step(comm, NETWORK, state, batches, optimizer=AdamW())
        return after, held

    sizes = [unit.size for unit in NETWORK]
    padded = sum(-(-size // ranks) * ranks for size in sizes)
    whole = sum(sizes)
    for state, held in run_ranks(ranks, program):
        optimizer = state.optimizer
        arrays = [*state.parameters, optimizer.master, optimizer.momentum, optimizer.variance]
        assert all(array.base is None for array in arrays), "a view would keep a larger array alive"
        assert [a.nbytes for a in arrays[-3:]] == [4 * padded // ranks] * 3
        assert sum(a.nbytes for a in state.parameters) == 2 * (padded // ranks if stage == 3 else whole)
        low = {1: 4 * whole, 2: 2 * whole + 2 * padded // ranks, 3: 4 * padded // ranks}[stage]
        assert held == low + 12 * padded // ranks


def test_stage_three_has_one_whole_unit_at_a_time() -> None:
    """What is gathered for a unit is dropped before the next one is: neither a list nor a view keeps it."""
    start, tokens, mask = run_of(3, steps=2, micro=2)
    rank: Any = threading.local()
    whole: list[int] = []
    most: list[int] = []

    def watched(unit: Unit) -> Unit:
        def seen(run: Any) -> Any:
            def call(weights: Any, *rest: Any) -> Any:
                flat = weights[0]
                while flat.base is not None:
                    flat = flat.base
                assert flat.size == unit.size, "the weights are views of the gathered unit and nothing larger"
                alive = [
                    ref
                    for ref in vars(rank).setdefault("refs", [])
                    if ref() is not None and ref() is not flat
                ]
                rank.refs = [*alive, weakref.ref(flat)]
                most.append(len(alive))
                whole.append(unit.size)
                return run(weights, *rest)

            return call

        return unit._replace(forward=seen(unit.forward), vjp=seen(unit.vjp))

    network = [watched(unit) for unit in NETWORK]
    found = zero(start, tokens, mask, network=network, stage=3)
    assert len(whole) == 3 * 2 * 2 * 2 * len(NETWORK)  # ranks, steps, micro-batches, forward and backward
    assert max(most) == 0
    np.testing.assert_array_equal(
        found.parameters, zero(start, tokens, mask, network=NETWORK, stage=3).parameters
    )


@pytest.mark.parametrize("ranks", RANKS)
def test_held_bytes_and_traffic_equal_the_models_on_every_rank(ranks: int) -> None:
    """Float16 and float32, no unit divides by 4 or 7, three micro-batches: integers, rank by rank."""
    start, tokens, mask = run_of(ranks, steps=2, micro=3)
    units = [unit.size for unit in NETWORK]
    for stage in (1, 2, 3):
        traffic, one = Traffic(), {"units": units, "ranks": ranks, "stage": stage}
        found = zero(
            start.astype(np.float32), tokens, mask, network=NETWORK, stage=stage, model_dtype="float16",
            traffic=traffic,
        )  # fmt: skip
        assert found.held_bytes.tolist() == [partitioned_memory(**one).total] * ranks
        model = partitioned_communication(**one, micro_batches=3, itemsize=2)
        counted = [
            [traffic.sent(rank, phase).bytes for rank in range(ranks)]
            for phase in ("gradients", "parameters")
        ]
        gathered = sum(item.value for item in model.terms if "all-gather" in item.name)
        assert counted == [[2 * (model.total - gathered)] * ranks, [2 * gathered] * ranks]


def test_held_bytes_are_the_papers_where_nothing_is_padded() -> None:
    network = attention_network(vocabulary=4, width=4, heads=1, head_width=4, blocks=1)
    units = [unit.size for unit in network]
    assert all(size % 4 == 0 for size in units)
    for stage in (1, 2, 3):
        paper: Any = zero_memory(parameters=sum(units), ranks=4, stage=stage)  # type: ignore[arg-type]
        held: Any = partitioned_memory(units=units, ranks=4, stage=stage)  # type: ignore[arg-type]
        assert held.total == paper.total
        sent: Any = zero_communication(parameters=sum(units), ranks=4, stage=stage, convention="ring")  # type: ignore[arg-type]
        padded: Any = partitioned_communication(units=units, ranks=4, stage=stage, itemsize=1)  # type: ignore[arg-type]
        assert padded.total == sent.total


@pytest.mark.parametrize("ranks", RANKS)
def test_every_element_is_owned_exactly_once(ranks: int) -> None:
    n = parameter_count(NETWORK)
    shards = [shard_vector(NETWORK, np.arange(1.0, n + 1), rank, ranks) for rank in range(ranks)]
    owned = np.concatenate(shards)
    assert sorted(owned[owned > 0].tolist()) == list(range(1, n + 1))
    np.testing.assert_array_equal(gather_vector(NETWORK, shards), np.arange(1.0, n + 1))


def test_some_shards_are_empty() -> None:
    """Units smaller than the ranks leave the last ranks with padding only; they train all the same."""
    network = attention_network(vocabulary=2, width=1, heads=1, head_width=1, blocks=1)
    rng = np.random.default_rng(0)
    arrays = (
        initial_parameters(network, rng),
        rng.integers(0, 2, (3, 1, 5, 1, 4)),
        np.ones((3, 1, 5, 1, 3), bool),
    )
    assert not shard_vector(network, np.ones(parameter_count(network)), 4, 5).any()
    plain = data_parallel(*arrays, network=network)
    for stage in (1, 2, 3):
        np.testing.assert_array_equal(
            zero(*arrays, network=network, stage=stage).parameters, plain.parameters[4]
        )


def sent(ranks: int, micro: int, **options: Any) -> dict[str, int]:
    traffic = Traffic()
    run = zero if "stage" in options else data_parallel
    run(*run_of(ranks, steps=2, micro=micro), network=NETWORK, traffic=traffic, **options)  # type: ignore[operator]
    return {phase: traffic.sent(0, phase).bytes for phase in ("gradients", "parameters")}


def test_stage_three_sends_half_more_than_data_parallelism() -> None:
    for ranks in (2, 3, 7):
        plain = sum(sent(ranks, 1).values())
        assert [2 * sum(sent(ranks, 1, stage=s).values()) for s in (1, 2, 3)] == [
            2 * plain,
            2 * plain,
            3 * plain,
        ]


def test_accumulation_multiplies_the_traffic_of_stages_two_and_three() -> None:
    one = sent(3, 1)["gradients"] // 2
    assert sent(3, 4)["gradients"] == 2 * one
    by_stage = {stage: sent(3, 4, stage=stage) for stage in (1, 2, 3)}
    assert [by_stage[s]["gradients"] // one for s in (1, 2, 3)] == [1, 4, 4]
    assert [by_stage[s]["parameters"] // one for s in (1, 2, 3)] == [1, 1, 8]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_mixed_precision_equals_data_parallelism_bit_for_bit(stage: int) -> None:
    start, tokens, mask = run_of(3, steps=4)
    options: dict[str, Any] = {
        "network": NETWORK, "model_dtype": "float16", "loss_scale": LossScale(2.0**8), "growth_interval": 2,
        "optimizer": AdamW(lr=0.01),
    }  # fmt: skip
    plain = data_parallel(start.astype(np.float32), tokens, mask, **options)
    found = zero(start.astype(np.float32), tokens, mask, stage=stage, **options)
    assert found.parameters.dtype == np.float16
    np.testing.assert_array_equal(found.parameters, plain.parameters[0])
    assert np.abs(found.parameters - start.astype(np.float16)).max() > 1e-3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflow_on_one_rank_skips_the_step_on_all(stage: int) -> None:
    start, tokens, mask = run_of(3, steps=1)
    tokens[0, 0, 1:] = 0  # what overflows is the gradient of rank 0's tokens

    def program(comm: Any) -> tuple[Any, ...]:
        huge = LossScale(2.0**22)
        state = zero_initial(
            comm, NETWORK, start.astype(np.float32), stage=stage, model_dtype="float16", loss_scale=huge
        )
        batch = [Batch(tokens[0, 0, comm.rank], mask[0, 0, comm.rank])]
        with np.errstate(over="ignore", invalid="ignore"):
            after, *_ = zero_step(comm, NETWORK, state, batch, optimizer=AdamW())
        same = all(np.array_equal(a, b) for a, b in zip(state.parameters, after.parameters, strict=True))
        same &= all(
            np.array_equal(a, b) for a, b in zip(state.optimizer[:3], after.optimizer[:3], strict=True)
        )
        return same, after.optimizer.step, after.optimizer.loss_scale

    assert run_ranks(3, program) == [(True, 0, LossScale(2.0**21, 0))] * 3


def test_no_token_counts_anywhere() -> None:
    start, tokens, mask = run_of(2, steps=1)
    found = zero(start, tokens, np.zeros_like(mask), network=NETWORK, stage=3)
    np.testing.assert_array_equal(found.parameters, start)
    assert found.losses.tolist() == [0.0]


def test_gradient_of_the_network() -> None:
    rng = np.random.default_rng(1)
    network = attention_network(vocabulary=5, width=4, heads=2, head_width=3, blocks=2)
    start, direction = initial_parameters(network, rng), rng.standard_normal(parameter_count(network))
    batch = Batch(rng.integers(0, 5, (2, 6)), rng.random((2, 5)) < 0.7)

    def loss(flat: Any) -> tuple[float, Any]:
        found: dict[int, Any] = {}
        units = split_units(network, flat)
        value = loss_and_gradients(network, units.__getitem__, batch, 1.0, found.__setitem__)
        return value, np.concatenate([found[index] for index in range(len(network))])

    step = 1e-5
    numeric = (loss(start + step * direction)[0] - loss(start - step * direction)[0]) / (2 * step)
    assert loss(start)[1] @ direction == pytest.approx(numeric, rel=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_partitioned_checkpoints_change_no_gradient_and_divide_the_memory(ranks: int) -> None:
    """ZeRO-R: one all-gather of B * T * M elements a block, and 1/N of the inputs kept."""
    start, tokens, mask = run_of(1, steps=1)
    batch = Batch(tokens[0, 0, 0], mask[0, 0, 0])
    units = split_units(NETWORK, start)

    def program(comm: Any) -> tuple[Any, int]:
        found: dict[int, Any] = {}
        keep = PartitionedKeep(comm)
        loss_and_gradients(NETWORK, units.__getitem__, batch, 1.0, found.__setitem__, keep)
        assert not keep
        return found, keep.peak_bytes

    whole: dict[int, Any] = {}
    loss_and_gradients(NETWORK, units.__getitem__, batch, 1.0, whole.__setitem__)
    traffic = Traffic()
    inputs = [2 * 4, 2 * 4 * 5, 2 * 4 * 5]  # tokens, and the inputs of block and head, 8 bytes each
    chunks = 8 * sum(-(-size // ranks) for size in inputs)
    for gradients, peak in run_ranks(ranks, program, traffic=traffic):
        assert peak == chunks
        for index, gradient in whole.items():
            np.testing.assert_array_equal(gradients[index], gradient)
    assert traffic.sent(0) == (3 * (ranks - 1), (ranks - 1) * chunks)
    # The two checkpoints of hidden states, as they would be in float16; the tokens are 8 elements besides.
    layers: dict[str, Any] = {"hidden": 5, "batch": 2, "sequence": 4, "layers": 2, "model_parallel": ranks}
    tokens_kept = 8 * -(-8 // ranks)
    assert 4 * zero_r(**layers, parameters=1, buffer=1)["checkpoints"] == chunks - tokens_kept
    sent = checkpoint_communication(**layers, itemsize=8).total
    assert sent == traffic.sent(0).bytes - (ranks - 1) * tokens_kept


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"stage": 0}, OptionError, "stage"),
        ({"tokens": np.zeros((1, 1, 2, 1, 3))}, ShapeError, "tokens|mask"),
        ({"parameters": np.zeros(3)}, ShapeError, "parameters"),
    ],
)
def test_what_training_refuses(change: dict[str, Any], error: type[Exception], match: str) -> None:
    start, tokens, mask = run_of(2, steps=1)
    stage = change.get("stage", 1)
    with pytest.raises(error, match=match):
        zero(
            change.get("parameters", start), change.get("tokens", tokens), mask, network=NETWORK, stage=stage
        )
