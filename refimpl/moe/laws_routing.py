"""Laws of layers whose experts have a capacity, seen from outside: who is served, with what weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.laws_gating import logits_of, slack
from refimpl.moe.samples import observed_weights
from refimpl.numerics import BoolArray, FloatArray, in_float64
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Layer = Callable[..., Any]

GSHARD = ("moe.gshard", "moe.gshard.as_coded")
ROUTED = ("moe.switch", *GSHARD, "moe.batch_priority")
IN_ORDER = ("moe.switch", "moe.gshard.as_coded")


def _out(case: Case, f: Layer) -> FloatArray:
    return in_float64(case.call(f))


def _without_draws(case: Case) -> Case:
    """Return the case without jitter, and with every second choice sent."""
    return case.without("jitter", "uniforms", "rng", "second_policy", "threshold")


def _roomy(case: Case) -> Case:
    """Return the case with a place for everyone, and without draws."""
    return _without_draws(case).replace(capacity=len(case.args[0]) * _choices(case))


def _choices(case: Case) -> int:
    return int(case.kwargs.get("k", 1))


def _rank(logits: FloatArray) -> FloatArray:
    """Return how many logits of the token are larger."""
    return np.asarray((logits[:, None, :] > logits[:, :, None]).sum(axis=2))


def _softmax(logits: FloatArray) -> FloatArray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _nonzero(case: Case) -> BoolArray:
    return np.asarray(np.any(case.args[0] != 0, axis=1))


@law(*ROUTED)
def no_expert_has_more_tokens_than_places(f: Layer, case: Case, close: Close) -> None:
    """In each group an expert serves at most its capacity; a capacity of 0 drops everything."""
    groups = case.kwargs.get("groups", 1)
    for capacity in (0, 1, 2):
        weights = observed_weights(f, case.replace(capacity=capacity))
        served = (abs(weights) > slack(close)).reshape(groups, -1, weights.shape[1]).sum(axis=1)
        require(served <= capacity, f"an expert with {capacity} places serves more tokens")


@law(*ROUTED)
def weights_of_a_token_are_gates(f: Layer, case: Case, close: Close) -> None:
    """No weight is negative, and those of a token sum to at most 1."""
    weights = observed_weights(f, case)
    require(weights >= -slack(close), "a weight is negative")
    require(weights.sum(axis=1) <= 1 + slack(close), "the weights of a token sum to more than 1")


@law("moe.switch", "moe.batch_priority")
def with_room_the_best_gates_are_the_weights(f: Layer, case: Case, close: Close) -> None:
    """Where nothing is dropped, the k largest of the softmax over all experts are the weights."""
    logits = logits_of(case)
    wanted = np.where(_rank(logits) < _choices(case), _softmax(logits), 0)
    off = abs(observed_weights(f, _roomy(case)) - wanted)[_nonzero(case)]
    if abs(logits).max(initial=0) < 30:
        require(off <= 10 * slack(close), "with room for all, a weight is not the gate")


@law(*GSHARD)
def with_room_two_gates_are_divided_by_their_sum(f: Layer, case: Case, close: Close) -> None:
    """Where nothing is dropped, the two largest gates divided by their sum are the weights."""
    logits = logits_of(case)
    kept = np.where(_rank(logits) < 2, _softmax(logits), 0)
    wanted = kept / kept.sum(axis=1, keepdims=True)
    off = abs(observed_weights(f, _roomy(case)) - wanted)[_nonzero(case)]
    if abs(logits).max(initial=0) < 30:
        require(off <= 10 * slack(close), "with room for all, weights are not the two gates over their sum")


@law(*ROUTED)
def experts_permute_with_the_router(f: Layer, case: Case, close: Close) -> None:
    """Permuting experts together with the router's columns changes nothing."""
    x, w_router, w_in, w_out = case.args
    order = np.random.default_rng(0).permutation(w_router.shape[1])
    gate = case.kwargs.get("w_gate")
    options = {} if gate is None else {"w_gate": gate[order]}
    moved = case.replace(x, w_router[:, order], w_in[order], w_out[order], **options)
    close(moved.call(f), case.call(f), "experts permuted")


