"""Laws of expert choice, BASE layers and domain routing: who may have whom, and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.laws_gating import slack
from refimpl.moe.samples import observed_weights, scaling_experts
from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
CHOICE = ("moe.expert_choice", "moe.expert_choice.mesh_tf")
LARGEST_TERM = 1e-9  # of float64 scores of order 10, far above rounding and far below a mistake


def with_a_feature_of_one(x: FloatArray) -> FloatArray:
    """Return the tokens with a last feature of 1, by which a router may have constants."""
    return np.concatenate([x, round_to(np.ones((*x.shape[:-1], 1)), x.dtype)], axis=-1)


def _of_all(f: Function, case: Case) -> FloatArray:
    """Return the weights if every expert takes every token."""
    return observed_weights(f, case.replace(capacity=len(case.args[0])))


# Expert choice


@law(*CHOICE)
def every_expert_takes_its_capacity(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every expert has exactly C tokens; with places for all of them it has all."""
    T, E, case = len(case.args[0]), case.args[1].shape[1], case.without("padding_mask")
    for C in (case.kwargs["capacity"], T):
        taken = np.count_nonzero(observed_weights(f, case.replace(capacity=C)), axis=0)
        require(taken == np.full(E, C), f"experts have {taken} tokens, expected {C} each")


@law("moe.expert_choice")
def experts_take_their_largest_shares(f: Function, case: Case, close: Close) -> None:
    """Weights are those of a dense mixture, which sum to 1 for a token, and an expert takes its largest."""
    case = case.without("padding_mask")
    dense, weights = _of_all(f, case), observed_weights(f, case)
    require(abs(dense.sum(axis=1) - 1) <= slack(close), "shares of a token do not sum to 1")
    require(abs(np.where(weights != 0, weights - dense, 0)) <= slack(close), "a share depends on who chose")
    low = np.where(weights != 0, dense, np.inf).min(axis=0, initial=np.inf)
    high = np.where(weights == 0, dense, -np.inf).max(axis=0, initial=-np.inf)
    require(low >= high - slack(close), "an expert left a token with a larger share than one that it took")


@law("moe.expert_choice")
def shares_grow_with_their_logit(f: Function, case: Case, close: Close) -> None:
    """A token's shares of two experts differ by the exponential of the difference of their logits."""
    x, w_router = case.args[:2]
    logits = in_float64(x) @ in_float64(w_router)
    dense = _of_all(f, case.without("padding_mask"))
    ratio = dense * np.exp(logits.max(axis=1, keepdims=True, initial=-np.inf) - logits)
    require(np.ptp(ratio, axis=1) <= 10 * slack(close) * ratio.max(initial=0), "shares are no softmax")


@law("moe.expert_choice")
def padding_yields_to_tokens(f: Function, case: Case, close: Close) -> None:
    """Padding has weight 0 and takes no place that a token wants: tokens fare as if it were not there."""
    x, *rest = case.args
    mask = case.kwargs.get("padding_mask", np.ones(len(x), bool))
    y = np.asarray(case.call(f))
    require(y[~mask] == 0, "padding has an output")
    alone = case.without("padding_mask").replace(x[mask], *rest)
    alone = alone.replace(capacity=min(case.kwargs["capacity"], int(mask.sum())))
    close.on(alone)(alone.call(f), y[mask], "tokens without padding")


@law("moe.expert_choice.mesh_tf")
def weights_are_means_over_those_that_chose(f: Function, case: Case, close: Close) -> None:
    """An expert's shares sum to 1 over the tokens, and are divided by how many experts took the token."""
    E = case.args[1].shape[1]
    shares, weights = E * _of_all(f, case), observed_weights(f, case)
    if len(shares):
        require(abs(shares.sum(axis=0) - 1) <= slack(close), "shares of an expert do not sum to 1")
    taken = np.count_nonzero(weights, axis=1)[:, None] * weights
    require(abs(np.where(weights != 0, taken - shares, 0)) <= slack(close), "no mean over those that chose")
    low = np.where(weights != 0, shares, np.inf).min(axis=0, initial=np.inf)
    high = np.where(weights == 0, shares, -np.inf).max(axis=0, initial=-np.inf)
    require(low >= high - slack(close), "an expert left a token with a larger share than one that it took")


@law("moe.expert_choice.mesh_tf")
def a_constant_for_an_expert_changes_nothing(f: Function, case: Case, close: Close) -> None:
    """A feature of 1 with any weight adds a constant to an expert's logits, which its softmax ignores."""
    x, w_router, w_in, w_out = case.args
    x, w_in = with_a_feature_of_one(x), np.pad(w_in, ((0, 0), (0, 1), (0, 0)))
    w_out = np.pad(w_out, ((0, 0), (0, 0), (0, 1)))
    gate = case.kwargs.get("w_gate")
    options = {} if gate is None else {"w_gate": np.pad(gate, ((0, 0), (0, 1), (0, 0)))}
    constants = round_to(1.0 * np.arange(w_router.shape[1])[None], x.dtype)
    flat, other = (
        case.replace(x, np.vstack([w_router, row]), w_in, w_out).replace(**options)
        for row in (np.zeros_like(constants), constants)
    )
    close.on(other)(other.call(f), flat.call(f), "a constant for each expert")


