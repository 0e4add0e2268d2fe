"""Oracles of gates and routed layers: loops over tokens in Python numbers, and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def activation_of(name: str) -> Callable[[float], float]:
    return {
        "relu": lambda z: max(z, 0.0),
        "gelu": lambda z: 0.5 * z * math.erfc(-z / math.sqrt(2)),
        "silu": lambda z: z / (1 + math.exp(-z)) if z > -700 else 0.0,
    }[name]


def expert(row: Any, e: int, w_in: Any, w_out: Any, *, activation: str = "relu", w_gate: Any = None) -> Any:
    """One expert on one token, a number at a time."""
    act, D, F = activation_of(activation), len(row), w_in.shape[2]
    into = [math.fsum(float(row[d]) * float(w_in[e, d, f]) for d in range(D)) for f in range(F)]
    if w_gate is None:
        hidden = [act(z) for z in into]
    else:
        gate = [math.fsum(float(row[d]) * float(w_gate[e, d, f]) for d in range(D)) for f in range(F)]
        hidden = [act(g) * z for g, z in zip(gate, into, strict=True)]
    return np.array([math.fsum(hidden[f] * float(w_out[e, f, d]) for f in range(F)) for d in range(D)])


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    powers = [math.exp(value - top) for value in z]
    return [power / math.fsum(powers) for power in powers]


def logits_of(row: Any, w_router: Any) -> list[float]:
    return [
        math.fsum(float(row[d]) * float(w_router[d, e]) for d in range(len(row)))
        for e in range(w_router.shape[1])
    ]


def best(z: list[float], k: int) -> list[int]:
    """The k best experts, one after the other, ties to the lowest."""
    chosen: list[int] = []
    for _ in range(k):
        rest = [e for e in range(len(z)) if e not in chosen]
        chosen.append(max(rest, key=lambda e: (z[e], -e)))
    return chosen


@oracle("moe.dense_mixture")
def token_loop(
    x: Any, w_router: Any, w_in: Any, w_out: Any, *, temperature: float = 1.0, **options: Any
) -> Any:
    """All experts on each token, weighted."""
    y = np.zeros(x.shape)
    for t, row in enumerate(x):
        gates = softmax([z / temperature for z in logits_of(row, w_router)])
        for e, gate in enumerate(gates):
            y[t] += gate * expert(row, e, w_in, w_out, **options)
    return y


@oracle("moe.top_k")
def sorted_gates(logits: Any, *, k: int, convention: str) -> Any:
    """The gates of each token from a sorted list."""
    gates = np.zeros(logits.shape)
    for t, row in enumerate(logits.tolist()):
        chosen = best(row, k)
        if convention == "mixtral":
            kept = softmax([row[e] for e in chosen])
        else:
            p = softmax(row)
            total = math.fsum(p[e] for e in chosen) if convention == "gshard" else 1.0
            kept = [p[e] / total for e in chosen]
        gates[t, chosen] = kept
    return gates


@oracle("moe.top_k")
def torch_topk(logits: Any, *, k: int, convention: str) -> Any:
    """PyTorch's topk, with the softmax before it or after it."""
    torch = library("torch")
    z = torch.from_numpy(logits)
    if convention == "mixtral":
        values, indices = z.topk(k)
        values = values.softmax(-1)
    else:
        indices = z.topk(k)[1]  # of the logits, because gates that are 0 tie and come in any order
        values = z.softmax(-1).gather(1, indices)
        if convention == "gshard":
            values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(z).scatter(1, indices, values).numpy()


def _shazeer(z: list[float], k: int) -> list[float]:
    """softmax(KeepTopK(z, k)), with -inf for what is not kept."""
    threshold = sorted(z, reverse=True)[k - 1]
    powers = [math.exp(value - max(z)) if value >= threshold else 0.0 for value in z]
    return [power / math.fsum(powers) for power in powers]


@oracle("moe.noisy_top_k")
def shazeer_gates(x: Any, w_router: Any, w_noise: Any, *, k: int, noise: Any = None) -> Any:
    """Equations 3 to 5 for each token."""
    gates = np.zeros((len(x), w_router.shape[1]))
    for t, row in enumerate(x):
        clean, raw = logits_of(row, w_router), logits_of(row, w_noise)
        spread = [max(z, 0.0) + math.log1p(math.exp(-abs(z))) for z in raw]
        draws = [0.0] * len(clean) if noise is None else noise[t].tolist()
        noisy = [h + u * s for h, u, s in zip(clean, draws, spread, strict=True)]
        gates[t] = _shazeer(noisy, k)
    return gates


@oracle("moe.noisy_top_k.vmoe")
def vmoe_gates(x: Any, w_router: Any, *, k: int, noise_std: float = 1.0, noise: Any = None) -> Any:
    """Softmax of logits with fixed noise, all but the k largest set to 0."""
    E = w_router.shape[1]
    gates = np.zeros((len(x), E))
    for t, row in enumerate(x):
        draws = [0.0] * E if noise is None else noise[t].tolist()
        noisy = [z + noise_std / E * u for z, u in zip(logits_of(row, w_router), draws, strict=True)]
        p = softmax(noisy)
        for e in best(noisy, k):
            gates[t, e] = p[e]
    return gates
