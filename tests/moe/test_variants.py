"""What no law says of a single call: causality, optimality by size, and clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.moe.base_assignment import base_assignment, base_layer
from refimpl.moe.domain_routing import domain_routing
from refimpl.moe.expert_choice import expert_choice
from refimpl.moe.hash_context import position_hash, previous_hash
from refimpl.moe.hash_layers import hash_layer
from refimpl.moe.hash_tables import balanced_table, random_table
from refimpl.moe.multi_hash import multi_hash_layer
from refimpl.moe.samples import sample_layer
from refimpl.moe.soft_merging import soft_merging


def test_a_later_token_takes_an_earlier_ones_place() -> None:
    case = sample_layer(np.random.default_rng(0), T=6, D=3, E=2, F=4)
    x, w_router, *experts = case.args
    before = expert_choice(x, w_router, *experts, capacity=2)
    louder = x.copy()
    louder[-1] = 40.0 * w_router[:, 0]  # now the last token has the largest share of expert 0
    after = expert_choice(louder, w_router, *experts, capacity=2)
    changed = np.any(before != after, axis=1)
    assert changed[:-1].any(), "no earlier output depends on the last token"


def test_a_token_may_have_no_expert_or_all_of_them() -> None:
    x, w = np.array([[1.0], [2.0]]), np.ones((2, 1, 1))
    out = expert_choice(x, np.zeros((1, 2)), w, w, capacity=1)
    assert out.ravel().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("T", "E"), [(64, 8), (60, 3), (48, 48)])
def test_large_assignments_are_as_good_as_scipys(T: int, E: int) -> None:
    rng = np.random.default_rng(T)
    for scores in (rng.standard_normal((T, E)), np.round(rng.standard_normal((T, E)))):  # the second has ties
        expert = base_assignment(scores)
        places = np.repeat(scores, T // E, axis=1)
        rows, columns = scipy.optimize.linear_sum_assignment(places, maximize=True)
        assert np.bincount(expert, minlength=E).tolist() == [T // E] * E
        assert scores[np.arange(T), expert].sum() == pytest.approx(places[rows, columns].sum(), abs=1e-9)


def test_greedy_tables_are_within_grahams_bound() -> None:
    """The fullest expert against the best table of all E**V: at most 4/3 - 1/(3E) of it."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        counts, E = rng.integers(1, 20, 7), int(rng.integers(2, 4))
        every = np.stack(np.meshgrid(*[np.arange(E)] * 7)).reshape(7, -1)
        loads = np.stack([((every == e) * counts[:, None]).sum(axis=0) for e in range(E)])
        best = loads.max(axis=0).min()
        table = balanced_table(counts, num_experts=E)
        fullest = max(counts[table == e].sum() for e in range(E))
        assert best <= fullest <= (4 / 3 - 1 / (3 * E)) * best


def test_merging_parameters_is_not_mixing_outputs() -> None:
    w = np.stack([np.eye(1), 3 * np.eye(1)])
    merged = soft_merging(np.ones((1, 1, 1)), np.zeros((1, 2)), w, w)
    assert merged.item() == 4.0  # (1 + 3) / 2 in both matrices; a mixture gives (1 + 9) / 2


def test_hash_layers_of_one_table_hash_alike_and_of_their_own_draws_do_not() -> None:
    same = [random_table(np.random.default_rng(42).random(1000), num_experts=16) for _ in range(2)]
    different = [random_table(np.random.default_rng(seed).random(1000), num_experts=16) for seed in (1, 2)]
    assert np.mean(same[0] == same[1]) == 1
    assert np.mean(different[0] == different[1]) == pytest.approx(1 / 16, abs=0.03)


ONE, ZERO = np.ones((1, 1, 1)), np.zeros((1, 1), int)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_table(np.array([1.5]), num_experts=2), OptionError, "draws: expected numbers in"),
        (lambda: random_table(np.array([np.nan]), num_experts=2), OptionError, "draws: expected numbers in"),
        (
            lambda: random_table(np.array([0.5]), num_experts=0),
            OptionError,
            "num_experts: expected at least 1",
        ),
        (
            lambda: balanced_table(np.array([1, -1]), num_experts=2),
            OptionError,
            "counts: expected numbers in",
        ),
        (lambda: balanced_table(np.array([0.5]), num_experts=2), DTypeError, "counts: expected integers"),
        (lambda: balanced_table(np.array([[1]]), num_experts=2), ShapeError, "counts: expected shape (V,)"),
        (
            lambda: position_hash(np.zeros(3, int), np.zeros(2, int)),
            OptionError,
            "table: expected at least 3 positions, got 2",
        ),
        (
            lambda: previous_hash(np.array([5]), np.zeros(2, int), first_token=0),
            OptionError,
            "tokens: expected numbers in [0, 2), got 5 to 5",
        ),
        (
            lambda: hash_layer(ONE[0], ONE, ONE, experts=np.array([1])),
            OptionError,
            "experts: expected numbers in [0, 1), got 1 to 1",
        ),
        (
            lambda: hash_layer(ONE[0], ONE, ONE, experts=np.array([0, 0])),
            ShapeError,
            "experts: expected shape (1,), one a token, got (2,)",
        ),
        (
            lambda: multi_hash_layer(
                np.ones((1, 2)), np.ones((1, 1, 2, 1)), ONE[None], experts=np.zeros((1, 1), int)
            ),
            ShapeError,
            "w_out: axis D must be n times axis d; got D=2, n=1, d=1",
        ),
        (lambda: expert_choice(ONE[0], ONE[0], ONE, ONE, capacity=2), OptionError, "expected at most 1"),
        (lambda: base_assignment(np.ones((3, 2))), ShapeError, "scores: axis E must divide T; got E=2, T=3"),
        (lambda: base_assignment(np.full((2, 2), np.inf)), OptionError, "scores: expected finite numbers"),
        (
            lambda: base_layer(ONE[0], ONE[0], ONE, ONE, assignment="random"),  # type: ignore[arg-type]
            OptionError,
            "assignment: expected one of ('balanced', 'greedy'), got 'random'",
        ),
        (
            lambda: domain_routing(np.array([0]), np.array([2]), np.zeros((2, 1)), group_sizes=(1, 1)),
            OptionError,
            "domains: expected numbers in [0, 2), got 2 to 2",
        ),
        (
            lambda: soft_merging(np.ones((1, 0, 1)), ONE[0], ONE, ONE),
            ShapeError,
            "at least one token a sequence",
        ),
    ],
)
def test_errors_say_what_where_and_why(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()  # type: ignore[operator]
    assert message in str(raised.value)