@law(*CHOICE)
def the_earlier_of_equal_tokens_is_taken(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Where all scores are equal every expert takes the first C tokens."""
    x, w_router, *experts = case.args
    flat = case.without("padding_mask").replace(x, np.zeros_like(w_router), *experts)
    taken = observed_weights(f, flat) != 0
    expected = np.arange(len(x))[:, None] < case.kwargs["capacity"]
    require(taken == expected, "equal tokens are not taken in order")


# BASE


@law("moe.base_assignment")
def every_expert_is_equally_full(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every expert has T / E tokens."""
    (scores,) = case.args
    T, E = scores.shape
    expert = np.asarray(case.call(f))
    require(np.array_equal(expert.shape, [T]), f"expected shape {(T,)}, got {expert.shape}")
    require(np.bincount(expert, minlength=E) == np.full(E, T // E), "experts are not equally full")


@law("moe.base_assignment")
def no_round_of_moves_gains(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """No exchange of tokens between two or more experts has a larger total score: it is the optimum."""
    from refimpl.moe.base_assignment import best_exchange

    scores = in_float64(case.args[0])
    gain = best_exchange(scores, np.asarray(case.call(f)))
    require(gain <= LARGEST_TERM, f"a round of moves gains {gain}")


@law("moe.base_assignment")
def constants_leave_the_optimum(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A constant on an expert's scores, or on a token's, leaves the assignment."""
    (scores,) = case.args
    T, E = scores.shape
    before = np.asarray(case.call(f))
    for added in (np.linspace(-2, 3, E)[None], np.linspace(5, -5, T)[:, None]):
        require(np.asarray(case.replace(scores + added).call(f)) == before, "a constant moves tokens")


@law("moe.base_assignment")
def balanced_wishes_are_fulfilled(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """If the best experts of the tokens are equally full already, every token has its best one."""
    (scores,) = case.args
    T, E = scores.shape
    wish = np.arange(T) % max(E, 1)
    wanted = scores + 100.0 * (wish[:, None] == np.arange(E))
    require(np.asarray(case.replace(wanted).call(f)) == wish, "a wish that all could have is not fulfilled")


def _base_weights(f: Function, case: Case) -> FloatArray:
    """Return the weights without the residual, which is seen with experts that give 0."""
    x, w_router = case.args[:2]
    E, D = w_router.shape[1], x.shape[1]
    tokens, weights = in_float64(x), np.zeros((len(x), E))
    square = np.sum(tokens * tokens, axis=1)
    for e in range(E):
        experts = (round_to(w, x.dtype) for w in scaling_experts(np.eye(E)[e], D))
        y = in_float64(case.without("w_gate").replace(x, w_router, *experts).call(f)) - tokens
        weights[:, e] = np.divide(np.sum(tokens * y, axis=1), square, out=weights[:, e], where=square > 0)
    return weights


@law("moe.base_layer")
def experts_of_zero_leave_the_residual(f: Function, case: Case, close: Close) -> None:
    """Experts that give 0 leave the tokens as they are."""
    x, w_router, w_in, w_out = case.args
    silent = case.replace(x, w_router, w_in, np.zeros_like(w_out))
    close.on(silent)(silent.call(f), x, "experts that give 0")


@law("moe.base_layer")
def the_gate_is_a_sigmoid_of_the_own_score(f: Function, case: Case, close: Close) -> None:
    """Every token has one expert, weighted by the sigmoid of its score: balanced, or its best."""
    x, w_router = case.args[:2]
    T, E = len(x), w_router.shape[1]
    weights = _base_weights(f, case)
    require(np.count_nonzero(weights, axis=1) == 1, "a token has not exactly one expert")
    scores = in_float64(x) @ in_float64(w_router)
    expected = np.where(weights != 0, 1 / (1 + np.exp(-scores)), 0)
    require(abs(weights - expected) <= slack(close), "a gate is not the sigmoid of its score")
    if case.kwargs["assignment"] == "balanced":
        require(np.count_nonzero(weights, axis=0) == T // E, "experts are not equally full")
    else:
        require(np.argmax(scores, axis=1) == np.argmax(weights != 0, axis=1), "not the best expert")


@law("moe.base_layer")
def greedy_tokens_do_not_meet(f: Function, case: Case, close: Close) -> None:
    """At test time a token's output does not depend on the others; in training, order does not matter."""
    x, *rest = case.args
    back = case.replace(x[::-1], *rest)
    close.on(back)(back.call(f), np.asarray(case.call(f))[::-1], "tokens reversed")
    if case.kwargs["assignment"] == "greedy" and len(x):
        alone = case.replace(x[:1], *rest)
        close.on(alone)(alone.call(f), np.asarray(case.call(f))[:1], "first token alone")


# Domain routing


@law("moe.domain_routing")
def domains_never_share_an_expert(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token's expert is one of its domain's group."""
    tokens, domains, _ = case.args
    expert = np.asarray(case.call(f))
    require(np.array_equal(expert.shape, tokens.shape), f"expected shape {tokens.shape}, got {expert.shape}")
    ends = np.cumsum(case.kwargs["group_sizes"])
    require(np.searchsorted(ends, expert, side="right") == domains, "an expert outside the domain's group")


@law("moe.domain_routing")
def one_group_is_the_random_hash(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With one domain the table of random hashing is looked up."""
    from refimpl.moe.hash_tables import random_table

    tokens, domains, draws = case.args
    one = case.replace(tokens, np.zeros_like(domains), draws[:1]).replace(group_sizes=(5,))
    require(
        np.asarray(one.call(f)) == random_table(draws[0], num_experts=5)[tokens], "not the table's expert"
    )


@law("moe.domain_routing")
def groups_are_models_of_their_own(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Taken out of the others, the last group routes its tokens alike, numbered from 0."""
    tokens, domains, draws = case.args
    sizes = case.kwargs["group_sizes"]
    mine = domains == len(sizes) - 1
    alone = case.replace(tokens[mine], domains[mine] * 0, draws[-1:]).replace(group_sizes=sizes[-1:])
    require(
        np.asarray(case.call(f))[mine] == np.asarray(alone.call(f)) + sum(sizes[:-1]),
        "the group depends on others",
    )
