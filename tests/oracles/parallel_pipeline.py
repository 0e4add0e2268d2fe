"""Oracles of pipelines: PyTorch's own schedules, greedy ranks that tick, losses by autograd."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


@oracle("parallel.pipeline.schedule")
def interleaved_of_torch(*, schedule: str, ranks: int, micro_batches: int, chunks: int) -> Any:
    """The order in which torch.distributed.pipelining interleaves.

    Its order of plain 1F1B is no judge: in PyTorch 2.13 the last rank's skips micro-batch 0.
    """
    if schedule != "interleaved":
        raise NotImplementedError("several stages a rank")
    module = library("torch.distributed.pipelining.schedules")
    made = object.__new__(module.ScheduleInterleaved1F1B)  # only its arithmetic: stages need processes
    made._n_microbatches, made.pp_group_size, made.n_local_stages = micro_batches, ranks, chunks
    made.number_of_rounds = max(1, micro_batches // ranks)
    made.microbatches_per_round = micro_batches // made.number_of_rounds
    kinds = {"FORWARD": 0, "FULL_BACKWARD": 1}
    rows = [
        [
            (kinds[action.computation_type.name], action.microbatch_index, action.stage_index)
            for action in made._calculate_single_rank_operations(rank)
            if action is not None and action.computation_type.name in kinds
        ]
        for rank in range(ranks)
    ]
    return np.array(rows)


def ticking(
    schedule: str, ranks: int, micro_batches: int, forward: int, backward: int
) -> tuple[list[list[tuple[int, int, int]]], int, list[int]]:
    """Ranks that choose greedily, tick by tick: steps, when the last one ends, and the most each held.

    GPipe's ranks go back when nothing is left to go forward, the last micro-batch first.  1F1B's go back
    whenever they can, and forward only while they hold fewer than the stages from theirs to the last.
    """
    forward_done: dict[tuple[int, int], int] = {}
    backward_done: dict[tuple[int, int], int] = {}
    steps: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    free, gone, back, most = [0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks
    now = 0
    while any(count < micro_batches for count in back):
        for rank in range(ranks):
            if free[rank] > now:
                continue
            ordered = schedule == "1f1b"
            micro = back[rank] if ordered else micro_batches - 1 - back[rank]
            gone_there = forward_done.get((rank, micro), now + 1) <= now
            come_back = rank == ranks - 1 or backward_done.get((rank + 1, micro), now + 1) <= now
            full = gone[rank] - back[rank] >= ranks - rank if ordered else False
            mine = gone[rank]
            here = rank == 0 or forward_done.get((rank - 1, mine), now + 1) <= now
            if gone_there and come_back and back[rank] < micro_batches and (ordered or mine == micro_batches):
                free[rank] = backward_done[rank, micro] = now + backward
                steps[rank].append((1, micro, rank))
                back[rank] += 1
            elif mine < micro_batches and here and not full:
                free[rank] = forward_done[rank, mine] = now + forward
                steps[rank].append((0, mine, rank))
                gone[rank] += 1
                most[rank] = max(most[rank], gone[rank] - back[rank])
        now += 1
    return steps, max(backward_done.values()), most


@oracle("parallel.pipeline.schedule")
def greedy_ranks(*, schedule: str, ranks: int, micro_batches: int, chunks: int) -> Any:
    if schedule == "interleaved":
        raise NotImplementedError("one stage a rank")
    steps, _, _ = ticking(schedule, ranks, micro_batches, 1, 1)
    return np.array(steps)


@oracle("cost.pipeline")
def ticks(
    *, schedule: str, ranks: int, micro_batches: int, chunks: int, forward_time: int, backward_time: int
) -> Any:
    if schedule == "interleaved":  # stages as long as ranks, each a v-th of the time
        share = Fraction(forward_time + backward_time, chunks)
        return {"s": np.asarray((micro_batches * chunks + ranks - 1) * share, dtype=object)}
    _, end, _ = ticking(schedule, ranks, micro_batches, forward_time, backward_time)
    return {"s": np.asarray(end, dtype=object)}


@oracle("cost.pipeline.in_flight")
def held_while_ticking(*, schedule: str, ranks: int, micro_batches: int, chunks: int, rank: int) -> Any:
    if schedule == "interleaved":
        held = most = 0
        for kind, _, _ in interleaved_of_torch(
            schedule=schedule, ranks=ranks, micro_batches=micro_batches, chunks=chunks
        )[rank]:
            held += -1 if kind else 1
            most = max(most, held)
        return {"1": np.asarray(most, dtype=object)}
    _, _, most_of = ticking(schedule, ranks, micro_batches, 1, 2)
    return {"1": np.asarray(most_of[rank], dtype=object)}
