"""Oracles of experts over ranks: one device, a token at a time, and PyTorch's gradients of that."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.moe import best, expert, logits_of, softmax


def _served(rows: Any, w_router: Any, k: int, capacity: int) -> list[list[int]]:
    """The experts that serve each token of one rank, best first; -1 for a choice that was dropped."""
    wishes = [best(logits_of(row, w_router), k) for row in rows]
    served = [[-1] * k for _ in wishes]
    room = [capacity] * w_router.shape[1]
    for choice in range(k):
        for t, wish in enumerate(wishes):
            if room[wish[choice]]:
                room[wish[choice]] -= 1
                served[t][choice] = wish[choice]
    return served


@oracle("moe.expert_parallel")
def one_device(
    x: Any, w_router: Any, w_in: Any, w_out: Any, *, k: int, capacity: int, convention: str, **options: Any
) -> Any:
    """Every rank's tokens in turn, all experts at hand."""
    y = np.zeros(x.shape)
    for r, rows in enumerate(x):
        for t, chosen in enumerate(_served(rows, w_router, k, capacity)):
            z = logits_of(rows[t], w_router)
            p = softmax(z)
            total = sum(p[e] for e in best(z, k)) if convention == "gshard" else 1.0
            for e in chosen:
                if e >= 0:
                    y[r, t] += p[e] / total * expert(rows[t], e, w_in, w_out, **options)
    return y


@oracle("moe.expert_parallel.backward")
def torch_gradients(
    x: Any,
    w_router: Any,
    w_in: Any,
    w_out: Any,
    dy: Any,
    *,
    k: int,
    capacity: int,
    convention: str,
    activation: str,
    w_gate: Any = None,
) -> Any:
    """PyTorch's gradients of the layer on one device, written token by token."""
    torch = library("torch")
    functional = torch.nn.functional
    act = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu}[activation]
    arrays = [x, w_router, w_in, w_out] + ([] if w_gate is None else [w_gate])
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    tokens, router, w1, w2 = tensors[:4]
    loss = sum(tensor.sum() for tensor in tensors) * 0.0
    for r, rows in enumerate(x):
        for t, chosen in enumerate(_served(rows, w_router, k, capacity)):
            row = tokens[r, t]
            p = torch.softmax(row @ router, -1)
            wish = best(logits_of(rows[t], w_router), k)
            total = sum(p[e] for e in wish) if convention == "gshard" else 1.0
            for e in (e for e in chosen if e >= 0):
                hidden = act(row @ w1[e]) if w_gate is None else act(row @ tensors[4][e]) * (row @ w1[e])
                loss = loss + (p[e] / total * (hidden @ w2[e])) @ torch.from_numpy(dy[r, t])
    loss.backward()
    return tuple(tensor.grad.numpy() for tensor in tensors)
