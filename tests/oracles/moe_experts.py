"""Oracles of fine-grained, shared and residual experts, of splitting and upcycling: loops over units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles.moe_variants import of_expert, one_expert, rows_through, shares


def chosen(x: Any, w_router: Any, k: int, convention: str) -> dict[int, float]:
    """The experts of one token and their gates."""
    logits = rows_through(x, w_router)
    best = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:k]
    if convention == "mixtral":
        return dict(zip(best, shares([logits[e] for e in best]), strict=True))
    p = shares(logits)
    total = math.fsum(p[e] for e in best) if convention == "gshard" else 1.0
    return {e: p[e] / total for e in best}


@oracle("moe.fine_grained")
def slices_of_units(
    x: Any, w_router: Any, w_in: Any, w_out: Any, /, *, k: int, segments: int, convention: str, **options: Any
) -> Any:
    """Every segment is a slice of its expert's hidden units (entry 12)."""
    y, width, gate = np.zeros(x.shape), w_in.shape[2] // segments, options.get("w_gate")
    for t, row in enumerate(x):
        for s, weight in chosen(row, w_router, k * segments, convention).items():
            n, units = s // segments, slice(s % segments * width, (s % segments + 1) * width)
            w_gate = None if gate is None else gate[n][:, units]
            part = one_expert(row, w_in[n][:, units], w_out[n][units], options["activation"], w_gate)
            y[t] += weight * part
    return y


@oracle("moe.shared_experts")
def shared_beside_routed(
    x: Any,
    w_router: Any,
    w_in: Any,
    w_out: Any,
    shared_in: Any,
    shared_out: Any,
    /,
    *,
    k: int,
    **options: Any,
) -> Any:
    y, activation, convention = np.zeros(x.shape), options["activation"], options["convention"]
    shared_gate, shared_router = options.get("shared_gate"), options.get("shared_router")
    for t, row in enumerate(x):
        for e, weight in chosen(row, w_router, k, convention).items():
            y[t] += weight * one_expert(row, *of_expert(e, w_in, w_out, activation, options.get("w_gate")))
        for s in range(len(shared_in)):
            weight = 1.0
            if shared_router is not None:
                weight = 1 / (1 + math.exp(-rows_through(row, shared_router)[s]))
            y[t] += weight * one_expert(row, *of_expert(s, shared_in, shared_out, activation, shared_gate))
    return y


def corrected(x: Any, w_1: Any, w_2: Any, w_router: Any, w_in: Any, w_out: Any, activation: str) -> Any:
    """One token through the dense layer, and through its best expert, weighted."""
    ((e, gate),) = chosen(x, w_router, 1, "switch").items()
    return one_expert(x, w_1, w_2, activation), gate * one_expert(x, w_in[e], w_out[e], activation)


@oracle("moe.residual")
def dense_plus_best(x: Any, *weights: Any, activation: str) -> Any:
    return np.array([sum(corrected(row, *weights, activation)) for row in x]).reshape(x.shape)


@oracle("moe.residual.deepspeed")
def weighted_by_coefficients(x: Any, *weights: Any, activation: str) -> Any:
    *layer, w_c = weights
    y = np.zeros(x.shape)
    for t, row in enumerate(x):
        dense, routed = corrected(row, *layer, activation)
        first, second = shares(rows_through(row, w_c))
        y[t] = first * routed + second * dense
    return y


@oracle("moe.residual.pyramid")
def layer_after_layer(x: Any, /, *, layers: Any, activation: str) -> Any:
    y = np.array(x)
    for layer in layers:
        y = y + np.array([sum(corrected(row, *layer, activation)) for row in y]).reshape(y.shape)
    return y


@oracle("moe.split_ffn")
def unit_by_unit(x: Any, w_1: Any, w_2: Any, /, *, num_experts: int, **options: Any) -> Any:
    """A sum over single hidden units (entry 12), each weighted by the gate of the expert that holds it."""
    F = w_1.shape[1]
    order, gates, gate = options.get("order", range(F)), options.get("gates"), options.get("w_gate")
    y = np.zeros(x.shape)
    for t, row in enumerate(x):
        for place, unit in enumerate(order):
            weight = 1.0 if gates is None else gates[t, place // (F // num_experts)]
            w_gate = None if gate is None else gate[:, [unit]]
            y[t] += weight * one_expert(row, w_1[:, [unit]], w_2[[unit]], options["activation"], w_gate)
    return y


@oracle("moe.upcycling")
def copied_in_loops(w_1: Any, w_2: Any, /, *, copies: int, segments: int, w_gate: Any = None) -> Any:
    width = w_1.shape[1] // segments
    parts: list[list[Any]] = [[], [], []]
    for _ in range(copies):
        for s in range(segments):
            units = range(s * width, (s + 1) * width)
            parts[0].append([[float(row[u]) for u in units] for row in w_1])
            parts[1].append([[segments * float(value) for value in w_2[u]] for u in units])
            if w_gate is not None:
                parts[2].append([[float(row[u]) for u in units] for row in w_gate])
    return tuple(np.array(part) for part in parts if part)
