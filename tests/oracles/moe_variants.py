"""Oracles of expert choice, BASE, domains, the attention router and soft merging: loops, SciPy."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.optimize

from refimpl.registry import oracle
from tests.oracles.transformer import activated


def rows_through(x: Any, w: Any) -> list[float]:
    """One token through one matrix."""
    return [math.fsum(float(a) * float(b) for a, b in zip(x, column, strict=True)) for column in w.T]


def one_expert(x: Any, w_in: Any, w_out: Any, activation: str, w_gate: Any = None) -> Any:
    """One token through one expert."""
    hidden = rows_through(x, w_in)
    if w_gate is None:
        hidden = [activated(h, activation) for h in hidden]
    else:
        gate = rows_through(x, w_gate)
        hidden = [activated(g, activation) * h for g, h in zip(gate, hidden, strict=True)]
    return np.array(rows_through(hidden, w_out))


def shares(logits: list[float]) -> list[float]:
    """The softmax of a few numbers."""
    powers = [math.exp(z - max(logits)) for z in logits]
    return [p / math.fsum(powers) for p in powers]


def of_expert(e: int, w_in: Any, w_out: Any, activation: str, w_gate: Any = None) -> tuple[Any, ...]:
    return w_in[e], w_out[e], activation, None if w_gate is None else w_gate[e]


def _chosen(column: Any, capacity: int) -> set[int]:
    """The tokens of the largest scores of an expert, by partition; no two scores are equal."""
    if not capacity:
        return set()
    return {int(t) for t in np.argpartition(-np.asarray(column), capacity - 1)[:capacity]}


@oracle("moe.expert_choice")
def experts_choose(x: Any, w_router: Any, w_in: Any, w_out: Any, /, *, capacity: int, **options: Any) -> Any:
    if w_in.shape[0] == 1 and 0 < capacity < len(x):
        raise NotImplementedError("one expert has equal scores")
    table = np.array([shares(rows_through(row, w_router)) for row in x]).reshape(len(x), len(w_in))
    y = np.zeros(x.shape)
    for e in range(len(w_in)):
        for t in _chosen(table[:, e], capacity):
            y[t] += table[t, e] * one_expert(x[t], *of_expert(e, w_in, w_out, **options))
    return y


@oracle("moe.expert_choice.mesh_tf")
def experts_select(x: Any, w_router: Any, w_in: Any, w_out: Any, /, *, capacity: int, **options: Any) -> Any:
    y, count = np.zeros(x.shape), [0] * len(x)
    for e in range(len(w_in)):
        column = shares([rows_through(row, w_router)[e] for row in x]) if len(x) else []
        for t in _chosen(column, capacity):
            y[t] += column[t] * one_expert(x[t], *of_expert(e, w_in, w_out, **options))
            count[t] += 1
    return y / np.maximum(count, 1)[:, None]


@oracle("moe.base_assignment")
def places_of_scipy(scores: Any, /) -> Any:
    """SciPy's assignment, every expert written once for each of its places."""
    T, E = scores.shape
    places = np.repeat(np.arange(E), T // E)
    rows, columns = scipy.optimize.linear_sum_assignment(scores[:, places], maximize=True)
    expert = np.zeros(T, dtype=int)
    expert[rows] = places[columns]
    return expert


def _best_of_all(scores: Any) -> Any:
    T, E = scores.shape
    every = set(itertools.permutations(np.repeat(np.arange(E), T // E).tolist()))
    return max(every, key=lambda expert: math.fsum(scores[t, e] for t, e in enumerate(expert)))


@oracle("moe.base_assignment")
def best_of_all_permutations(scores: Any, /) -> Any:
    if len(scores) > 6:
        raise NotImplementedError("too many permutations")
    return np.array(_best_of_all(scores), dtype=int)


@oracle("moe.base_layer")
def assigned_by_scipy(
    x: Any, w_router: Any, w_in: Any, w_out: Any, /, *, assignment: str, **options: Any
) -> Any:
    scores = np.array([rows_through(row, w_router) for row in x]).reshape(len(x), len(w_in))
    expert = places_of_scipy(scores) if assignment == "balanced" else np.argmax(scores, axis=1)
    y = np.array(x)
    for t, e in enumerate(expert):
        gate = 1 / (1 + math.exp(-scores[t, e]))
        y[t] += gate * one_expert(x[t], *of_expert(e, w_in, w_out, **options))
    return y


@oracle("moe.domain_routing")
def two_levels_of_tables(tokens: Any, domains: Any, draws: Any, /, *, group_sizes: Any) -> Any:
    out = []
    for token, domain in zip(tokens, domains, strict=True):
        within = math.floor(Fraction(float(draws[domain, token])) * group_sizes[domain])
        out.append(sum(group_sizes[:domain]) + within)
    return np.array(out, dtype=int)


@oracle("moe.attention_router")
def experts_attend(x: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    """The scalar attention of the other oracles, one head of width 1 whose positions are the experts."""
    from tests.oracles.attention import scalar_attention

    logits = np.zeros((len(x), w_q.shape[1]))
    for t, row in enumerate(x):
        q, k, v = (np.array(rows_through(row, w))[None, :, None, None] for w in (w_q, w_k, w_v))
        logits[t] = scalar_attention(q, k, v, scale=1.0)[0, :, 0, 0]
    return logits


@oracle("moe.attention_router.layer")
def attended_top_k(
    x: Any, w_q: Any, w_k: Any, w_v: Any, w_in: Any, w_out: Any, /, *, k: int, convention: str, **options: Any
) -> Any:
    logits, y = experts_attend(x, w_q, w_k, w_v), np.zeros(x.shape)
    for t, row in enumerate(logits):
        best = sorted(range(len(row)), key=lambda e: -row[e])[:k]
        gates = shares(row.tolist())
        total = math.fsum(gates[e] for e in best) if convention == "gshard" else 1.0
        for e in best:
            y[t] += gates[e] / total * one_expert(x[t], *of_expert(e, w_in, w_out, **options))
    return y


@oracle("moe.soft_merging")
def averaged_parameters(
    x: Any, w_router: Any, w_in: Any, w_out: Any, /, *, activation: str, **options: Any
) -> Any:
    y = np.zeros(x.shape)
    for b, sequence in enumerate(x):
        mean = [math.fsum(column) / len(sequence) for column in sequence.T]
        p = shares(rows_through(mean, w_router))
        merged = [sum(share * w for share, w in zip(p, stack, strict=True)) for stack in (w_in, w_out)]
        gate = options.get("w_gate")
        w_gate = None if gate is None else sum(share * w for share, w in zip(p, gate, strict=True))
        for t, token in enumerate(sequence):
            y[b, t] = one_expert(token, *merged, activation, w_gate)
    return y
