"""Oracles of pipelines: PyTorch's own schedules, greedy ranks that tick, losses by autograd."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.torch_decoder import leaves, loss_sum, torch_library


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


def named_parameters(parameters: Any, config: Any) -> dict[str, Any]:
    """Return the parts of a flat vector by name, in the order in which a decoder uses them."""
    M, D = config.width, config.head_width or config.width // config.num_heads
    q, kv = config.num_heads * D, (config.num_kv_heads or config.num_heads) * D
    gains = ["gamma", "beta"] if config.norm == "layer_norm" else ["gamma"]
    layer: list[tuple[str, tuple[int, ...]]] = [("w_q", (M, q)), ("w_k", (M, kv)), ("w_v", (M, kv))]
    layer += [("w_o", (q, M))]
    if config.biases:
        layer += [("b_q", (q,)), ("b_k", (kv,)), ("b_v", (kv,)), ("b_o", (M,))]
    F, E = config.hidden, getattr(config, "experts", 0)
    if E:
        layer += [("w_router", (M, E)), ("experts_in", (E, M, F))]
        layer += [("experts_gate", (E, M, F))] if config.gated else []
        layer += [("experts_out", (E, F, M))]
    elif config.gated:
        layer += [("w_gate", (M, F)), ("w_up", (M, F)), ("w_down", (F, M))]
    else:
        layer += [("w_1", (M, F)), ("w_2", (F, M))]
        layer += [("b_1", (F,)), ("b_2", (M,))] if config.biases else []
    layer += [(f"{gain}_{n}", (M,)) for n in (1, 2) for gain in gains]
    names: list[tuple[str, tuple[int, ...]]] = [("embedding", (config.vocabulary, M))]
    if config.positions == "learned":
        names.append(("positions", (config.max_length, M)))
    names += [(f"layers.{i}.{name}", shape) for i in range(config.layers) for name, shape in layer]
    if config.order == "pre":
        names += [(gain, (M,)) for gain in gains]
    if not config.tied:
        names.append(("head", (config.vocabulary, M)))
    found, at = {}, 0
    for name, shape in names:
        size = int(np.prod(shape))
        found[name] = parameters[at : at + size].reshape(shape)
        at += size
    if at != len(parameters):
        raise ValueError(f"{at} parameters named, {len(parameters)} given")
    return found


@oracle("parallel.pipeline")
def autograd_of_one_device(
    parameters: Any, tokens: Any, mask: Any, /, *, config: Any, ranks: int, schedule: str, **options: Any
) -> Any:
    """Autograd on all micro-batches at once; and what greedy ranks hold."""
    torch = torch_library()
    if schedule == "interleaved" or not mask.size:
        raise NotImplementedError("greedy ranks have one stage each; torch has no empty batches")
    weights = leaves(torch, named_parameters(parameters, config))
    words, counts = tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1])
    loss = loss_sum(torch, weights, words, counts, config) / max(int(mask.sum()), 1)
    loss.backward()
    gradients = [w.grad.numpy().ravel() if w.grad is not None else w.detach().numpy().ravel() * 0
                 for w in weights.values()]  # fmt: skip
    _, _, most = ticking(schedule, ranks, len(tokens), 1, 2)
    return {
        "dparameters": np.concatenate(gradients),
        "loss": loss.detach().numpy(),
        "in_flight": np.array(most),
    }


@oracle("parallel.mesh")
def adamw_of_torch(
    parameters: Any, tokens: Any, mask: Any, /, *, config: Any, optimizer: Any, max_norm: Any = None, **_: Any
) -> Any:
    """Autograd and PyTorch's AdamW on one device, all sequences of a step in one batch."""
    torch = torch_library()
    if not mask.size:
        raise NotImplementedError("torch has no empty batches")
    weights = leaves(torch, named_parameters(parameters, config))
    adamw = torch.optim.AdamW(
        list(weights.values()),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    losses = []
    for words, counts in zip(tokens, mask, strict=True):
        words, counts = (array.reshape(-1, array.shape[-1]) for array in (words, counts))
        loss = loss_sum(torch, weights, words, counts, config) / max(int(counts.sum()), 1)
        adamw.zero_grad()
        loss.backward()
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if max_norm is not None:
            norm = torch.sqrt(sum((weight.grad**2).sum() for weight in weights.values()))
            for weight in weights.values():
                weight.grad *= min(1.0, float(max_norm / norm)) if norm > 0 else 1.0
        adamw.step()
        losses.append(float(loss.detach()))
    trained = np.concatenate([weight.detach().numpy().ravel() for weight in weights.values()])
    return {"parameters": trained, "losses": np.array(losses)}


@oracle("parallel.pipeline.pipedream")
def old_weights_by_autograd(
    parameters: Any, tokens: Any, mask: Any, /, *, config: Any, ranks: int, lr: float
) -> Any:
    """The recurrence of the paper: each rank's weights of their own age, one micro-batch after the other."""
    torch = torch_library()
    history = [named_parameters(parameters, config)]
    layers = [part.tolist() for part in np.array_split(np.arange(config.layers), ranks)]

    def rank_of(name: str) -> int:
        if name.startswith("layers."):
            return next(r for r, own in enumerate(layers) if int(name.split(".")[1]) in own)
        return 0 if name == "embedding" else ranks - 1

    versions = np.zeros((ranks, len(tokens)), int)
    for t, (words, counts) in enumerate(zip(tokens, mask, strict=True)):
        for rank in range(ranks):
            versions[rank, t] = max(0, t - (ranks - 1 - rank))
        old = {name: history[versions[rank_of(name), t]][name] for name in history[0]}
        weights = leaves(torch, old)
        loss = loss_sum(torch, weights, words, counts, config) / max(int(counts.sum()), 1)
        loss.backward()
        moved = {name: array - lr * weights[name].grad.numpy() for name, array in history[-1].items()}
        history.append(moved)
    return {"parameters": np.concatenate([a.ravel() for a in history[-1].values()]), "versions": versions}
