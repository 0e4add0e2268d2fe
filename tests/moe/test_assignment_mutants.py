"""Expert choice, BASE, domains, attention router and soft merging, wrong in one way: laws must catch each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.attention import softmax
from refimpl.moe.attention_router import attention_routed, attention_router
from refimpl.moe.base_assignment import base_assignment, base_layer
from refimpl.moe.domain_routing import domain_routing
from refimpl.moe.expert_choice import chosen_by_experts, expert_choice, expert_selection
from refimpl.moe.mixture import mixture
from refimpl.moe.soft_merging import soft_merging
from tests.moe.mutation import Mutants

registry.load()

MUTANTS = Mutants()


@MUTANTS.of("moe.expert_choice")
def shares_over_tokens(x: Any, w_router: Any, *experts: Any, capacity: int, **options: Any) -> Any:
    gates = softmax((x @ w_router).T).T
    return mixture(x, gates, *experts, selected=chosen_by_experts(gates, capacity=capacity), **options)


@MUTANTS.of("moe.expert_choice")
def chosen_by_logit(x: Any, w_router: Any, *experts: Any, capacity: int, **options: Any) -> Any:
    chosen = chosen_by_experts(x @ w_router, capacity=capacity)
    return mixture(x, softmax(x @ w_router), *experts, selected=chosen, **options)


@MUTANTS.of("moe.expert_choice")
def gates_renormalized(x: Any, w_router: Any, *experts: Any, capacity: int, **options: Any) -> Any:
    gates = softmax(x @ w_router)
    chosen = chosen_by_experts(gates, capacity=capacity)
    kept = np.where(chosen, gates, 0)
    total = kept.sum(axis=1, keepdims=True)
    return mixture(x, kept / np.where(total > 0, total, 1), *experts, selected=chosen, **options)


@MUTANTS.of("moe.expert_choice")
def tokens_choose(x: Any, w_router: Any, *experts: Any, capacity: int, **options: Any) -> Any:
    gates = softmax(x @ w_router)
    k = min(max(round(capacity * gates.shape[1] / max(len(x), 1)), 0), gates.shape[1])
    chosen = np.argsort(np.argsort(-gates, axis=1, kind="stable"), axis=1) < k
    return mixture(x, gates, *experts, selected=chosen, **options)


@MUTANTS.of("moe.expert_choice")
def one_place_less(*arrays: Any, capacity: int, **options: Any) -> Any:
    return expert_choice(*arrays, capacity=max(capacity - 1, 0), **options)


@MUTANTS.of("moe.expert_choice")
def later_of_equal_tokens(x: Any, *rest: Any, **options: Any) -> Any:
    return expert_choice(x[::-1], *rest, **options)[::-1]


@MUTANTS.of("moe.expert_choice.mesh_tf")
def one_place_more(x: Any, *rest: Any, capacity: int, **options: Any) -> Any:
    return expert_selection(x, *rest, capacity=min(capacity + 1, len(x)), **options)


@MUTANTS.of("moe.expert_choice.mesh_tf")
def the_last_tokens_first(x: Any, *rest: Any, **options: Any) -> Any:
    return expert_selection(x[::-1], *rest, **options)[::-1]


@MUTANTS.of("moe.expert_choice.mesh_tf")
def sum_for_the_mean(x: Any, w_router: Any, *experts: Any, capacity: int, **options: Any) -> Any:
    gates = softmax((x @ w_router).T).T
    return mixture(x, gates, *experts, selected=chosen_by_experts(gates, capacity=capacity), **options)


@MUTANTS.of("moe.expert_choice.mesh_tf")
def mean_over_all_experts(x: Any, w_router: Any, *experts: Any, capacity: int, **options: Any) -> Any:
    gates = softmax((x @ w_router).T).T
    chosen = chosen_by_experts(gates, capacity=capacity)
    return mixture(x, gates / gates.shape[1], *experts, selected=chosen, **options)


@MUTANTS.of("moe.expert_choice.mesh_tf")
def the_papers_layer(x: Any, w_router: Any, *experts: Any, **options: Any) -> Any:
    return expert_choice(x, w_router, *experts, **options)


@MUTANTS.of("moe.base_assignment")
def best_for_each(scores: Any, /) -> Any:
    return np.argmax(scores, axis=1)


@MUTANTS.of("moe.base_assignment")
def first_come_first_served(scores: Any, /) -> Any:
    T, E = scores.shape
    room, expert = np.full(E, T // E), np.zeros(T, np.int64)
    for t, row in enumerate(scores):
        expert[t] = np.argmax(np.where(room > 0, row, -np.inf))
        room[expert[t]] -= 1
    return expert


@MUTANTS.of("moe.base_assignment")
def largest_scores_first(scores: Any, /) -> Any:
    T, E = scores.shape
    room, expert = np.full(E, T // E), np.full(T, -1)
    for place in np.argsort(-scores, axis=None):
        t, e = divmod(int(place), E)
        if expert[t] < 0 and room[e]:
            expert[t] = e
            room[e] -= 1
    return expert


@MUTANTS.of("moe.base_assignment")
def exchanges_of_pairs_alone(scores: Any, /) -> Any:
    T, E = scores.shape
    expert, gained = np.arange(T) % E, True
    while gained:
        gained = False
        for i in range(T):
            for j in range(i):
                a, b = expert[i], expert[j]
                if scores[i, b] + scores[j, a] > scores[i, a] + scores[j, b] + 1e-12:
                    expert[i], expert[j], gained = b, a, True
    return expert


@MUTANTS.of("moe.base_assignment")
def costs_for_scores(scores: Any, /) -> Any:
    return base_assignment(-scores)


@MUTANTS.of("moe.base_layer")
def residual_forgotten(x: Any, *rest: Any, **options: Any) -> Any:
    return base_layer(x, *rest, **options) - x


@MUTANTS.of("moe.base_layer")
def gate_of_the_softmax(x: Any, w_router: Any, *experts: Any, assignment: str, **options: Any) -> Any:
    scores = x @ w_router
    expert = base_assignment(scores) if assignment == "balanced" else np.argmax(scores, axis=1)
    chosen = expert[:, None] == np.arange(scores.shape[1])
    return x + mixture(x, softmax(scores), *experts, selected=chosen, **options)


@MUTANTS.of("moe.base_layer")
def balanced_at_test_time(x: Any, *rest: Any, assignment: str, **options: Any) -> Any:
    return base_layer(x, *rest, assignment="balanced", **options)


@MUTANTS.of("moe.base_layer")
def greedy_in_training(x: Any, *rest: Any, assignment: str, **options: Any) -> Any:
    return base_layer(x, *rest, assignment="greedy", **options)


@MUTANTS.of("moe.domain_routing")
def groups_of_the_first_size(tokens: Any, domains: Any, draws: Any, /, *, group_sizes: Any) -> Any:
    return domain_routing(tokens, domains, draws, group_sizes=[group_sizes[0]] * len(group_sizes))


@MUTANTS.of("moe.domain_routing")
def one_table_for_all_groups(tokens: Any, domains: Any, draws: Any, /, *, group_sizes: Any) -> Any:
    alike = np.repeat(draws[:1], len(draws), axis=0)
    return domain_routing(tokens, domains, alike, group_sizes=group_sizes)


@MUTANTS.of("moe.domain_routing")
def token_for_domain(tokens: Any, domains: Any, draws: Any, /, *, group_sizes: Any) -> Any:
    return domain_routing(tokens, tokens % len(draws), draws, group_sizes=group_sizes)


@MUTANTS.of("moe.attention_router")
def scaled_scores(x: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    return attention_router(x, w_q / np.sqrt(w_q.shape[1]), w_k, w_v)


@MUTANTS.of("moe.attention_router")
def attention_over_tokens(x: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    return softmax(q @ k.T) @ v


@MUTANTS.of("moe.attention_router")
def queries_and_keys_exchanged(x: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    return attention_router(x, w_k, w_q, w_v)


@MUTANTS.of("moe.attention_router")
def a_plain_router(x: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    return x @ w_v


@MUTANTS.of("moe.attention_router.layer")
def conventions_exchanged(*arrays: Any, convention: str, **options: Any) -> Any:
    other = {"switch": "gshard", "gshard": "switch"}[convention]
    return attention_routed(*arrays, convention=other, **options)


@MUTANTS.of("moe.attention_router.layer")
def values_as_logits(x: Any, w_q: Any, w_k: Any, w_v: Any, *experts: Any, **options: Any) -> Any:
    return attention_routed(x, 0 * w_q + 1e-9, w_k, w_v, *experts, **options)


@MUTANTS.of("moe.attention_router.layer")
def one_expert_more(*arrays: Any, k: int, **options: Any) -> Any:
    return attention_routed(*arrays, k=min(k + 1, arrays[1].shape[1]), **options)


@MUTANTS.of("moe.soft_merging")
def outputs_mixed(x: Any, w_router: Any, *experts: Any, **options: Any) -> Any:
    y = np.zeros_like(x)
    for b, gates in enumerate(softmax(x.mean(axis=1) @ w_router)):
        y[b] = mixture(x[b], np.tile(gates, (x.shape[1], 1)), *experts, **options)
    return y


@MUTANTS.of("moe.soft_merging")
def one_average_for_the_batch(x: Any, w_router: Any, *experts: Any, **options: Any) -> Any:
    if not len(x):
        return x
    return soft_merging(x.reshape(1, -1, x.shape[2]), w_router, *experts, **options).reshape(x.shape)


@MUTANTS.of("moe.soft_merging")
def router_sees_the_first_token(x: Any, w_router: Any, *experts: Any, **options: Any) -> Any:
    rows = [soft_merging(x[:, :1] * 0 + x[:, :1], w_router, *experts, **options)]
    for t in range(1, x.shape[1]):
        pair = np.concatenate([x[:, :1], x[:, t : t + 1]], axis=1)
        rows.append(soft_merging(pair, w_router, *experts, **options)[:, 1:])
    return np.concatenate(rows, axis=1)


@MUTANTS.of("moe.soft_merging")
def input_matrices_of_the_best(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    rows = []
    for row in x:
        best = int(np.argmax(row.mean(axis=0) @ w_router))
        alike = np.repeat(w_in[best : best + 1], len(w_in), axis=0)
        rows.append(soft_merging(row[None], w_router, alike, w_out, **options)[0])
    return np.stack(rows) if rows else x


@MUTANTS.of("moe.soft_merging")
def sum_of_experts(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    return soft_merging(x, w_router, w_in, len(w_out) * w_out, **options)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
