"""Laws of the losses of logits: z-loss, mutual information, and Skywork-MoE's normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.laws_losses import only_in_float64
from refimpl.numerics import FloatArray
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Loss = Callable[..., Any]
# A gate this sure is one-hot in float64.
SURE = 1000.0


def _sure(experts: FloatArray, E: int) -> FloatArray:
    """Return logits whose softmax is one-hot at the given expert of each token."""
    return np.asarray(SURE * np.eye(E)[experts.astype(int)])


def _count(case: Case) -> int:
    """Return how many tokens count in the mean."""
    here = case.kwargs.get("counted")
    return len(case.args[0]) if here is None else int(here.sum())


@law("moe.z_loss")
def zero_logits_cost_log_experts_squared(f: Loss, case: Case, close: Close) -> None:
    """Logits of 0 cost (log E)², in flaxformer for padding too."""
    logits = case.args[0]
    if not len(logits) or (not _count(case) and case.kwargs.get("padding") != "flaxformer"):
        return
    zero = case.replace(np.zeros_like(logits))
    close.on(zero)(zero.call(f), np.log(logits.shape[1]) ** 2, "loss of zero logits")


@law("moe.z_loss")
def a_shift_costs_its_square(f: Loss, case: Case, close: Close) -> None:
    """Shifts of c both ways cost 2 c² more than twice the loss: a mean of squared logsumexps."""
    only_in_float64(case)
    logits = case.args[0]
    if not _count(case):
        return
    up, down = (case.replace(logits + c) for c in (3.0, -3.0))
    of_all = case.kwargs.get("padding") == "flaxformer"
    share = _count(case) / len(logits) if of_all else 1.0
    both = (float(up.call(f)) + float(down.call(f))) / 2 - share * 9.0
    close.on(up)(both, case.call(f), "loss of both shifts", factor=2.0)


@law("moe.z_loss")
def logits_that_are_log_probabilities_cost_nothing(f: Loss, case: Case, close: Close) -> None:
    """Shifted to a logsumexp of 0, which is where a shift costs least, logits cost nothing."""
    only_in_float64(case)
    logits = case.args[0]
    if case.kwargs.get("counted") is not None:
        return
    lse = np.logaddexp.reduce(logits, axis=1, keepdims=True)
    close(case.replace(logits - lse).call(f), 0.0, "loss of log-probabilities")


@law("moe.mutual_information_loss")
def information_lies_between_nothing_and_log_experts(f: Loss, case: Case, close: Close) -> None:
    """The loss is at most 0, at least -log E, and at least -log T: T tokens need no more experts."""
    T, E = case.args[0].shape
    found = float(case.call(f))
    # ModuleFormer's 1e-8 in the logarithm adds up to 1e-8 for each expert.
    room = 2 * close.tolerance + E * 1e-8 * (case.kwargs["marginal"] == "moduleformer")
    least = -float(np.log(max(min(T, E), 1)))
    require(least - room <= found <= room, f"loss {found} of {T} tokens and {E} experts")


@law("moe.mutual_information_loss")
def a_gate_that_ignores_the_token_has_no_information(f: Loss, case: Case, close: Close) -> None:
    """If all tokens have the same gate the loss is 0, less what is added inside the logarithm."""
    logits = case.args[0]
    if not len(logits):
        return
    same = case.replace(np.repeat(logits[:1], len(logits), axis=0))
    log_p = logits[0] - np.logaddexp.reduce(logits[0])
    epsilon = 1e-8 if case.kwargs["marginal"] == "moduleformer" else 0.0
    added = np.logaddexp(log_p, np.log(epsilon)) - log_p if epsilon else np.zeros_like(log_p)
    close.on(same)(same.call(f), float(np.sum(np.exp(log_p) * added)), "loss of equal gates")


@law("moe.mutual_information_loss")
def sure_and_balanced_gates_are_worth_log_experts(f: Loss, case: Case, close: Close) -> None:
    """Sure gates of all experts in turn cost -log E; the marginal's 1e-8 takes E times as much off."""
    E = case.args[0].shape[1]
    best = case.replace(_sure(np.arange(2 * E) % E, E))
    added = np.log1p(1e-8 * E) if case.kwargs["marginal"] == "moduleformer" else 0.0
    close.on(best)(best.call(f), -np.log(E) + added, "loss of sure and balanced gates")


@law("moe.mutual_information_loss", "moe.mutual_information_loss.tasks")
def a_softmax_sees_no_shift(f: Loss, case: Case, close: Close) -> None:
    """A number added to all logits of a token changes nothing."""
    only_in_float64(case)
    logits, *rest = case.args
    moved = case.replace(logits + (np.arange(len(logits)) % 5)[:, None], *rest)
    close.on(moved)(moved.call(f), case.call(f), "loss after a shift", factor=2.0)