@law(*ROUTED)
def groups_do_not_see_each_other(f: Layer, case: Case, close: Close) -> None:
    """A group routed alone gives its part of the whole."""
    x, *weights = case.args
    groups = case.kwargs.get("groups", 1)
    whole = _out(case, f)
    size = len(x) // groups
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        draws = {"uniforms": case.kwargs["uniforms"][part]} if "uniforms" in case.kwargs else {}
        alone = case.replace(x[part], *weights, groups=1, **draws)
        close(_out(alone, f), whole[part], f"group {g} alone")


@law(*IN_ORDER)
def first_choices_come_in_token_order(f: Layer, case: Case, close: Close) -> None:
    """The first tokens of a group that prefer an expert are those which it serves as a first choice."""
    groups = case.kwargs.get("groups", 1)
    first = _rank(logits_of(case)) == 0
    plain = _without_draws(case)
    everyone = observed_weights(f, _roomy(case))
    for capacity in (1, 2):
        weights = observed_weights(f, plain.replace(capacity=capacity))
        arrivals = first.reshape(groups, -1, first.shape[1]).cumsum(axis=1).reshape(first.shape)
        wanted = np.where(first & (arrivals <= capacity), everyone, 0)
        require(
            abs(np.where(first, weights, 0) - wanted) <= slack(close),
            f"{capacity} places: others than the first tokens in line are served, or weighted otherwise",
        )


@law("moe.switch")
def later_tokens_change_nothing(f: Layer, case: Case, close: Close) -> None:
    """With places given, what a token gets depends on no token behind it."""
    x, *weights = case.args
    case = case.without("jitter", "uniforms").replace(capacity=1, groups=1)
    half = len(x) // 2
    head = case.replace(x[:half], *weights)
    close.on(case)(_out(head, f), _out(case, f)[:half], "the tokens behind taken away")


@law("moe.switch")
def a_sole_expert_is_a_dense_layer(f: Layer, case: Case, close: Close) -> None:
    """With one expert and room for all, the layer is that expert: its gate is 1."""
    from refimpl.moe.expert_ffn import expert_ffn

    x, w_router, w_in, w_out = case.args
    gate = case.kwargs.get("w_gate")
    one = {} if gate is None else {"w_gate": gate[:1]}
    sole = _roomy(case).replace(x, w_router[:, :1], w_in[:1], w_out[:1], **one)
    dense = expert_ffn(x[None], w_in[:1], w_out[:1], activation=case.kwargs["activation"], **one)[0]
    close.on(sole)(sole.call(f), dense, "one expert against the dense layer")


@law("moe.switch")
def jitter_moves_the_router_alone(f: Layer, case: Case, close: Close) -> None:
    """Jitter of the draws 1/2 changes nothing, and other draws change a token only by its weight."""
    x = case.args[0]
    still = case.replace(jitter=0.01, uniforms=np.full(x.shape, 0.5, x.dtype))
    close.on(still)(still.call(f), case.without("jitter", "uniforms").call(f), "jitter of factor 1")
    moved = _roomy(case).replace(jitter=0.9, uniforms=np.random.default_rng(0).random(x.shape))
    sole = moved.replace(x, *(w[..., :1] if n == 0 else w[:1] for n, w in enumerate(case.args[1:])))
    gate = case.kwargs.get("w_gate")
    sole = sole if gate is None else sole.replace(w_gate=gate[:1])
    close.on(sole)(sole.call(f), sole.without("jitter", "uniforms").call(f), "jitter with one expert")


@law(*ROUTED)
def ties_go_to_the_lowest_expert(f: Layer, case: Case, close: Close) -> None:
    """A router of zeros sends tokens to the experts with the lowest indices."""
    x, w_router, *experts = case.args
    k = 2 if len(case.kwargs) and w_router.shape[1] >= 2 and "k" not in case.kwargs else _choices(case)
    weights = observed_weights(f, _roomy(case.replace(x, np.zeros_like(w_router), *experts)))
    require(abs(weights[:, k:]) <= slack(close), "equal logits: an expert behind the first ones is chosen")
    require(weights[_nonzero(case), 0] > slack(close), "equal logits: expert 0 is not chosen")


