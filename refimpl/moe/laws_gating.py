"""Laws of gates: sums, signs, shifts, ties, and where conventions agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.samples import observed_weights
from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Layer = Callable[..., Any]

TOP_K = ("moe.top_k", "moe.noisy_top_k", "moe.noisy_top_k.vmoe")
# Of sums of a few gates, each at most 1.
ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def slack(close: Close) -> float:
    """Return how far a sum of gates may be off, in the format that the case is in."""
    return ROUNDING[close.dtype]


def logits_of(case: Case) -> FloatArray:
    """Return the logits of a layer's router."""
    return np.asarray(in_float64(case.args[0]) @ in_float64(case.args[1]))


def _softmax(z: FloatArray) -> FloatArray:
    powers = np.exp(z - z.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@law("moe.dense_mixture")
def weights_are_a_convex_combination(f: Layer, case: Case, close: Close) -> None:
    """Every expert has a weight of at least 0, and those of a token sum to 1."""
    weights = observed_weights(f, case)
    require(weights >= -slack(close), "a weight is negative")
    seen = np.any(case.args[0] != 0, axis=1)
    require(abs(weights.sum(axis=1) - 1)[seen] <= slack(close), "the weights of a token do not sum to 1")


@law("moe.dense_mixture")
def equal_experts_make_the_router_irrelevant(f: Layer, case: Case, close: Close) -> None:
    """If all experts are the same, what the router says changes nothing."""
    x, w_router, *experts = case.args
    same = [np.repeat(w[:1], w.shape[0], axis=0) for w in experts]
    gate = case.kwargs.get("w_gate")
    options = {} if gate is None else {"w_gate": np.repeat(gate[:1], gate.shape[0], axis=0)}
    another = round_to(in_float64(w_router)[:, ::-1] - 1, w_router.dtype)
    one, other = (case.replace(x, w, *same, **options) for w in (w_router, another))
    close.on(one)(one.call(f), other.call(f), "equal experts under two routers")


@law("moe.dense_mixture")
def temperature_divides_the_router(f: Layer, case: Case, close: Close) -> None:
    """A temperature is the same as a router divided by it."""
    x, w_router, *experts = case.args
    halved = case.replace(x, w_router / 2, *experts, temperature=case.kwargs["temperature"] / 2)
    close(halved.call(f), case.call(f), "router and temperature halved")


@law("moe.dense_mixture")
def weights_grow_with_their_logit(f: Layer, case: Case, close: Close) -> None:
    """The ratio of two weights is exp of the difference of their logits over the temperature."""
    logits = logits_of(case) / case.kwargs["temperature"]
    if abs(logits).max(initial=0) < 30:
        seen = np.any(case.args[0] != 0, axis=1)
        off = abs(observed_weights(f, case) - _softmax(logits))[seen]
        require(off <= 10 * slack(close), "the weights are not the softmax of the logits")


def _kept(case: Case, f: Layer) -> FloatArray:
    return in_float64(case.call(f))


@law(*TOP_K)
def at_most_k_gates_are_not_zero(f: Layer, case: Case, close: Close) -> None:
    """At most k gates of a token differ from 0, one at least, and none is negative or above 1."""
    gates = _kept(case, f)
    used = (gates != 0).sum(axis=1)
    require((used <= case.kwargs["k"]) & (used >= 1), "a token has no gate, or more than k")
    require((gates >= 0) & (gates <= 1 + slack(close)), "a gate is outside [0, 1]")


@law("moe.top_k", "moe.noisy_top_k")
def renormalized_gates_sum_to_one(f: Layer, case: Case, close: Close) -> None:
    """Gates sum to 1, under "switch" to at most 1 and only with all experts to 1."""
    k, total = case.kwargs["k"], _kept(case, f).sum(axis=1)
    require(total <= 1 + slack(close), "the gates of a token sum to more than 1")
    everyone = k == np.shape(case.args[0] if len(case.args) == 1 else case.args[1])[1]
    if everyone or case.kwargs.get("convention") != "switch":
        require(total >= 1 - slack(close), "the gates of a token sum to less than 1")


@law("moe.top_k")
def conventions_differ_by_the_sum(f: Layer, case: Case, close: Close) -> None:
    """Gates under "switch", divided by their sum, are those under "gshard" and under "mixtral"."""
    switch, gshard, mixtral = (
        _kept(case.replace(convention=name), f) for name in ("switch", "gshard", "mixtral")
    )
    total = switch.sum(axis=1, keepdims=True)
    require(total > 0, 'gates under "switch" sum to 0')
    divided = switch / total
    require(abs(divided - gshard) <= slack(close), '"switch" divided by its sum is not "gshard"')
    require(abs(mixtral - gshard) <= 10 * slack(close), '"mixtral" and "gshard" differ by more than rounding')
    require(switch <= gshard + slack(close), 'a gate under "switch" is above that under "gshard"')


@law("moe.top_k")
def a_constant_on_all_logits_changes_nothing(f: Layer, case: Case, close: Close) -> None:
    """Adding one number to all logits of a token leaves its gates."""
    (logits,) = case.args
    if logits.dtype != np.float64:
        return  # logits that are moved are rounded, and so become other ones
    shift = np.random.default_rng(0).integers(-4, 5, (len(logits), 1)) / 2
    moved = Case((logits + shift,), case.kwargs)
    close.on(moved)(moved.call(f), case.call(f), "logits shifted")


@law("moe.top_k")
def the_largest_logits_are_kept(f: Layer, case: Case, close: Close) -> None:
    """No expert with a gate has a smaller logit than one without; gates grow with logits."""
    logits = in_float64(case.args[0])
    gates, k = _kept(case, f), case.kwargs["k"]
    if logits.size and abs(logits).max() < 30:
        place = (logits[:, None, :] > logits[:, :, None]).sum(axis=2)  # how many logits are larger
        require((gates > 0) == (place < k), "not the k largest logits have gates")
        rising = np.take_along_axis(gates, np.argsort(logits, axis=1), axis=1)
        require(np.diff(rising, axis=1) >= -slack(close), "a larger logit has a smaller gate")


@law("moe.top_k")
def ties_go_to_the_lowest_index(f: Layer, case: Case, close: Close) -> None:
    """Of equal logits those with the lowest index are kept, all with the same gate."""
    (logits,) = case.args
    k, E = case.kwargs["k"], logits.shape[1]
    gates = _kept(Case((np.zeros((2, E)),), case.kwargs), f)
    expected = 1 / E if case.kwargs["convention"] == "switch" else 1 / k
    wanted = np.broadcast_to(np.where(np.arange(E) < k, expected, 0.0), gates.shape)
    require(abs(gates - wanted) <= slack(close), "equal logits: not the first k experts, or not alike")


@law(*TOP_K)
def experts_permute_with_their_columns(f: Layer, case: Case, close: Close) -> None:
    """Permuting the experts' columns permutes the gates."""
    E = case.args[-1].shape[1]
    order = np.random.default_rng(0).permutation(E)
    args = [a if len(case.args) > 1 and index == 0 else a[:, order] for index, a in enumerate(case.args)]
    noise = case.kwargs.get("noise")
    options = {} if noise is None else {"noise": noise[:, order]}
    moved = case.replace(*args, **options)
    close.on(case)(moved.call(f), np.asarray(case.call(f))[:, order], "experts permuted")


@law("moe.noisy_top_k", "moe.noisy_top_k.vmoe")
def no_noise_is_noise_of_zero(f: Layer, case: Case, close: Close) -> None:
    """Without draws the gates are those of draws that are all 0, whatever scales them."""
    still = case.without("noise")
    x, w_router = case.args[:2]
    quiet = case.replace(noise=np.zeros((len(x), w_router.shape[1]), x.dtype))
    close.on(still)(still.call(f), quiet.call(f), "no noise and noise of 0")


@law("moe.noisy_top_k")
def noise_is_scaled_by_softplus(f: Layer, case: Case, close: Close) -> None:
    """With all experts kept, the log-ratio of two gates moves by noise times softplus of the noise router."""
    x, w_router, w_noise = (in_float64(array) for array in case.args)
    noise = in_float64(case.kwargs.get("noise", np.zeros((len(x), w_router.shape[1]))))
    logits = x @ w_router + noise * np.log1p(np.exp(x @ w_noise))
    if abs(logits).max(initial=0) < 30:
        gates = _kept(case.replace(k=w_router.shape[1]), f)
        require(abs(gates - _softmax(logits)) <= 10 * slack(close), "not the softmax of the noisy logits")


@law("moe.noisy_top_k")
def an_unlikely_expert_is_tried_with_enough_noise(f: Layer, case: Case, close: Close) -> None:
    """Noise that lifts one expert far above all others makes it chosen: the choice is of the noisy logits."""
    x, w_router, w_noise = case.args
    flat = np.zeros_like(w_noise)  # softplus(0) = log 2
    noise = np.zeros((len(x), w_router.shape[1]))
    worst = np.argmin(logits_of(case), axis=1)[:, None]
    np.put_along_axis(noise, worst, 5e4, axis=1)  # near the largest number of float16
    loud = Case((x, w_router, flat), {"k": case.kwargs["k"], "noise": round_to(noise, x.dtype)})
    gates = _kept(loud, f)
    require(np.take_along_axis(gates, worst, axis=1) > 1 - slack(close), "the loudest expert is not chosen")


@law("moe.noisy_top_k.vmoe")
def noise_is_in_units_of_one_over_experts(f: Layer, case: Case, close: Close) -> None:
    """Noise of standard deviation s on E experts moves logits by s / E times the draws."""
    logits = logits_of(case)
    E = logits.shape[1]
    logits = logits + case.kwargs["noise_std"] / E * in_float64(
        case.kwargs.get("noise", np.zeros_like(logits))
    )
    if abs(logits).max(initial=0) < 30:
        gates = _kept(case.replace(k=E), f)
        require(abs(gates - _softmax(logits)) <= 10 * slack(close), "not the softmax of the noisy logits")


@law("moe.top_k", "moe.noisy_top_k.vmoe")
def kept_gates_are_not_divided(f: Layer, case: Case, close: Close) -> None:
    """Under "switch", and so in V-MoE, a gate that is kept with k experts is what it is with all of them."""
    case = case.replace(convention="switch") if "convention" in case.kwargs else case
    everyone = _kept(case.replace(k=case.args[-1].shape[1]), f)
    some = _kept(case, f)
    require(np.where(some != 0, abs(some - everyone), 0) <= slack(close), "a kept gate depends on k")
