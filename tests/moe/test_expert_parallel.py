"""Experts over 1, 2, 4 and 7 ranks give what one device gives, and send what the model says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memsim.moe_communication import moe_all_to_all
from memsim.prices import expert_parallel as expert_parallel_prices
from refimpl.moe.expert_parallel import expert_parallel, expert_parallel_vjp
from refimpl.moe.gshard_as_coded import gshard_as_coded, gshard_as_coded_routing, gshard_as_coded_vjp
from refimpl.moe.ragged_parallel import expert_parallel_ragged
from refimpl.moe.rank_layer import from_experts, placement, to_experts
from refimpl.moe.samples import sample_layer
from refimpl.moe.switch import switch, switch_vjp
from refimpl.parallel.comm import Traffic, run_ranks
from refimpl.registry import Case

RANKS = (1, 2, 4, 7)
BESIDE = Path(sys.executable).parent
MPIEXEC = shutil.which("mpiexec", path=f"{BESIDE}{os.pathsep}{os.environ.get('PATH', '')}")
ROOT = Path(__file__).resolve().parents[2]
needs_mpi = pytest.mark.skipif(
    (MPIEXEC is None or importlib.util.find_spec("mpi4py") is None) and "FRUGAL_TEST_MPI" not in os.environ,
    reason="needs mpi4py and mpiexec",
)
# Sums of a rank's rows may be taken in another order than those of one device: a few roundings of terms
# that are near 1.
ROUNDING = 1e-11


def layer(experts: int, experts_kind: str = "gated silu") -> Case:
    """28 tokens, which 1, 2, 4 and 7 ranks share alike."""
    return sample_layer(np.random.default_rng(5), T=28, D=6, E=experts, F=5, experts=experts_kind)


def on_ranks(case: Case, ranks: int, **options: Any) -> Case:
    x, *weights = case.args
    return case.replace(x.reshape(ranks, len(x) // ranks, -1), *weights, **options)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(
        np.reshape(found, np.shape(expected)), expected, rtol=ROUNDING, atol=ROUNDING, strict=True
    )


@pytest.mark.parametrize("experts", [8, 5])
@pytest.mark.parametrize("ranks", RANKS)
def test_with_room_ranks_equal_one_device(ranks: int, experts: int) -> None:
    case = layer(experts)
    dy = np.random.default_rng(1).standard_normal(case.args[0].shape)
    expected = case.replace(capacity=28).call(gshard_as_coded)
    close(on_ranks(case, ranks, capacity=28 // ranks).call(expert_parallel), expected)
    wanted = gshard_as_coded_vjp(*case.args, dy, capacity=28, **case.kwargs)
    split = on_ranks(case, ranks, capacity=28 // ranks)
    found = expert_parallel_vjp(*split.args, dy.reshape(split.args[0].shape), **split.kwargs)
    for name, gradient in wanted._asdict().items():
        close(getattr(found, name), gradient)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    "layer_of_one", [(switch, switch_vjp, 1, "switch"), (gshard_as_coded, gshard_as_coded_vjp, 2, "gshard")]
)
def test_where_tokens_are_dropped_ranks_are_groups(ranks: int, layer_of_one: Any) -> None:
    forward, backward, k, convention = layer_of_one
    case = layer(5, "relu")
    tight: dict[str, Any] = {"capacity_factor": 0.8, "rounding": "flaxformer", "min_capacity": 1}
    dy = np.random.default_rng(1).standard_normal(case.args[0].shape)
    expected = case.replace(groups=ranks, **tight).call(forward)
    assert np.any(np.all(expected == 0, axis=1)) or k == 2, "no token was dropped: the case says nothing"
    split = on_ranks(case, ranks, k=k, convention=convention, **tight)
    close(split.call(expert_parallel), expected)
    wanted = backward(*case.args, dy, groups=ranks, **tight, **case.kwargs)
    found = expert_parallel_vjp(*split.args, dy.reshape(split.args[0].shape), **split.kwargs)
    for name, gradient in wanted._asdict().items():
        if gradient is not None:
            close(getattr(found, name), gradient)


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_groups_of_a_rank_have_buffers_of_their_own(ranks: int) -> None:
    """Two groups a rank are twice as many groups on one device, and twice the places in what is sent."""
    case, tight = layer(5, "relu"), {"capacity_factor": 0.8, "rounding": "flaxformer", "min_capacity": 1}
    expected = case.replace(groups=2 * ranks, **tight).call(gshard_as_coded)
    split = on_ranks(case, ranks, groups=2, **tight)
    traffic = Traffic()
    close(split.replace(traffic=traffic).call(expert_parallel), expected)
    model = expert_parallel_prices.expert_parallel(split)
    for rank in range(ranks):
        assert traffic.sent(rank).bytes == model[f"rank {rank} bytes"]


@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_equal_the_model_phase_by_phase(ranks: int) -> None:
    traffic, forward = Traffic(), Traffic()
    split = on_ranks(layer(5), ranks, capacity=3)
    split.replace(traffic=forward).call(expert_parallel)
    dy = np.ones(split.args[0].shape)
    expert_parallel_vjp(*split.args, dy, traffic=traffic, **split.kwargs)
    for rank, part in enumerate(placement(5, ranks)):
        layer_bytes = moe_all_to_all(
            experts=5,
            capacity=3,
            width=6,
            itemsize=8,
            ranks=ranks,
            held=part.stop - part.start,
            direction="both",
        )
        assert forward.sent(rank).bytes == layer_bytes["forward, dispatch"] + layer_bytes["forward, combine"]
        for phase, name in (
            ("dispatch", "forward, dispatch"),
            ("combine", "forward, combine"),
            ("dispatch gradients", "backward, dispatch"),
            ("combine gradients", "backward, combine"),
        ):
            assert traffic.sent(rank, phase).bytes == layer_bytes[name]
            assert traffic.sent(rank, phase).messages == ranks - 1
    # By hand, for 7 ranks: five hold one expert each, of 3 places, 6 features, 8 bytes.
    if ranks == 7:
        assert [traffic.sent(rank, "dispatch").bytes for rank in range(7)] == [576] * 5 + [720] * 2
        assert [traffic.sent(rank, "combine").bytes for rank in range(7)] == [6 * 144] * 5 + [0] * 2
        assert traffic.sent(0, "router gradient").bytes == 2 * 6 * 5 * 8  # 30 elements: chunks of 5


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_the_ragged_exchange_sends_what_is_kept(ranks: int) -> None:
    traffic, padded = Traffic(), Traffic()
    split = on_ranks(layer(5), ranks, capacity_factor=3.0, min_capacity=1)
    expected = split.replace(traffic=padded).call(expert_parallel)
    close(split.replace(traffic=traffic).call(expert_parallel_ragged), expected)
    # Who sends how many tokens to whom, from each rank's routing alone.
    holder = np.repeat(np.arange(ranks), [part.stop - part.start for part in placement(5, ranks)])
    sends = np.zeros((ranks, ranks), int)
    x, w_router = split.args[:2]
    for rank, tokens in enumerate(x):
        routing = gshard_as_coded_routing(tokens, w_router, capacity_factor=3.0, min_capacity=1)
        for e in routing.expert[routing.kept]:
            sends[rank, holder[e]] += 1
    token = 6 * 8  # features, bytes
    for rank in range(ranks):
        others = np.arange(ranks) != rank
        assert traffic.sent(rank, "dispatch").bytes == token * sends[rank, others].sum()
        assert traffic.sent(rank, "combine").bytes == token * sends[others, rank].sum()
        assert traffic.sent(rank, "counts").bytes == 8 * np.sum(holder != rank)
    whole = sum(padded.sent(rank).bytes for rank in range(ranks))
    assert sum(traffic.sent(rank).bytes for rank in range(ranks)) < whole


def test_experts_are_placed_evenly_and_once() -> None:
    for experts in range(9):
        for ranks in range(1, 9):
            parts = placement(experts, ranks)
            assert [e for part in parts for e in range(experts)[part]] == list(range(experts))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("ranks", RANKS)
def test_there_and_back_is_the_identity(ranks: int) -> None:
    buffers = np.random.default_rng(0).standard_normal((ranks, 5, 2, 3))

    def program(comm: Any) -> Any:
        rows = to_experts(comm, buffers[comm.rank])
        part = placement(5, ranks)[comm.rank]
        for index, e in enumerate(range(5)[part]):
            np.testing.assert_array_equal(rows[index], buffers[:, e].reshape(-1, 3))
        return from_experts(comm, rows)

    np.testing.assert_array_equal(np.stack(run_ranks(ranks, program)), buffers)


EQUAL = """
import sys
import numpy as np
from refimpl import registry
from refimpl.parallel import Traffic, mpi

registry.load()
for name in ("moe.expert_parallel", "moe.expert_parallel.backward"):
    record = registry.get(name)
    shape = {"ranks": 4, "T": 4, "D": 3, "E": 6, "F": 3, "k": 2, "capacity": 2}
    case = record.sample(np.random.default_rng(0), experts="gated silu", convention="gshard", **shape)
    threads, processes = Traffic(), Traffic()
    expected = case.replace(traffic=threads).call(record.function)
    found = case.replace(traffic=processes, launch=mpi.run_ranks).call(record.function)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found)), name
    assert threads.counts == processes.counts, name
if mpi.world().rank == 0:
    sys.stdout.write("equal")
"""


@needs_mpi
def test_processes_equal_threads_bit_for_bit() -> None:
    assert MPIEXEC is not None
    done = subprocess.run(
        [MPIEXEC, "-n", "4", sys.executable, "-W", "error", "-c", EQUAL],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal"
