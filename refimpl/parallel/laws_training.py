"""Laws of data parallelism and ZeRO: what ranks together compute, hold and send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, wide_dtype
from refimpl.parallel.comm import Traffic
from refimpl.parallel.data import data_parallel
from refimpl.registry import Case, law
from refimpl.testing import Close

Training = Callable[..., Any]


def _one_rank(case: Case) -> Case:
    """Return the case with the sequences of all ranks on one."""
    p, tokens, mask = case.args
    B = tokens.shape[2] * tokens.shape[3]
    return case.replace(p, *(x.reshape(*x.shape[:2], 1, B, x.shape[-1]) for x in (tokens, mask)))


def _parameters(result: Any) -> Array:
    """Return the parameters of a result, of every rank where it has them."""
    found: Array = result[0]
    return found


def _same(found: Any, expected: Any, what: str) -> None:
    if not np.array_equal(found, expected):
        raise LawViolation(f"{what}: expected {expected}, got {found}")


@law("parallel.data")
def replicas_stay_identical(f: Training, case: Case, _close: Close) -> None:
    """All ranks hold the same bits after every step."""
    rows = _parameters(case.call(f))
    for rank, row in enumerate(rows):
        _same(row, rows[0], f"parameters of rank {rank} against rank 0")


@law("parallel.data")
def ranks_equal_one_device(f: Training, case: Case, close: Close) -> None:
    """Training on R ranks is training on the concatenated batch: tokens weigh the same, ranks do not."""
    many, one = case.call(f), _one_rank(case).call(f)
    close(many[1], one[1], "losses on one rank", factor=8.0, of="losses")
    a, b = (_parameters(result) for result in (many, one))
    close(a, np.broadcast_to(b, a.shape), "parameters on one rank", factor=8.0, of="parameters")


@law("parallel.data")
def dealing_does_not_matter(f: Training, case: Case, close: Close) -> None:
    """Sequences may change places among the ranks of a micro-batch."""
    p, tokens, mask = case.args
    ranks, B = tokens.shape[2:4]
    order = np.random.default_rng(0).permutation(ranks * B)
    dealt = (
        x.reshape(*x.shape[:2], ranks * B, x.shape[-1])[:, :, order].reshape(x.shape) for x in (tokens, mask)
    )
    a, b = case.call(f), case.replace(p, *dealt).call(f)
    close(_parameters(b), _parameters(a), "sequences dealt anew", factor=8.0, of="parameters")


@law("parallel.data", "parallel.zero")
def micro_batches_equal_one_batch(f: Training, case: Case, close: Close) -> None:
    """A step on micro-batches is a step on all their sequences at once: gradients add up and divide once."""
    p, tokens, mask = case.args
    steps, micro, ranks, B = tokens.shape[:4]
    if micro == 1:
        return
    together = (x.swapaxes(1, 2).reshape(steps, 1, ranks, micro * B, x.shape[-1]) for x in (tokens, mask))
    apart, whole = case.call(f), case.replace(p, *together).call(f)
    close(_parameters(apart), _parameters(whole), "one micro-batch", factor=8.0, of="parameters")
    close(apart[1], whole[1], "losses of one micro-batch", factor=8.0, of="losses")


@law("parallel.zero")
def stages_equal_data_parallelism(f: Training, case: Case, close: Close) -> None:
    """A stage moves states, not values: bit-equal to data parallelism unless sums are in another order."""
    plain = case.without("stage").call(data_parallel)
    found = case.call(f)
    in_order = case.args[1].shape[1] == 1 or case.kwargs["stage"] == 1
    if in_order and "max_norm" not in case.kwargs:
        _same(found[0], plain.parameters[0], "parameters of data parallelism")
    close(found[0], plain.parameters[0], "parameters of data parallelism", factor=8.0, of="parameters")
    close(found[1], plain.losses, "losses of data parallelism", factor=8.0, of="losses")


@law("parallel.zero")
def each_rank_holds_its_share(f: Training, case: Case, _close: Close) -> None:
    """A rank holds 1/N, rounded up unit by unit, of what its stage divides, and all of the rest."""
    p, tokens, _ = case.args
    units = [unit.size for unit in case.kwargs["network"]]
    ranks, stage = tokens.shape[2], case.kwargs["stage"]
    shard = sum(-(-size // ranks) for size in units)
    low = np.dtype(case.kwargs.get("model_dtype") or p.dtype).itemsize
    states = 3 * wide_dtype(p.dtype).itemsize * shard
    gradients = low * (shard if stage >= 2 else sum(units)) if len(tokens) else 0
    parameters = low * (shard if stage == 3 else sum(units))
    _same(case.call(f)[2], np.full(ranks, states + gradients + parameters), "bytes held by each rank")


def _sent(f: Training, case: Case, phases: tuple[str, ...]) -> list[int]:
    traffic = Traffic()
    case.replace(traffic=traffic).call(f)
    ranks = case.args[1].shape[2]
    return [sum(traffic.sent(rank, phase).bytes for phase in phases) for rank in range(ranks)]


@law("parallel.zero")
def one_and_two_send_twice_the_model_three_thrice(f: Training, case: Case, _close: Close) -> None:
    """A step of one micro-batch sends 2Ψ(N-1)/N in stages 1 and 2, and 3Ψ(N-1)/N in stage 3, padded."""
    p, tokens, mask = case.args
    one = case.replace(p, tokens[:1, :1], mask[:1, :1])
    ranks, stage = tokens.shape[2], case.kwargs["stage"]
    units = [unit.size for unit in case.kwargs["network"]]
    ring = (ranks - 1) * sum(-(-size // ranks) for size in units)
    low = np.dtype(case.kwargs.get("model_dtype") or p.dtype).itemsize
    phases = min(len(tokens), 1) * (3 if stage == 3 else 2)
    _same(_sent(f, one, ("gradients", "parameters")), [phases * ring * low] * ranks, "bytes sent")
