"""Tensor, pipeline and data parallelism at work: one device's values, shares, counts, formulas, schedules."""

from __future__ import annotations

import math
import threading
import weakref
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from memsim.parallelism import crossover_batch, pipeline_bubble
from memsim.pipeline import pipeline_in_flight, pipeline_time
from memsim.prices.mesh import mesh_phases, rank_sizes
from memsim.timeline import replay
from refimpl.errors import OptionError, ShapeError
from refimpl.parallel import AdamW, Traffic, mesh_program, pipeline_program, run_ranks
from refimpl.parallel.decoder_stages import decoder_vector
from refimpl.parallel.groups import group
from refimpl.parallel.mesh import Mesh
from refimpl.parallel.mesh_training import mesh_training
from refimpl.parallel.mixture import MixtureConfig, model_shapes
from refimpl.parallel.pipedream import pipedream
from refimpl.parallel.pipeline import pipeline_parallel, small_decoder
from refimpl.parallel.schedules import (
    SCHEDULES,
    ScheduleError,
    check_schedule,
    pipeline_schedule,
    steps_of,
)
from refimpl.parallel.tensor import tensor_parallel
from refimpl.parallel.vocabulary import vocabulary_loss
from refimpl.registry import Case
from refimpl.transformer import DecoderConfig, initial_decoder
from tests.oracles.parallel_pipeline import adamw_of_torch

CONFIG = DecoderConfig(vocabulary=32, width=16, layers=4, num_heads=4, num_kv_heads=2, hidden=24)
MODEL = CONFIG, decoder_vector(CONFIG, initial_decoder(CONFIG, np.random.default_rng(0)))
STEPS, MICRO, SEQUENCES, LENGTH = 10, 4, 16, 8


def training(data: int, **options: Any) -> Case:
    """Return ten steps on the same 16 sequences, dealt to micro-batches and data-parallel ranks."""
    config, start = MODEL
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocabulary, (SEQUENCES, LENGTH + 1))
    mask = rng.random((SEQUENCES, LENGTH)) < 0.8

    def dealt(x: Any) -> Any:
        share = SEQUENCES // (MICRO * data)
        return np.broadcast_to(x.reshape(MICRO, data, share, -1), (STEPS, MICRO, data, share, x.shape[1]))

    return Case(
        (start, dealt(tokens), dealt(mask)), {"config": config, "optimizer": AdamW(lr=0.01), **options}
    )


