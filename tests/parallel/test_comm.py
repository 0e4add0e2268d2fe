"""Ranks as threads: order, copies, counts, and how a run ends that cannot go on."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from refimpl.errors import OptionError, ShapeError
from refimpl.parallel import DeadlockError, Traffic, run_ranks
from refimpl.parallel.array_collectives import all_reduce, all_to_all, broadcast
from refimpl.parallel.collectives import pairwise_all_to_all, ring_all_reduce, tree_reduce


def test_messages_keep_their_order_and_tags() -> None:
    def program(comm: Any) -> Any:
        if comm.rank == 0:
            for value, tag in ((1, 0), (2, 5), (3, 0)):
                comm.send(1, np.array(value), tag)
            return None
        return [int(comm.recv(0, tag)) for tag in (5, 0, 0)]

    assert run_ranks(2, program)[1] == [2, 1, 3]


def test_a_message_is_a_copy() -> None:
    def program(comm: Any) -> Any:
        if comm.rank == 0:
            data = np.ones(3)
            comm.send(1, data)
            data[:] = 7
            comm.send(1, data)
            return None
        return comm.recv(0).tolist()

    assert run_ranks(2, program)[1] == [1, 1, 1]


def test_messages_are_counted_by_rank_and_phase() -> None:
    def program(comm: Any) -> None:
        other = 1 - comm.rank
        with comm.phase("first"):
            comm.send(other, np.zeros(3, np.float16))
            with comm.phase("inner"):
                comm.send(other, np.zeros((2, 2)))
        comm.send(other, np.zeros(0))

    traffic = Traffic()
    run_ranks(2, program, traffic=traffic)
    assert [traffic.sent(1, phase) for phase in ("first", "inner", "")] == [(1, 6), (1, 32), (1, 0)]
    assert traffic.totals() == {
        "rank 0 messages": 3, "rank 0 bytes": 38, "rank 1 messages": 3, "rank 1 bytes": 38
    }  # fmt: skip


def test_results_come_in_order_of_rank() -> None:
    def program(comm: Any) -> int:
        time.sleep(0.02 * (3 - comm.rank))
        return int(comm.rank)

    assert run_ranks(3, program) == [0, 1, 2]


def test_error_state_holds_inside_ranks() -> None:
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        run_ranks(2, lambda comm: np.ones(1) / np.zeros(1))


def test_deadlock_is_found_at_once_and_named() -> None:
    start = time.monotonic()
    with pytest.raises(DeadlockError, match=r"rank 0 waits for rank 1 \(tag 3\), rank 1 waits for rank 0"):
        run_ranks(2, lambda comm: comm.recv(1 - comm.rank, 3), timeout=60)
    assert time.monotonic() - start < 5


def test_waiting_for_a_rank_that_returned_is_a_deadlock() -> None:
    with pytest.raises(DeadlockError, match=r"rank 1 waits for rank 0 \(tag 0\), which has returned"):
        run_ranks(3, lambda comm: comm.recv(0) if comm.rank == 1 else None, timeout=60)


def test_a_message_under_another_tag_does_not_end_the_wait() -> None:
    def program(comm: Any) -> None:
        comm.send(1 - comm.rank, np.zeros(1), tag=1)
        comm.recv(1 - comm.rank, tag=2)

    with pytest.raises(DeadlockError, match="tag 2"):
        run_ranks(2, program, timeout=60)


@pytest.mark.parametrize("others_wait", [True, False])
def test_a_rank_that_stalls_ends_the_run_in_time(others_wait: bool) -> None:
    release = threading.Event()

    def program(comm: Any) -> None:
        if comm.rank == 2:
            release.wait(10)
        elif others_wait:
            comm.recv(2)

    start = time.monotonic()
    with pytest.raises(DeadlockError, match=r"no message for 0.2 s: rank 2 has not returned") as caught:
        run_ranks(3, program, timeout=0.2)
    release.set()
    assert time.monotonic() - start < 5
    assert ("rank 0 waits for rank 2" in str(caught.value)) == others_wait


def test_a_rank_that_works_and_talks_is_not_stalled() -> None:
    def program(comm: Any) -> float:
        total = 0.0
        for _ in range(6):
            if comm.rank == 0:
                time.sleep(0.1)
            total += float(ring_all_reduce(comm, np.ones(1))[0])
        return total

    assert run_ranks(2, program, timeout=0.4) == [12.0, 12.0]


def test_an_exception_stops_all_and_names_the_rank() -> None:
    before = threading.active_count()

    def program(comm: Any) -> None:
        if comm.rank == 1:
            raise KeyError("lost")
        comm.recv(1)

    with pytest.raises(KeyError, match="lost") as caught:
        run_ranks(4, program, timeout=60)
    assert caught.value.__notes__ == ["raised in rank 1 of 4"]
    assert threading.active_count() == before


@pytest.mark.parametrize("peer", [-1, 0, 2])
def test_peers_are_checked(peer: int) -> None:
    def program(comm: Any) -> None:
        if comm.rank == 0:
            comm.send(peer, np.zeros(1))

    with pytest.raises(OptionError, match="rank 0 got"):
        run_ranks(2, program)


def test_what_collectives_refuse() -> None:
    with pytest.raises(OptionError, match="at least 1 rank"):
        run_ranks(0, lambda comm: None)
    with pytest.raises(ShapeError, match="at least one rank"):
        all_reduce(np.zeros((0, 3)))
    with pytest.raises(ShapeError, match="one for each of 3"):
        run_ranks(3, lambda comm: pairwise_all_to_all(comm, [np.zeros(1)]))
    with pytest.raises(ShapeError, match="ranks, ranks"):
        all_to_all(np.zeros((2, 3, 1)))
    with pytest.raises(OptionError, match="root: expected a rank below 2"):
        broadcast(np.zeros((2, 1)), root=2)
    with pytest.raises(OptionError, match="algorithm"):
        all_reduce(np.zeros((2, 1)), algorithm="star")  # type: ignore[arg-type]


def test_blocks_may_be_ragged() -> None:
    found = run_ranks(3, lambda comm: pairwise_all_to_all(comm, [np.full(r, comm.rank) for r in range(3)]))
    assert [[len(block) for block in row] for row in found] == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert [int(block[0]) for block in found[2]] == [0, 1, 2]


def test_the_order_of_summation_is_the_documented_one() -> None:
    """2**53 swallows single ones but not their sum, so the result tells who was added when."""
    big = 2.0**53
    values = np.array([1.0, 1.0, big, 1.0])
    rows = np.repeat(values[:, None], 4, axis=1)
    expected = []
    for k in range(4):
        total = values[(k + 1) % 4]
        for hop in (2, 3, 4):
            total = total + values[(k + hop) % 4]
        expected.append(total)
    assert len(set(expected)) > 1
    assert all_reduce(rows)[0].tolist() == expected
    assert all_reduce(rows, algorithm="tree")[0, 0] == (1.0 + 1.0) + (big + 1.0)
    assert run_ranks(4, lambda comm: tree_reduce(comm, rows[comm.rank]))[1:] == [None] * 3


def test_float16_sums_round_at_every_hop() -> None:
    rows = np.array([[2048.0], [1.0], [1.0]], np.float16)
    assert all_reduce(rows, algorithm="tree")[0, 0] == np.float16(2048)  # each 1 is lost
    assert all_reduce(rows).dtype == np.float16


def test_bfloat16_travels() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rows = np.ones((3, 5), ml_dtypes.bfloat16)
    assert all_reduce(rows).astype(np.float32).tolist() == [[3.0] * 5] * 3