@law("moe.mutual_information_loss", "moe.mutual_information_loss.tasks")
def twice_the_batch_costs_the_same(f: Loss, case: Case, close: Close) -> None:
    """Every token twice changes nothing: the loss is of a distribution."""
    only_in_float64(case)
    close(
        case.map_arrays(lambda array: np.concatenate([array, array])).call(f),
        case.call(f),
        "every token twice",
    )


@law("moe.mutual_information_loss.tasks")
def experts_of_their_own_tell_tasks_apart(f: Loss, case: Case, close: Close) -> None:
    """An expert for each task costs minus the entropy of the tasks, and sharing all costs nothing."""
    only_in_float64(case)
    logits, tasks = case.args
    E = logits.shape[1]
    known, counts = np.unique(tasks, return_counts=True)
    if not len(known) or len(known) > E:
        return
    shares = (
        counts / counts.sum()
        if case.kwargs["task_weights"] == "frequency"
        else np.full(len(known), 1 / len(known))
    )
    apart = case.replace(_sure(np.searchsorted(known, tasks), E), tasks)
    close.on(apart)(apart.call(f), float(np.sum(shares * np.log(shares))), "an expert for each task")
    shared = case.replace(np.repeat(logits[:1], len(logits), axis=0), tasks)
    close.on(shared)(shared.call(f), 0.0, "the same gates for all tasks")


@law("moe.mutual_information_loss.tasks")
def only_the_mean_gate_of_a_task_counts(f: Loss, case: Case, close: Close) -> None:
    """The mean gate of a task, as the gate of all of its tokens, costs the same."""
    only_in_float64(case)
    logits, tasks = case.args
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    means = np.array([p[tasks == task].mean(axis=0) for task in tasks]).reshape(logits.shape)
    if np.any(means < 1e-12):
        return  # the logarithm of a gate of 0 is no logit
    alike = case.replace(np.log(means), tasks)
    close.on(alike)(alike.call(f), case.call(f), "loss of mean gates", factor=2.0)


@law("moe.mutual_information_loss.tasks")
def tasks_are_not_known_by_name(f: Loss, case: Case, close: Close) -> None:
    """Renumbering the tasks changes nothing."""
    logits, tasks = case.args
    close(case.replace(logits, 7 - 3 * tasks).call(f), case.call(f), "loss with other numbers of the tasks")


@law("moe.logit_normalization")
def normalized_logits_have_mean_0_and_deviation_lambda(f: Loss, case: Case, close: Close) -> None:
    """Each token's results have mean 0 and a mean square of λ², unless its logits are equal."""
    logits = case.args[0]
    found = np.asarray(case.call(f), np.float64)
    close(found.mean(axis=1), np.zeros(len(logits)), "mean")
    flat = np.all(logits == logits[:, :1], axis=1)
    square = np.where(flat, 0.0, case.kwargs["temperature"] ** 2)
    close((found**2).mean(axis=1), square, "mean square", factor=8.0)


@law("moe.logit_normalization")
def normalization_takes_scale_and_shift_away(f: Loss, case: Case, close: Close) -> None:
    """Four times the logits, plus a number, are normalised to the same; the order of experts stays."""
    moved = case.replace(4 * case.args[0] + 2)
    close.on(moved)(moved.call(f), case.call(f), "normalised logits", factor=4.0)
    order = np.argsort(case.args[0], axis=1)
    sorted_ = np.take_along_axis(np.asarray(case.call(f)), order, axis=1)
    require(bool(np.all(np.diff(sorted_, axis=1) >= 0)), "the order of experts changed")


@law("moe.adaptive_coefficient")
def a_coefficient_settles_at_its_target(f: Loss, case: Case, close: Close) -> None:
    """A coefficient at min(ξ d, α_max) stays there, and any other goes a hundredth of the way."""
    only_in_float64(case)
    coefficient, rate = case.args
    target = np.minimum(rate / 5, 0.01)
    settled = case.replace(target, rate)
    close.on(settled)(settled.call(f), target, "a settled coefficient")
    step = np.asarray(case.call(f)) - coefficient
    close(100 * step, target - coefficient, "a hundred steps of the same size", factor=200.0)


@law("moe.adaptive_coefficient")
def layers_adapt_on_their_own(f: Loss, case: Case, close: Close) -> None:
    """Each layer adapts to its own drop rate."""
    pairs = zip(*case.args, strict=True)
    alone = [case.replace(np.array([a]), np.array([d])).call(f) for a, d in pairs]
    close(np.concatenate([np.zeros(0), *alone]), case.call(f), "layers one by one")
