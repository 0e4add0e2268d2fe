"""Laws of hash layers' tables and of the hashes of a token's neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import IntArray, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
TABLES = ("moe.hash.random", "moe.hash.balanced", "moe.hash.clustered", "moe.hash.dispersed")
SEQUENTIAL = ("moe.hash.position", "moe.hash.bigram", "moe.hash.previous", "moe.hash.future")


def _experts(case: Case, f: Function) -> IntArray:
    return np.asarray(case.call(f))


def _equal(actual: IntArray, expected: Any, what: str) -> None:
    expected = np.asarray(expected)
    if actual.shape != expected.shape:
        raise LawViolation(f"{what}: expected shape {expected.shape}, got {actual.shape}")
    require(actual == expected, f"{what}: got {actual}, expected {expected}")


# Tables


@law(*TABLES)
def every_token_has_one_expert(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A table holds one expert in [0, E) for each token."""
    table = _experts(case, f)
    E = case.kwargs.get("num_experts") or len(case.args[1])
    _equal(np.array(table.shape), (len(case.args[0]),), "length of the table")
    require((table >= 0) & (table < E), f"an expert outside [0, {E})")


@law("moe.hash.random")
def a_draw_decides_for_its_token_alone(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Drawing for the tokens in another order gives the same experts in that order."""
    _equal(
        _experts(case.replace(case.args[0][::-1]), f), _experts(case, f)[::-1], "table of the reversed draws"
    )


@law("moe.hash.random")
def twice_the_experts_split_each_in_two(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With 2E experts a token's number halves to what it is with E."""
    double = case.replace(num_experts=2 * case.kwargs["num_experts"])
    _equal(_experts(double, f) // 2, _experts(case, f), "half the expert of 2E")


@law("moe.hash.random")
def even_draws_fill_experts_evenly(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Draws spread evenly over [0, 1) give each expert equally many tokens."""
    E = case.kwargs["num_experts"]
    draws = (np.arange(5 * E) + 0.5) / (5 * E)
    counts = np.bincount(_experts(case.replace(draws), f), minlength=E)
    _equal(counts, np.full(E, 5), "tokens of each expert")


def _masses(case: Case, table: IntArray) -> IntArray:
    masses = np.zeros(case.kwargs["num_experts"], np.int64)
    np.add.at(masses, table, case.args[0])
    return masses


@law("moe.hash.balanced")
def experts_differ_by_at_most_one_token_type(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Masses of two experts differ by at most the largest count, and by the last token put in the fuller one.

    The second half is what makes it greedy in descending order: without its least frequent token an expert is
    no fuller than any other.
    """
    (counts,) = case.args
    table = _experts(case, f)
    masses = _masses(case, table)
    require(np.ptp(masses) <= counts.max(initial=0), f"masses {masses} differ by more than the largest count")
    for e in np.unique(table):
        least = counts[table == e].min()
        require(masses[e] - least <= masses, f"expert {e} was not the emptiest when its last token came")


@law("moe.hash.balanced")
def tokens_may_be_renumbered(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Renumbering tokens whose counts differ renumbers the table; the masses hold with ties too."""
    (counts,) = case.args
    other = case.replace(counts[::-1])
    _equal(np.sort(_masses(other, _experts(other, f))), np.sort(_masses(case, _experts(case, f))), "masses")
    distinct = counts * max(len(counts), 1) + np.arange(len(counts))
    here, there = (_experts(case.replace(c), f) for c in (distinct, distinct[::-1]))
    _equal(there, here[::-1], "table of reversed tokens")


@law("moe.hash.balanced")
def the_size_of_the_corpus_does_not_matter(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Three times the corpus gives the same table."""
    _equal(_experts(case.replace(3 * case.args[0]), f), _experts(case, f), "table of three times the counts")


@law("moe.hash.balanced")
def ties_go_to_the_lowest(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Equally frequent tokens are dealt in turn: 0, 1, ..., E - 1, 0, ..."""
    E = case.kwargs["num_experts"]
    flat = case.replace(np.full(len(case.args[0]), 7))
    _equal(_experts(flat, f), np.arange(len(case.args[0])) % E, "table of equal counts")


@law("moe.hash.clustered")
def tokens_are_nearest_to_their_own_mean(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """No token is nearer to the mean of another cluster: the clusters are a fixed point of k-means."""
    points = widen(case.args[0]).astype(np.float64)
    table = _experts(case, f)
    used = np.unique(table)
    if not len(used):
        return
    means = np.stack([points[table == e].mean(axis=0) for e in used])
    distances = np.linalg.norm(points[:, None] - means, axis=2)
    own = distances[np.arange(len(points)), np.searchsorted(used, table)]
    room = 1e-9 * (1 + np.abs(points).max(initial=0))
    require(own <= distances.min(axis=1) + room, "a token is nearer to the mean of another cluster")


@law("moe.hash.clustered")
def equal_embeddings_share_an_expert(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A vocabulary written twice has its table twice."""
    points, initial = case.args
    twice = case.replace(np.concatenate([points, points]), initial)
    table = _experts(twice, f)
    _equal(table[len(points) :], table[: len(points)], "table of the second copy")


@law("moe.hash.clustered")
def clusters_are_numbered_as_their_centers(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Reversing the initial centers reverses the numbers."""
    points, initial = case.args
    if points.dtype.itemsize < 4 or len(np.unique(initial, axis=0)) < len(initial):
        return  # on a coarse grid tokens lie between two centers, and go to the lower one
    other = _experts(case.replace(points, initial[::-1].copy()), f)
    _equal(len(initial) - 1 - other, _experts(case, f), "numbers under reversed centers")


@law("moe.hash.dispersed")
def clusters_are_spread_evenly(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A cluster's tokens are in all experts, and all tokens are, in numbers that differ by at most 1."""
    (clusters,) = case.args
    table, E = _experts(case, f), case.kwargs["num_experts"]
    for name, members in [("all", np.full(len(table), True)), *((c, clusters == c) for c in set(clusters))]:
        counts = np.bincount(table[members], minlength=E)
        require(np.ptp(counts) <= 1, f"cluster {name} is spread as {counts}")


@law("moe.hash.dispersed")
def names_of_clusters_do_not_matter(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Clusters numbered otherwise, in the same order, are spread alike; one cluster is dealt in turn."""
    (clusters,) = case.args
    _equal(_experts(case.replace(2 * clusters + 5), f), _experts(case, f), "table under other names")
    dealt = np.arange(len(clusters)) % case.kwargs["num_experts"]
    _equal(_experts(case.replace(np.zeros_like(clusters)), f), dealt, "table of one cluster")


# Hashes of the context


@law(*SEQUENTIAL)
def sequences_are_hashed_alone(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A batch is its sequences one by one."""
    tokens, *table = case.args
    experts = _experts(case, f)
    _equal(np.array(experts.shape), tokens.shape, "shape of the experts")
    for b, row in enumerate(tokens):
        _equal(_experts(case.replace(row, *table), f), experts[b], f"sequence {b} alone")


def _reach(f: Function, case: Case, allowed: tuple[int, ...]) -> None:
    """Require that another token at t changes experts at most at the places t + `allowed`."""
    tokens, *table = case.args
    before = _experts(case, f)
    V = len(table[0]) if table else 50
    for t in range(tokens.shape[-1]):
        other = tokens.copy()
        other[..., t] = (other[..., t] + 1) % V
        changed = np.flatnonzero(np.any(_experts(case.replace(other, *table), f) != before, axis=0)) - t
        require(np.isin(changed, allowed), f"token {t} changes the expert of tokens at distance {changed}")


@law("moe.hash.position")
def the_tokens_do_not_matter(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Other tokens at the same positions have the same experts."""
    tokens, table = case.args
    _equal(_experts(case.replace(tokens + 1, table), f), _experts(case, f), "experts of other tokens")


@law("moe.hash.position")
def positions_count_from_the_start(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Cutting the first token away and starting one later gives the rest; the table is looked up."""
    tokens, table = case.args
    rest = case.replace(tokens[..., 1:], table).replace(start=case.kwargs["start"] + 1)
    _equal(_experts(rest, f), _experts(case, f)[..., 1:], "experts of the rest")
    counted = case.replace(tokens, np.arange(len(table)))
    places = np.broadcast_to(case.kwargs["start"] + np.arange(tokens.shape[-1]), tokens.shape)
    _equal(_experts(counted, f), places, "experts under a table that counts")


@law("moe.hash.bigram")
def a_pair_decides(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token changes its own expert and the next one's; the first pair is (first_token, x_0)."""
    (tokens,) = case.args
    _reach(f, case, (0, 1))
    prefix = np.full((len(tokens), 1), case.kwargs["first_token"])
    longer = case.replace(np.concatenate([prefix, tokens], axis=1))
    _equal(_experts(longer, f)[:, 1:], _experts(case, f), "experts behind the first token written out")


@law("moe.hash.bigram")
def pairs_spread_over_experts(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """All pairs of 32 tokens fill the experts nearly evenly, and a pair reversed is another pair."""
    E = case.kwargs["num_experts"]
    case = case.replace(num_experts=16)
    pairs = np.array([(a, b) for a in range(32) for b in range(32)])
    there, back = (_experts(case.replace(p), f)[:, 1] for p in (pairs, pairs[:, ::-1]))
    expected = len(pairs) / 16
    chi_square = np.sum((np.bincount(there, minlength=16) - expected) ** 2) / expected
    require(chi_square < 60, f"chi-square {chi_square} with 15 degrees of freedom")  # 2e-7 by chance
    require(np.mean(there == back) < 0.25, "a pair and its reverse share an expert too often")
    for grid in (there.reshape(32, 32), there.reshape(32, 32).T):
        require([len(set(row)) > 6 for row in grid], "one token of the pair decides too much")  # 14 expected
    require(_experts(case.replace(pairs, num_experts=E), f) < E, f"an expert outside [0, {E})")


@law("moe.hash.previous")
def the_token_before_decides(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token decides for the next one alone, by the table; the first one is decided by `first_token`."""
    tokens, table = case.args
    _reach(f, case, (1,))
    prefix = np.full((len(tokens), 1), case.kwargs["first_token"])
    longer = case.replace(np.concatenate([prefix, tokens], axis=1), table)
    _equal(_experts(longer, f)[:, 1:], _experts(case, f), "experts behind the first token written out")


@law("moe.hash.future")
def the_token_behind_decides(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token decides for the one before it alone; the last one is decided by `last_token`."""
    tokens, table = case.args
    _reach(f, case, (-1,))
    suffix = np.full((len(tokens), 1), case.kwargs["last_token"])
    longer = case.replace(np.concatenate([tokens, suffix], axis=1), table)
    _equal(_experts(longer, f)[:, :-1], _experts(case, f), "experts before the last token written out")


@law("moe.hash.previous", "moe.hash.future")
def one_token_repeated_is_looked_up(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A sequence of one token has that token's expert throughout."""
    tokens, table = case.args
    edge = {key: len(table) - 1 for key in case.kwargs}
    same = case.replace(np.full_like(tokens, len(table) - 1), table).replace(**edge)
    _equal(_experts(same, f), np.full_like(tokens, table[-1]), "experts of a repeated token")


@law("moe.hash.predicted_future")
def a_sure_prediction_is_looked_up(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Where the baseline is sure of a token, that token's expert is taken; equal scores give the lowest."""
    logits, table = case.args
    sure = np.eye(len(table))
    _equal(_experts(case.replace(sure, table), f), table, "experts of sure predictions")
    flat = np.zeros_like(logits)
    _equal(_experts(case.replace(flat, table), f), np.full(logits.shape[:-1], table[0]), "experts of ties")


@law("moe.hash.predicted_future")
def only_the_order_of_scores_matters(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Doubled scores predict the same tokens, and tokens renumbered with the table the same experts."""
    logits, table = case.args
    before = _experts(case, f)
    _equal(_experts(case.replace(2 * logits, table), f), before, "experts of doubled scores")
    untied = logits - 1e-3 * np.arange(len(table))
    here, there = (case.replace(untied, table), case.replace(untied[..., ::-1], table[::-1]))
    _equal(_experts(there, f), _experts(here, f), "experts under reversed numbers")
