"""Hash layers that are wrong in one way: the laws of the records must catch each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.moe.hash_context import (
    bigram_hash,
    future_hash,
    position_hash,
    predicted_future_hash,
    previous_hash,
)
from refimpl.moe.hash_layers import hash_layer
from refimpl.moe.hash_tables import balanced_table, clustered_table, random_table
from refimpl.moe.multi_hash import multi_hash_layer
from tests.moe.mutation import Mutants

registry.load()

MUTANTS = Mutants()


@MUTANTS.of("moe.hash.random")
def draws_rounded_to_nearest(draws: Any, /, *, num_experts: int) -> Any:
    return np.minimum(np.rint(draws * num_experts), num_experts - 1).astype(np.int64)


@MUTANTS.of("moe.hash.random")
def ranks_of_the_draws(draws: Any, /, *, num_experts: int) -> Any:
    return np.argsort(np.argsort(draws)) % num_experts


@MUTANTS.of("moe.hash.random")
def last_expert_never_drawn(draws: Any, /, *, num_experts: int) -> Any:
    return random_table(draws, num_experts=max(num_experts - 1, 1))


@MUTANTS.of("moe.hash.balanced")
def token_types_balanced(counts: Any, /, *, num_experts: int) -> Any:
    return np.argsort(np.argsort(-counts, kind="stable"), kind="stable") % num_experts


@MUTANTS.of("moe.hash.balanced")
def rarest_first(counts: Any, /, *, num_experts: int) -> Any:
    order = np.argsort(counts, kind="stable")
    table, masses = np.zeros(len(counts), np.int64), np.zeros(num_experts)
    for token in order:
        table[token] = np.argmin(masses)
        masses[table[token]] += counts[token]
    return table


@MUTANTS.of("moe.hash.balanced")
def ties_to_the_highest(counts: Any, /, *, num_experts: int) -> Any:
    return balanced_table(counts[::-1], num_experts=num_experts)[::-1]


@MUTANTS.of("moe.hash.balanced")
def in_order_of_the_vocabulary(counts: Any, /, *, num_experts: int) -> Any:
    table, masses = np.zeros(len(counts), np.int64), np.zeros(num_experts)
    for token, count in enumerate(counts):
        table[token] = np.argmin(masses)
        masses[table[token]] += count
    return table


@MUTANTS.of("moe.hash.clustered")
def one_round_only(embeddings: Any, initial: Any, /) -> Any:
    return clustered_table(embeddings, initial, max_iterations=1)


@MUTANTS.of("moe.hash.clustered")
def nearest_by_angle(embeddings: Any, initial: Any, /) -> Any:
    return np.argmax(embeddings @ initial.T, axis=1)


@MUTANTS.of("moe.hash.clustered")
def numbered_by_size(embeddings: Any, initial: Any, /) -> Any:
    table = clustered_table(embeddings, initial)
    counts = np.bincount(table, minlength=len(initial))
    return np.argsort(np.argsort(-counts, kind="stable"))[table]


@MUTANTS.of("moe.hash.dispersed")
def each_cluster_from_the_first_expert(clusters: Any, /, *, num_experts: int) -> Any:
    table = np.zeros(len(clusters), np.int64)
    for cluster in set(clusters):
        members = np.flatnonzero(clusters == cluster)
        table[members] = np.arange(len(members)) % num_experts
    return table


@MUTANTS.of("moe.hash.dispersed")
def cluster_as_expert(clusters: Any, /, *, num_experts: int) -> Any:
    return clusters % num_experts


@MUTANTS.of("moe.hash.dispersed")
def dealt_without_clusters(clusters: Any, /, *, num_experts: int) -> Any:
    return np.arange(len(clusters)) % num_experts


@MUTANTS.of("moe.hash.position")
def start_forgotten(tokens: Any, table: Any, /, *, start: int) -> Any:
    return position_hash(tokens, table)


@MUTANTS.of("moe.hash.position")
def token_for_position(tokens: Any, table: Any, /, *, start: int) -> Any:
    return table[(tokens + start) % len(table)] if len(table) else tokens


@MUTANTS.of("moe.hash.bigram")
def pair_without_order(tokens: Any, /, *, num_experts: int, first_token: int, seed: int) -> Any:
    before = np.concatenate([np.full((*tokens.shape[:-1], 1), first_token), tokens], axis=-1)[..., :-1]
    low, high = np.minimum(before, tokens), np.maximum(before, tokens)
    return (low * 7919 + high * 104729 + seed) % num_experts


@MUTANTS.of("moe.hash.bigram")
def the_token_alone(tokens: Any, /, *, num_experts: int, first_token: int, seed: int) -> Any:
    return (
        bigram_hash(np.zeros_like(tokens), num_experts=num_experts, first_token=0) * 0 + tokens % num_experts
    )


@MUTANTS.of("moe.hash.bigram", "moe.hash.previous")
def the_sequence_wraps_around(tokens: Any, *table: Any, **options: Any) -> Any:
    if not tokens.shape[-1]:
        return tokens
    moved = np.roll(tokens, 1, axis=-1)
    if table:
        return table[0][moved]
    first = bigram_hash(tokens, **options)
    for b in np.ndindex(tokens.shape[:-1]):
        first[b] = bigram_hash(tokens[b], **{**options, "first_token": int(moved[b][0])})
    return first


@MUTANTS.of("moe.hash.previous")
def its_own_token(tokens: Any, table: Any, /, *, first_token: int) -> Any:
    return table[tokens]


@MUTANTS.of("moe.hash.previous")
def two_before(tokens: Any, table: Any, /, *, first_token: int) -> Any:
    once = np.concatenate([np.full((*tokens.shape[:-1], 1), first_token), tokens], axis=-1)
    return previous_hash(once, table, first_token=first_token)[..., : tokens.shape[-1]]


@MUTANTS.of("moe.hash.future")
def last_place_keeps_its_token(tokens: Any, table: Any, /, *, last_token: int) -> Any:
    experts = future_hash(tokens, table, last_token=last_token)
    experts[..., -1:] = table[tokens[..., -1:]]
    return experts


@MUTANTS.of("moe.hash.future")
def the_past_for_the_future(tokens: Any, table: Any, /, *, last_token: int) -> Any:
    return previous_hash(tokens, table, first_token=last_token)


@MUTANTS.of("moe.hash.predicted_future")
def least_probable(logits: Any, table: Any, /) -> Any:
    return predicted_future_hash(-logits, table)


@MUTANTS.of("moe.hash.predicted_future")
def ties_to_the_last(logits: Any, table: Any, /) -> Any:
    return predicted_future_hash(logits[..., ::-1], table[::-1])


@MUTANTS.of("moe.hash")
def share_of_an_expert(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    return hash_layer(x, w_in, w_out, experts=experts, **options) / len(w_in)


@MUTANTS.of("moe.hash")
def next_expert(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    return hash_layer(x, w_in, w_out, experts=(experts + 1) % len(w_in), **options)


@MUTANTS.of("moe.hash")
def expert_of_its_neighbour(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    return hash_layer(x, w_in, w_out, experts=np.roll(experts, 1), **options)


@MUTANTS.of("moe.hash")
def full_experts_drop_tokens(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    y = hash_layer(x, w_in, w_out, experts=experts, **options)
    for e in range(len(w_in)):
        y[np.flatnonzero(experts == e)[-(-len(x) // len(w_in)) :]] = 0
    return y


@MUTANTS.of("moe.hash.multi")
def first_hash_for_all_segments(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    alike = np.broadcast_to(experts[:1], experts.shape)
    return multi_hash_layer(x, w_in, w_out, experts=alike, **options)


@MUTANTS.of("moe.hash.multi")
def output_segments_reversed(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    y = multi_hash_layer(x, w_in, w_out, experts=experts, **options)
    return y.reshape(len(x), len(w_in), -1)[:, ::-1].reshape(x.shape)


@MUTANTS.of("moe.hash.multi")
def segments_added(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    y = multi_hash_layer(x, w_in, w_out, experts=experts, **options)
    total = y.reshape(len(x), len(w_in), -1).sum(axis=1)
    return np.tile(total, (1, len(w_in)))


@MUTANTS.of("moe.hash.multi")
def hash_reversed_for_the_output(x: Any, w_in: Any, w_out: Any, /, *, experts: Any, **options: Any) -> Any:
    return multi_hash_layer(x, w_in, w_out[:, ::-1], experts=experts, **options)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