@law(*GSHARD)
def second_choices_never_displace_first_ones(f: Layer, case: Case, close: Close) -> None:
    """What first choices get does not depend on which second choices are sent."""
    first = _rank(logits_of(case)) == 0
    tight = _without_draws(case).replace(capacity=2)
    T = len(case.args[0])
    nobody = tight.replace(uniforms=np.full(T, np.nextafter(1, 2)))
    if "second_policy" in case.kwargs:
        nobody = nobody.replace(second_policy="random", threshold=0.5)
    one, both = (np.where(first, observed_weights(f, item), 0) for item in (nobody, tight))
    require(abs(one - both) <= slack(close), "first choices are served otherwise without second ones")


@law(*GSHARD)
def draws_of_one_send_no_second_choice(f: Layer, case: Case, close: Close) -> None:
    """A second gate is at most 1/2, so that draws above 1 of ``2 g`` leave first choices alone."""
    draws = np.full(len(case.args[0]), np.nextafter(1, 2))
    nobody = _roomy(case).replace(uniforms=draws)
    if "second_policy" in case.kwargs:
        nobody = nobody.replace(second_policy="random", threshold=0.5)
    weights = observed_weights(f, nobody)
    require((abs(weights) > slack(close)).sum(axis=1) <= 1, "a second choice was sent")


def _second_draws_case(case: Case) -> Case:
    """Two tokens want expert 0 first and 1 second; chance takes out the second choice of the first one."""
    D = case.args[0].shape[1]
    x, w_router = np.zeros((2, D)), np.zeros((D, 2))
    x[:, 0], w_router[0, 0] = 1.0, 1.0
    experts = np.zeros((2, D, 2 * D)), np.zeros((2, 2 * D, D))
    options = {"capacity": 1, "groups": 1, "uniforms": np.array([0.9, 0.0])}
    if "second_policy" in case.kwargs:
        options |= {"second_policy": "random", "threshold": 0.5}
    return Case((x, w_router, *experts), {"activation": "relu", **options})


@law("moe.gshard")
def a_choice_that_is_not_sent_still_takes_a_place(f: Layer, case: Case, close: Close) -> None:
    """As printed, the counter goes up for a second choice that chance takes out: the next finds no room."""
    weights = observed_weights(f, _second_draws_case(case))
    require(abs(weights[:, 1]) <= slack(close), "the place of a choice that was not sent was given away")


@law("moe.gshard.as_coded")
def a_choice_that_is_not_sent_takes_no_place(f: Layer, case: Case, close: Close) -> None:
    """As coded, the place of a second choice that chance takes out goes to the next one."""
    weights = observed_weights(f, _second_draws_case(case))
    require(abs(weights[1, 1] - 1 / (1 + np.e)) <= slack(close), "the next choice did not get the place")
    require(abs(weights[0, 1]) <= slack(close), "a choice was sent that chance takes out")


@law("moe.batch_priority")
def the_order_of_tokens_does_not_matter(f: Layer, case: Case, close: Close) -> None:
    """Permuting the tokens of the batch permutes the outputs."""
    x, *weights = case.args
    top = _softmax(logits_of(case)).max(axis=1)
    case = case.replace(groups=1)
    if len(np.unique(top.round(9))) == len(top):  # equal gates are served as they come
        order = np.random.default_rng(0).permutation(len(x))
        moved = case.replace(x[order], *weights)
        close.on(case)(_out(moved, f), _out(case, f)[order], "tokens permuted")


@law("moe.batch_priority")
def the_surest_tokens_are_served(f: Layer, case: Case, close: Close) -> None:
    """With one choice, an expert serves those of its tokens that have the largest gates."""
    case = case.replace(k=1, groups=1)
    logits = logits_of(case)
    gates = np.where(_rank(logits) == 0, _softmax(logits), 0)
    served_in_turn = len(np.unique(gates.max(axis=1, initial=0))) < len(gates)  # equal gates
    if abs(logits).max(initial=0) < 30 and not served_in_turn:
        for capacity in (1, 2):
            weights = observed_weights(f, case.replace(capacity=capacity))
            least = -np.sort(-gates, axis=0)[capacity - 1] if len(gates) >= capacity else 0
            wanted = np.where((gates > 0) & (gates >= least), gates, 0)
            off = abs(weights - wanted)[_nonzero(case)]
            require(off <= 10 * slack(close), f"{capacity} places: not the largest gates are served")
