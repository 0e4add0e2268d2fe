"""What no law says of a single call: causality, optimality by size, and clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from refimpl.attention import softmax
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.moe.attention_router import attention_routed
from refimpl.moe.auction import auction_assignment
from refimpl.moe.base_assignment import base_assignment, base_layer
from refimpl.moe.domain_routing import domain_routing
from refimpl.moe.expert_choice import expert_choice
from refimpl.moe.fine_grained import fine_grained
from refimpl.moe.hash_context import position_hash, previous_hash
from refimpl.moe.hash_layers import hash_layer
from refimpl.moe.hash_tables import balanced_table, random_table
from refimpl.moe.multi_hash import multi_hash_layer
from refimpl.moe.residual import ResidualLayer, pyramid, residual, residual_vjp, sample_residual
from refimpl.moe.samples import sample_layer
from refimpl.moe.shared_experts import shared_experts
from refimpl.moe.soft_merging import soft_merging
from refimpl.moe.sparse_mixture import sparse_mixture_vjp
from refimpl.moe.split_ffn import SplitExperts
from refimpl.moe.switch import switch
from refimpl.moe.upcycling import upcycling
from refimpl.numerics import FloatArray
from refimpl.transformer.ffn import ffn


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
        places = np.repeat(scores, T // E, axis=1)
        rows, columns = scipy.optimize.linear_sum_assignment(places, maximize=True)
        for assignment in (base_assignment, auction_assignment):
            expert = assignment(scores)
            assert np.bincount(expert, minlength=E).tolist() == [T // E] * E
            assert scores[np.arange(T), expert].sum() == pytest.approx(places[rows, columns].sum(), abs=1e-6)


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


def test_yuan_renormalizes_unless_told_otherwise() -> None:
    """Equal scores of four experts: two of them get a half each, as in the model, not a quarter."""
    w = np.ones((4, 1, 1))
    zero = np.zeros((1, 4))
    assert attention_routed(np.ones((1, 1)), zero, zero, zero, w, w).item() == 1.0
    assert attention_routed(np.ones((1, 1)), zero, zero, zero, w, w, convention="switch").item() == 0.5


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


def _upcycled(copies: int) -> tuple[SplitExperts, FloatArray, FloatArray]:
    """Copies of a dense layer, tokens, and what the dense layer gives."""
    rng = np.random.default_rng(0)
    w_1, w_2, x = (rng.standard_normal(shape) for shape in ((3, 8), (8, 3), (6, 3)))
    return upcycling(w_1, w_2, copies=copies), x, ffn(x, w_1, w_2)


def test_upcycling_under_switch_scales_by_the_gate_and_drops_break_it() -> None:
    experts, x, dense = _upcycled(4)
    router = np.random.default_rng(1).standard_normal((3, 4))
    gate = softmax(x @ router).max(axis=1, keepdims=True)
    y = switch(x, router, experts.w_in, experts.w_out, capacity=len(x), activation="relu")
    np.testing.assert_allclose(y, gate * dense, rtol=1e-12)
    dropped = switch(x, np.zeros((3, 4)), experts.w_in, experts.w_out, capacity=1, activation="relu")
    assert not dropped[1:].any(), "tokens that found no room are left to the residual"


def test_experts_that_no_token_chose_have_no_gradient() -> None:
    experts, x, dense = _upcycled(3)
    logits = np.tile([2.0, 1.0, 0.0], (len(x), 1))
    arrays = x, logits, experts.w_in, experts.w_out, np.ones_like(dense)
    back = sparse_mixture_vjp(*arrays, k=2, convention="gshard", activation="relu")
    assert back.dw_in[:2].any(axis=(1, 2)).all()
    assert not back.dw_in[2].any()
    assert not back.dw_out[2].any()
    np.testing.assert_allclose(back.dlogits, 0, atol=1e-12)  # equal experts: the router has nothing to learn


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_segments_do_not_change_the_operations_of_experts(segments: int) -> None:
    T, D, N, F, k = 5, 3, 4, 8, 2
    rng, memory = np.random.default_rng(0), Memory()
    arrays = (rng.standard_normal(s) for s in ((T, D), (D, N * segments), (N, D, F), (N, F, D)))
    fine_grained(*arrays, k=k, segments=segments, memory=memory)
    router_and_sum = 2 * T * D * N * segments + 2 * T * D * k * segments
    assert memory.flops - router_and_sum == 4 * T * k * D * F


def test_without_shared_experts_the_layer_is_that_of_its_routed_ones() -> None:
    case = sample_layer(np.random.default_rng(0), T=5, D=3, E=4, F=2)
    nobody = np.zeros((0, 3, 7)), np.zeros((0, 7, 3))
    y = shared_experts(*case.args, *nobody, k=2, activation="relu")
    np.testing.assert_array_equal(y, fine_grained(*case.args, k=2, segments=1, activation="relu"))


def test_a_pyramids_gradient_goes_back_layer_by_layer() -> None:
    rng = np.random.default_rng(0)
    stack = [ResidualLayer(*sample_residual(rng, T=2, D=3, E=experts, F=2).args[1:]) for experts in (2, 4)]
    x, dy, direction = (rng.standard_normal((2, 3)) for _ in range(3))
    inner = x + residual(x, *stack[0])
    through = dy + residual_vjp(inner, *stack[1], dy).dx
    dx = through + residual_vjp(x, *stack[0], through).dx
    ends = [np.sum(dy * pyramid(x + step * direction, layers=stack)) for step in (1e-6, -1e-6)]
    assert np.sum(dx * direction) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)