@pytest.fixture(scope="module")
def one_device() -> Any:
    """Parameters and losses by PyTorch's autograd and AdamW."""
    pytest.importorskip("torch")
    return training(1).call(adamw_of_torch)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (Mesh(2, 2, 2), {"stage": 1}),
        (Mesh(2, 2, 2), {"stage": 2, "sequence_parallel": True, "recompute": True}),
        (Mesh(2, 2, 2), {"stage": 3, "schedule": "interleaved", "chunks": 2}),
        (Mesh(2, 1, 4), {"stage": 3, "sequence_parallel": True}),
        (Mesh(1, 4, 2), {"stage": 2, "schedule": "gpipe"}),
    ],
    ids=str,
)
def test_ten_steps_on_eight_ranks_are_those_of_one_device(
    mesh: Mesh, options: dict[str, Any], one_device: Any
) -> None:
    traffic = Traffic()
    case = training(mesh.data, mesh=mesh, **options)
    found = case.replace(traffic=traffic).call(mesh_training)
    assert one_device["losses"][-1] < 0.9 * one_device["losses"][0]
    np.testing.assert_allclose(found.parameters, one_device["parameters"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.losses, one_device["losses"], rtol=0, atol=1e-10)
    assert found.spread == 0
    priced = mesh_phases(case)
    for rank in range(mesh.size):
        assert traffic.counts[rank] == priced[rank], f"bytes and messages of rank {rank}, by collective"


def test_ten_steps_of_a_mixture_on_eight_ranks_are_those_of_one_device() -> None:
    """Tensor 2, pipeline 2, experts on 2: each has half of the experts, and no other rank their states."""
    pytest.importorskip("torch")
    config = MixtureConfig(vocabulary=32, width=16, layers=2, num_heads=4, hidden=8, experts=4, k=2)
    shapes = model_shapes(config)
    start = np.random.default_rng(0).standard_normal(sum(map(math.prod, shapes.values()))) / 4
    mesh, traffic = Mesh(2, 2, 2), Traffic()
    case = training(2, config=config, mesh=mesh, stage=2)
    case = case.replace(start, *case.args[1:])
    expected = case.call(adamw_of_torch)
    found = case.replace(traffic=traffic).call(mesh_training)
    np.testing.assert_allclose(found.parameters, expected["parameters"], rtol=0, atol=1e-10)
    assert found.spread == 0
    priced = mesh_phases(case)
    assert [traffic.counts[rank] for rank in range(8)] == priced
    # 4 micro-batches of 2 sequences of 8 tokens: 2 of 4 experts are away, with a place of width 16 for each.
    buffers = STEPS * MICRO * 2 * (2 * LENGTH) * 16 * 8
    assert {traffic.sent(rank, "dispatch").bytes for rank in range(8)} == {buffers}
    experts = sum(math.prod(shape) for name, shape in shapes.items() if "experts" in name)
    rest = [sum(size for key, (size, _) in rank_sizes(config, mesh, 1, p).items() if "experts" not in key)
            for p in (0, 1)]  # fmt: skip
    own = experts // 8  # a layer a stage, half of its experts, half of their hidden units
    assert found.held_bytes.tolist() == [
        8 * (5 * own + rest[p] + 4 * (rest[p] // 2)) for p in (0,) * 4 + (1,) * 4
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_holds_its_share_alone(stage: int) -> None:
    """Whole model states are 5 arrays of 8 bytes a parameter; here everything divides by all ranks."""
    config, start = MODEL
    mesh = Mesh(2, 2, 2)
    case = training(2, mesh=mesh, stage=stage)
    found = case.replace(case.args[0], *(array[:1] for array in case.args[1:])).call(mesh_training)
    replicated = {1: 2, 2: 1, 3: 0}[stage]  # arrays that ZeRO leaves whole on each rank
    norms = 16 * (2 * config.layers + 1)  # every tensor-parallel rank has them
    table = config.vocabulary * config.width  # first and last stage have it
    model = start.size - norms + table
    per_rank = Fraction(model, 4) + Fraction(norms, 2)  # mean over the two stages
    total = 8 * 8 * (replicated * per_rank + (5 - replicated) * per_rank / 2)
    assert found.held_bytes.sum() == total
    assert found.held_bytes.max() < 5 * start.nbytes / (7 if stage == 3 else 4)


def test_stage_three_has_one_whole_unit_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered for a unit is dropped before the next one: what goes back keeps no weights."""
    gather, rank, alive = mesh_program.gather_unit, threading.local(), []

    def watched(comm: Any, unit: Any, chunk: Any) -> Any:
        before = [ref for ref in vars(rank).get("refs", []) if ref() is not None]
        alive.append(len(before))
        whole = gather(comm, unit, chunk)
        rank.refs = [*before, weakref.ref(whole)]
        return whole

    monkeypatch.setattr(mesh_program, "gather_unit", watched)
    case = training(2, mesh=Mesh(1, 2, 2), stage=3)
    case.replace(case.args[0], *(array[:1] for array in case.args[1:])).call(mesh_training)
    # Two layers and the embedding, on the last ranks the norm too; forward and back, 4 micro-batches.
    assert (len(alive), max(alive)) == (2 * (3 + 4) * 2 * MICRO, 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "micro"), [(2, 4), (3, 6), (4, 4)])
def test_executed_schedules_have_the_bubble_and_the_activations_of_the_formulas(
    schedule: Any, ranks: int, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ranks ran, as they ran it, replayed in time."""
    chunks = 2 if schedule == "interleaved" else 1
    ran: dict[int, list[Any]] = {}
    execute = pipeline_program.execute

    def logged(comm: Any, steps: Any, stages: int, forward: Any) -> int:
        def noted(step: Any, x: Any) -> Any:
            ran.setdefault(comm.rank, []).append(step)
            y, back = forward(step, x)

            def noted_back(dy: Any) -> Any:
                ran[comm.rank].append(step._replace(backward=True))
                return back(dy)

            return y, noted_back

        return execute(comm, steps, stages, noted)

    monkeypatch.setattr(pipeline_program, "execute", logged)
    rng = np.random.default_rng(0)
    config, start = small_decoder(rng, "llama", layers=ranks * chunks)
    tokens = rng.integers(0, config.vocabulary, (micro, 1, 3))
    shape: dict[str, Any] = {"schedule": schedule, "ranks": ranks, "chunks": chunks}
    found = pipeline_parallel(start, tokens, np.ones((micro, 1, 2), bool), config=config, **shape)
    executed = np.array([[tuple(map(int, step)) for step in ran[rank]] for rank in range(ranks)])
    shape["micro_batches"] = micro
    np.testing.assert_array_equal(executed, pipeline_schedule(**shape))
    line = replay(executed, forward_time=Fraction(1, chunks), backward_time=Fraction(2, chunks))
    assert line.idle_share == Fraction(ranks - 1, micro * chunks + ranks - 1)
    assert line.makespan == 3 * (micro + Fraction(ranks - 1, chunks)) == pipeline_time(**shape).total
    held = [int(pipeline_in_flight(**shape, rank=rank).total) for rank in range(ranks)]
    assert found.in_flight.tolist() == line.in_flight == held
    assert line.idle_share == pipeline_bubble(stages=ranks, microbatches=micro, chunks=chunks).total


def test_unequal_stages_and_slow_links_cost_what_the_slowest_costs() -> None:
    """A middle stage of double work sets the pace; a link adds its time on the way there and back."""
    plans = {name: pipeline_schedule(schedule=name, ranks=3, micro_batches=50) for name in ("gpipe", "1f1b")}
    slow = {"forward_time": [1, 2, 1], "backward_time": [2, 4, 2]}
    # 1F1B: the middle rank starts at 1, waits once for the last one, from 5 to 6, and is 2 from the end.
    assert replay(plans["1f1b"], **slow).makespan == 1 + 50 * 6 + 1 + 2
    # GPipe: it waits while the last micro-batch goes through the last stage and back.
    assert replay(plans["gpipe"], **slow).makespan == 1 + 50 * 6 + 3 + 2
    assert replay(plans["gpipe"], send_time=1).makespan == replay(plans["gpipe"]).makespan + 4
    # From one stage of a rank to its next one nothing is sent.
    alone = pipeline_schedule(schedule="interleaved", ranks=1, micro_batches=2, chunks=3)
    assert replay(alone, send_time=5).makespan == 2 * 3 * 3


def test_tensor_parallelism_sends_more_than_data_parallelism_beyond_the_crossover() -> None:
    """Counted on 2 ranks: activations grow with the batch, gradients do not; they cross at Ψ/(4 s h L)."""
    config, start = MODEL
    layers = start.size - config.vocabulary * config.width - config.width  # the formula knows layers alone
    at = crossover_batch(parameters=layers, sequence=LENGTH, hidden=config.width, layers=config.layers).total
    sent = {}
    for batch in (int(at), int(at) + 1):
        tokens, mask = np.zeros((1, 1, 1, batch, LENGTH + 1), int), np.ones((1, 1, 1, batch, LENGTH), bool)
        for mesh in (Mesh(2, 1, 1), Mesh(1, 1, 2)):
            case = Case(
                (start, *(np.repeat(x, mesh.data, axis=2) for x in (tokens, mask))), {"config": config}
            )
            traffic = Traffic()
            case.replace(mesh=mesh, traffic=traffic).call(mesh_training)
            phases = ("tensor all-reduce", "gradients", "parameters")
            sent[batch, mesh.tensor] = sum(traffic.sent(0, phase).bytes for phase in phases)
        # Beside the layers: embedding and head are summed over ranks too; table and last norm have gradients.
        sent[batch, 2] -= 2 * batch * LENGTH * config.width * 8
        sent[batch, 1] -= (start.size - layers) * 8
    assert sent[int(at), 2] <= sent[int(at), 1]
    assert sent[int(at) + 1, 2] > sent[int(at) + 1, 1]


def test_ranks_of_a_group_count_under_their_own_numbers() -> None:
    traffic = Traffic()

    def program(comm: Any) -> int:
        odd = group(comm, [3, 1]) if comm.rank % 2 else group(comm, [0, 2])
        with odd.phase("pair"):
            odd.send(1 - odd.rank, np.array([comm.rank]))
        return int(odd.recv(1 - odd.rank)[0])

    assert run_ranks(4, program, traffic=traffic) == [2, 3, 0, 1]
    assert [traffic.sent(rank, "pair").messages for rank in range(4)] == [1] * 4
    for ranks in ([0, 0], [0, 9]):
        with pytest.raises(OptionError, match="expected different ranks below 2"):
            run_ranks(2, lambda comm, ranks=ranks: group(comm, ranks))
    with pytest.raises(OptionError, match="expected rank"):
        run_ranks(2, lambda comm: group(comm, [0]))


def test_a_mesh_numbers_its_ranks_once() -> None:
    mesh = Mesh(tensor=2, pipeline=3, data=4)
    assert [mesh.rank(mesh.place(rank)) for rank in range(24)] == list(range(24))
    with pytest.raises(OptionError, match="has 24 ranks, the network 2"):
        run_ranks(2, mesh.axes)


def test_the_validator_refuses_what_cannot_be_executed() -> None:
    plan = pipeline_schedule(schedule="1f1b", ranks=2, micro_batches=3)
    for wrong, message in (
        (plan[:, :-1], "rank 0 must run each of its steps once"),
        (plan[::-1], "rank 0 must run each of its steps once"),
        (np.stack([plan[0][::-1], plan[1]]), "rank 0 waits: backward of micro-batch 2 in stage 0"),
    ):
        with pytest.raises(ScheduleError, match=message):
            check_schedule(wrong, micro_batches=3)
    with pytest.raises(ScheduleError, match="rank 0 holds 2 activations at once; it has room for 1"):
        check_schedule(plan, micro_batches=3, in_flight=[1, 1])
    with pytest.raises(OptionError, match="waits for ever"):
        replay(np.stack([plan[0][::-1], plan[1]]))
    assert str(steps_of(plan[0])[-1]) == "backward of micro-batch 2 in stage 0"


def test_what_does_not_divide_or_fit_is_refused() -> None:
    config, start = MODEL
    tokens, mask = np.zeros((1, 1, 1, 1, 3), int), np.ones((1, 1, 1, 1, 2), bool)
    run = Case((start, tokens, mask), {"config": config})
    for options, error, message in (
        ({"mesh": Mesh(3)}, ShapeError, "must divide into 3 ranks"),
        ({"mesh": Mesh(4)}, ShapeError, "num_kv_heads: 2 heads do not divide into 4 ranks"),
        ({"mesh": Mesh(1, 1, 2)}, ShapeError, "expected 2 data-parallel ranks"),
        ({"mesh": Mesh(), "stage": 4}, OptionError, "stage: expected 1, 2 or 3"),
        ({"mesh": Mesh(), "max_norm": -1.0}, OptionError, "max_norm"),
        ({"mesh": Mesh(), "max_norm": np.nan}, OptionError, "max_norm"),
        ({"mesh": Mesh(), "schedule": "zero bubble"}, OptionError, "schedule: expected one of gpipe"),
        ({"mesh": Mesh(1, 2), "schedule": "interleaved", "chunks": 2}, OptionError, "must divide by 2 ranks"),
        ({"mesh": Mesh(1, 2), "chunks": 2}, OptionError, "chunks: expected 2 or more to interleave"),
    ):
        with pytest.raises(error, match=message):
            run.replace(**options).call(mesh_training)
    with pytest.raises(OptionError, match="untied"):
        pipedream(start, tokens[0, 0], mask[0, 0], config=config, ranks=2, lr=0.1)
    weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), np.eye(2))
    weights |= dict.fromkeys(("gamma_1", "gamma_2", "beta_1", "beta_2"), np.ones(2))
    with pytest.raises(ShapeError, match="axis T must divide into 2 ranks"):
        tensor_parallel(np.ones((1, 3, 2)), ranks=2, num_heads=2, sequence_parallel=True, **weights)
    with pytest.raises(ShapeError, match="V divisible by 2 ranks"):
        vocabulary_loss(np.ones((1, 1, 1)), np.ones((3, 1)), np.zeros((1, 1), int), ranks=2)


def test_a_tied_table_on_one_rank_has_two_uses() -> None:
    config = MODEL[0]
    assert rank_sizes(config, Mesh(), 1, 0)["embedding"] == [512, 2]
    assert rank_sizes(config, Mesh(2, 2), 1, 1)["embedding"] == [256, 1]
