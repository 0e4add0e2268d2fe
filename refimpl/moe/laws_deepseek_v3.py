"""Laws of DeepSeek-V3's router: what the bias moves and what it does not, groups, sums, ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.laws_gating import slack
from refimpl.numerics import BoolArray, FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Router = Callable[..., Any]


def _gates(f: Router, case: Case) -> FloatArray:
    return in_float64(case.call(f))


def _biased(case: Case) -> FloatArray:
    """Return the scores that choose."""
    logits, bias = (in_float64(array) for array in case.args)
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-logits)) + bias)


def _groups_used(gates: FloatArray, groups: int) -> BoolArray:
    return np.asarray((gates.reshape(len(gates), groups, gates.shape[1] // groups) > 0).any(axis=2))


@law("moe.deepseek_v3")
def gates_sum_to_the_scale(f: Router, case: Case, close: Close) -> None:
    """No gate is negative and those of a token sum to the scale, however small its scores are."""
    logits, bias = case.args
    for one in (case, case.replace(round_to(np.full(logits.shape, -2000.0), logits.dtype), bias)):
        gates, scale = _gates(f, one), case.kwargs["scale"]
        require(gates >= 0, "a gate is negative")
        require(abs(gates.sum(axis=1) - scale) <= scale * slack(close), "gates do not sum to the scale")


@law("moe.deepseek_v3")
def few_groups_are_entered(f: Router, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token has at most k experts, in at most the given number of groups."""
    gates, options = _gates(f, case), case.kwargs
    require((gates > 0).sum(axis=1) <= options["k"], "more than k experts")
    used = _groups_used(gates, options["groups"]).sum(axis=1)
    require(used <= options["top_groups"], "a token goes to more groups than it may")


@law("moe.deepseek_v3")
def the_best_of_the_entered_groups_are_taken(f: Router, case: Case, close: Close) -> None:
    """With all groups open the k best biased scores are taken; with fewer the best of those entered."""
    if close.dtype != "float64":
        return  # scores that rounding ties are taken by index
    groups, k = case.kwargs["groups"], case.kwargs["k"]
    for one in (case, case.replace(top_groups=groups)):
        gates, scores = _gates(f, one), _biased(case)
        if abs(in_float64(case.args[0])).max(initial=0) > 30:
            continue  # a gate may vanish, and is not seen
        entered = _groups_used(gates, groups) | (one.kwargs["top_groups"] == groups)
        inside = np.repeat(entered, gates.shape[1] // groups, axis=1)
        better = (inside[:, None, :] & (scores[:, None, :] > scores[:, :, None])).sum(axis=2)
        require((gates > 0) == (inside & (better < k)), "not the best biased scores of the groups")


@law("moe.deepseek_v3")
def groups_are_entered_by_their_best_experts(f: Router, case: Case, close: Close) -> None:
    """Of two groups the one with the higher sum of its two best biased scores is entered, if one may be."""
    groups, E = case.kwargs["groups"], case.args[0].shape[1]
    if groups == 1 or close.dtype != "float64" or abs(in_float64(case.args[0])).max(initial=0) > 30:
        return
    inside = np.sort(_biased(case).reshape(len(case.args[0]), groups, E // groups), axis=2)
    best = inside[..., -2:].sum(axis=2).argmax(axis=1)
    gates = _gates(f, case.replace(top_groups=1, k=1))
    require(_groups_used(gates, groups).argmax(axis=1) == best, "another group than the best is entered")


@law("moe.deepseek_v3")
def a_bias_chooses_and_never_weighs(f: Router, case: Case, close: Close) -> None:
    """One number more on every bias changes nothing; kept gates stand as the sigmoids of their logits."""
    logits, bias = case.args
    gates = case.call(f)
    if close.dtype == "float64":
        moved = case.replace(logits, bias - 0.75)
        close.on(moved)(moved.call(f), gates, "every bias moved")
    logs = in_float64(logits)
    if abs(logs).max(initial=0) < 30:
        scores, given = 1 / (1 + np.exp(-logs)), in_float64(gates)
        kept = np.where(given > 0, scores, 0)
        share = case.kwargs["scale"] * kept / np.maximum(kept.sum(axis=1, keepdims=True), 1e-300)
        require(abs(share - given) <= 10 * case.kwargs["scale"] * slack(close), "no shares of scores")


@law("moe.deepseek_v3")
def negative_scores_stay_in_their_groups(f: Router, case: Case, close: Close) -> None:  # noqa: ARG001
    """A closed group is closed even where every biased score is negative."""
    logits, bias = case.args
    low = case.replace(logits, round_to(in_float64(bias) - 16.0, bias.dtype))
    used = _groups_used(_gates(f, low), case.kwargs["groups"]).sum(axis=1)
    require(used <= case.kwargs["top_groups"], "a closed group is entered where all scores are negative")


@law("moe.deepseek_v3")
def ties_go_to_the_first_group_and_its_first_experts(f: Router, case: Case, close: Close) -> None:
    """Where all scores are equal the first k experts share the scale alike."""
    logits, bias = case.args
    k = case.kwargs["k"]
    gates = _gates(f, case.replace(np.zeros_like(logits), np.zeros_like(bias)))
    expected = np.where(np.arange(gates.shape[1]) < k, case.kwargs["scale"] / k, 0.0)
    require(abs(gates - expected) <= case.kwargs["scale"] * slack(close), "not the first k, or not alike")


@law("moe.deepseek_v3.bias")
def overloaded_experts_sink_by_one_step(f: Router, case: Case, close: Close) -> None:
    """A bias moves by the speed, against the sign of its load's excess over the mean."""
    bias, load = case.args
    step = case.kwargs["speed"] * np.sign(load.mean() - load)
    close(case.call(f), round_to(in_float64(bias) + step, bias.dtype), "a step")


@law("moe.deepseek_v3.bias")
def an_even_load_moves_nothing(f: Router, case: Case, close: Close) -> None:  # noqa: ARG001
    """Where all experts have the same load the bias stays, to the bit."""
    bias, load = case.args
    even = in_float64(case.replace(bias, np.full_like(load, 7)).call(f))
    require(even == in_float64(bias), "an even load moved a bias")


@law("moe.deepseek_v3.bias")
def only_the_sign_of_an_excess_counts(f: Router, case: Case, close: Close) -> None:  # noqa: ARG001
    """A hundred times the load is the same step."""
    bias, load = case.args
    many = in_float64(case.replace(bias, 100 * load).call(f))
    require(many == in_float64(case.call(f)), "the size of an excess counts")
