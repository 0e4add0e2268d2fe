"""Oracles of hash layers: scalar loops over tokens, and scikit-learn's k-means."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.attention import philox_word
from tests.oracles.transformer import activated


@oracle("moe.hash.random")
def drawn_in_fractions(draws: Any, /, *, num_experts: int) -> Any:
    experts = [math.floor(Fraction(float(u)) * num_experts) for u in draws]
    return np.array([min(e, num_experts - 1) for e in experts], dtype=int)


@oracle("moe.hash.balanced")
def greedy_in_loops(counts: Any, /, *, num_experts: int) -> Any:
    table, masses, left = [0] * len(counts), [0] * num_experts, list(range(len(counts)))
    while left:
        token = max(left, key=lambda v: (counts[v], -v))
        expert = min(range(num_experts), key=lambda e: (masses[e], e))
        table[token] = expert
        masses[expert] += int(counts[token])
        left.remove(token)
    return np.array(table, dtype=int)


def _lloyd(points: Any, centers: Any, rounds: int) -> tuple[list[int], bool]:
    """Labels of Lloyd's algorithm in Python floats, and whether a cluster was ever empty."""
    centers, labels, empty = [list(map(float, c)) for c in centers], None, False
    for _ in range(rounds):
        distances = [
            [math.fsum((a - b) ** 2 for a, b in zip(p, c, strict=True)) for c in centers] for p in points
        ]
        new = [row.index(min(row)) for row in distances]
        if new == labels:
            break
        labels = new
        for e in range(len(centers)):
            mine = [p for p, label in zip(points, labels, strict=True) if label == e]
            empty |= not mine
            if mine:
                centers[e] = [math.fsum(column) / len(mine) for column in zip(*mine, strict=True)]
    return labels or [], empty


@oracle("moe.hash.clustered")
def lloyd_in_loops(embeddings: Any, initial: Any, /, *, max_iterations: int = 300) -> Any:
    return np.array(_lloyd(embeddings.tolist(), initial, max_iterations)[0], dtype=int)


@oracle("moe.hash.clustered")
def k_means_of_scikit_learn(embeddings: Any, initial: Any, /, *, max_iterations: int = 300) -> Any:
    cluster = library("sklearn.cluster")
    if len(embeddings) < len(initial) or _lloyd(embeddings.tolist(), initial, max_iterations)[1]:
        raise NotImplementedError("scikit-learn moves empty clusters")
    model = cluster.KMeans(len(initial), init=initial, n_init=1, tol=0, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fewer distinct points than clusters
        return model.fit(embeddings).labels_


@oracle("moe.hash.dispersed")
def dealt_in_loops(clusters: Any, /, *, num_experts: int) -> Any:
    table, turn = [0] * len(clusters), 0
    for cluster in sorted({int(c) for c in clusters}):
        for token, own in enumerate(clusters):
            if own == cluster:
                table[token] = turn
                turn = (turn + 1) % num_experts
    return np.array(table, dtype=int)


def _hashed(tokens: Any, expert: Any) -> Any:
    """Expert of every place, by a function of a sequence and a place in it."""
    out = np.zeros(tokens.shape, dtype=int)
    for *b, t in np.ndindex(tokens.shape):
        out[(*b, t)] = expert([int(token) for token in tokens[tuple(b)]], t)
    return out


@oracle("moe.hash.position")
def looked_up_by_position(tokens: Any, table: Any, /, *, start: int = 0) -> Any:
    return _hashed(tokens, lambda row, t: table[start + t])


@oracle("moe.hash.bigram")
def pairs_through_philox(tokens: Any, /, *, num_experts: int, first_token: int, seed: int = 0) -> Any:
    def expert(row: list[int], t: int) -> int:
        before = row[t - 1] if t else first_token
        return philox_word(before, row[t], 0, 0, seed) * num_experts // 2**32

    return _hashed(tokens, expert)


@oracle("moe.hash.previous")
def looked_up_one_before(tokens: Any, table: Any, /, *, first_token: int) -> Any:
    return _hashed(tokens, lambda row, t: table[row[t - 1] if t else first_token])


@oracle("moe.hash.future")
def looked_up_one_behind(tokens: Any, table: Any, /, *, last_token: int) -> Any:
    return _hashed(tokens, lambda row, t: table[row[t + 1] if t + 1 < len(row) else last_token])


@oracle("moe.hash.predicted_future")
def looked_up_by_the_best(logits: Any, table: Any, /) -> Any:
    out = np.zeros(logits.shape[:-1], dtype=int)
    for place in np.ndindex(out.shape):
        row = logits[place].tolist()
        out[place] = table[row.index(max(row))]
    return out


def _through(x: Any, w: Any) -> list[float]:
    """One token through one matrix."""
    return [math.fsum(float(a) * float(b) for a, b in zip(x, column, strict=True)) for column in w.T]


@oracle("moe.hash")
def token_by_token(
    x: Any, w_in: Any, w_out: Any, /, *, experts: Any, activation: str, w_gate: Any = None
) -> Any:
    y = np.zeros(x.shape)
    for t, e in enumerate(experts):
        hidden = _through(x[t], w_in[e])
        if w_gate is None:
            hidden = [activated(h, activation) for h in hidden]
        else:
            gate = _through(x[t], w_gate[e])
            hidden = [activated(g, activation) * h for g, h in zip(gate, hidden, strict=True)]
        y[t] = _through(hidden, w_out[e])
    return y


@oracle("moe.hash.multi")
def matrices_put_together(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, activation: str) -> Any:
    y = np.zeros(x.shape)
    for t in range(len(x)):
        whole_in = np.hstack([w_in[m, e] for m, e in enumerate(experts[:, t])])
        whole_out = np.hstack([w_out[m, e] for m, e in enumerate(experts[:, t])])
        y[t] = _through([activated(h, activation) for h in _through(x[t], whole_in)], whole_out)
    return y
