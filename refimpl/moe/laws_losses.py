"""Laws of the losses of importance and load, and of the coefficients that losses are multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.losses_importance import EPSILON
from refimpl.numerics import Array, FloatArray
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Loss = Callable[..., Any]


def only_in_float64(case: Case) -> None:
    """Refuse narrower formats: the inputs that a law makes would be rounded, and the claim be of others."""
    if case.args[0].dtype != np.float64:
        raise NotImplementedError("the inputs that this law makes are exact in float64 alone")


def _turned(array: Array) -> Array:
    """Return the rows once for every rotation of the experts: whatever they hold, experts are alike."""
    rotations = range(array.shape[1])
    return np.concatenate([np.roll(array, shift, axis=1) for shift in rotations])


def _variation(amounts: FloatArray, kind: str) -> float:
    """Return the squared coefficient of variation of amounts that are not all 0, as `kind` has it."""
    if len(amounts) == 1:
        return 0.0
    divisor = len(amounts) - 1 if kind == "davidmrau" else len(amounts)
    spread = float(np.sum((amounts - amounts.mean()) ** 2)) / divisor
    return spread / (float(amounts.mean()) ** 2 + (0.0 if kind == "shazeer" else EPSILON))


@law("moe.importance_loss")
def equal_importance_costs_nothing(f: Loss, case: Case, close: Close) -> None:
    """Gates and all their rotations over the experts give every expert the same: the loss is 0."""
    fair = case.replace(_turned(case.args[0]))
    close.on(fair)(fair.call(f), 0.0, "loss of equal importances")


@law("moe.importance_loss")
def a_single_expert_costs_most(f: Loss, case: Case, close: Close) -> None:
    """One expert with every gate costs E - 1, or E with the unbiased variance."""
    T, E = case.args[0].shape
    if not T:
        return
    alone = case.replace(np.eye(E)[np.zeros(T, int)])
    expected = _variation(T * np.eye(E)[0], case.kwargs["variation"])
    close.on(alone)(alone.call(f), expected, "loss of one expert with everything")


@law("moe.importance_loss")
def only_the_sums_of_gates_count(f: Loss, case: Case, close: Close) -> None:
    """One token with the sum of all gates, and the rest with none, costs the same."""
    only_in_float64(case)
    gates = case.args[0]
    if not len(gates):
        return
    heaped = np.zeros_like(gates)
    heaped[0] = gates.sum(axis=0)
    close(case.replace(heaped).call(f), case.call(f), "loss of the summed gates")


@law("moe.importance_loss")
def importance_is_relative(f: Loss, case: Case, close: Close) -> None:
    """Four times the gates cost the same, where nothing is added to the mean."""
    if case.kwargs["variation"] == "shazeer":
        close(case.replace(4 * case.args[0]).call(f), case.call(f), "loss of four times the gates")


@law(
    "moe.importance_loss",
    "moe.load_loss",
    "moe.mutual_information_loss",
    "moe.z_loss",
    "moe.balance_loss.skywork",
)
def losses_do_not_know_experts_by_name(f: Loss, case: Case, close: Close) -> None:
    """Experts in reverse order cost the same."""
    close(
        case.replace(*(array[:, ::-1].copy() for array in case.args)).call(f),
        case.call(f),
        "experts reversed",
    )


@law("moe.balance_loss.skywork")
def it_is_importance_over_experts(f: Loss, case: Case, close: Close) -> None:
    """For gates that sum to 1 the loss is the importances' squared coefficient of variation over E."""
    only_in_float64(case)
    gates = case.args[0]
    T, E = gates.shape
    if T:
        summed = case.replace(gates / gates.sum(axis=1, keepdims=True))
        expected = _variation(summed.args[0].sum(axis=0), "shazeer") / E
        close.on(summed)(summed.call(f), expected, "loss of gates that sum to 1")


@law("moe.balance_loss.skywork")
def a_gate_counts_by_its_mean(f: Loss, case: Case, close: Close) -> None:
    """Gates of nothing cost 1/E, and one expert with everything 1 - 1/E."""
    T, E = case.args[0].shape
    for gates, expected in ((np.zeros((T, E)), 1 / E), (np.eye(E)[np.zeros(T, int)], 1 - 1 / E)):
        fixed = case.replace(gates)
        close.on(fixed)(fixed.call(f), expected if T else 0.0, "loss of fixed gates")


@law("moe.load_loss")
def equal_loads_cost_nothing(f: Loss, case: Case, close: Close) -> None:
    """Tokens and all their rotations over the experts load every expert alike: the loss is 0."""
    fair = case.replace(*map(_turned, case.args))
    close.on(fair)(fair.call(f), 0.0, "loss of equal loads")


@law("moe.load_loss")
def load_is_relative(f: Loss, case: Case, close: Close) -> None:
    """A number added to all logits, and twice the logits and their noise, change no probability."""
    only_in_float64(case)
    clean, noisy, std = case.args
    moved = case.replace(2 * clean + 1, 2 * noisy + 1, 2 * std)
    close.on(moved)(moved.call(f), case.call(f), "loss after a shift and a scale", factor=4.0)


@law("moe.load_loss")
def little_noise_counts_tokens(f: Loss, case: Case, close: Close) -> None:
    """With hardly any noise a load is the count of tokens in whose top k an expert is ("shazeer").

    The k-th logit itself is its threshold in V-MoE's form, and counts half.
    """
    k, (T, E) = case.kwargs["k"], case.args[0].shape
    distinct = (np.argsort(case.args[0], axis=1) + np.arange(T)[:, None]) % E  # gaps of 1
    quiet = case.replace(distinct.astype(float), distinct.astype(float), np.full((T, E), 1e-3))
    weights = (distinct >= E - k).astype(float)
    if case.kwargs["threshold"] == "vmoe":
        weights[distinct == E - k] = 0.5
    expected = _variation(weights.sum(axis=0), case.kwargs["variation"]) if T else 0.0
    close.on(quiet)(quiet.call(f), expected, "loss of counted loads")


@law("moe.load_loss")
def only_the_own_noise_is_drawn_again(f: Loss, case: Case, close: Close) -> None:
    """With hardly any noise an expert is in if its clean logit beats the k-th noisy one of its rivals."""
    k, threshold, (T, E) = case.kwargs["k"], case.kwargs["threshold"], case.args[0].shape
    noisy = np.argsort(case.args[0], axis=1)[:, ::-1].astype(float)
    clean = (noisy * 3 + np.arange(T)[:, None]) % E + 0.5
    load = np.zeros(E)
    for t in range(T):
        for e in range(E):
            rivals = np.sort(noisy[t] if threshold == "vmoe" else np.delete(noisy[t], e))[::-1]
            load[e] += len(rivals) < k or clean[t, e] > rivals[k - 1]
    if load.any():
        quiet = case.replace(clean, noisy, np.full((T, E), 1e-3))
        close.on(quiet)(quiet.call(f), _variation(load, case.kwargs["variation"]), "loss of counted loads")


@law("moe.load_loss")
def certain_experts_have_equal_loads(f: Loss, case: Case, close: Close) -> None:
    """If all experts are selected the loss is 0: no noise can take one out ("shazeer")."""
    if case.kwargs["threshold"] == "shazeer":
        everything = case.replace(k=case.args[0].shape[1])
        close(everything.call(f), 0.0, "loss of selecting all experts")


@law("moe.loss_coefficients")
def deepseek_changes_its_coefficient_with_size(f: Loss, case: Case, close: object) -> None:  # noqa: ARG001
    """DeepSeekMoE weighs its expert loss 0.01 at 2B, 0.001 at 16B and 0.003 at 145B."""
    found = [float(f(model=f"deepseekmoe-{size}").expert) for size in ("2b", "16b", "145b")]
    require(found == [0.01, 0.001, 0.003], f"the coefficients are {found}")


@law("moe.loss_coefficients")
def vision_weighs_its_losses_a_twentieth(f: Loss, case: Case, close: object) -> None:  # noqa: ARG001
    """V-MoE halves 0.01 between importance and load, where Shazeer et al. have 0.1 for each."""
    for model, each in (("shazeer", 0.1), ("v-moe", 0.005)):
        found = f(model=model)
        require((found.importance, found.load) == (each, each), f"{model}: {found.importance}, {found.load}")


@law("moe.loss_coefficients")
def devices_are_balanced_where_there_are_several(f: Loss, case: Case, close: object) -> None:  # noqa: ARG001
    """Only models with experts on several devices have a device loss; it weighs more than the experts'."""
    found = f(model=case.kwargs["model"])
    spread = case.kwargs["model"] in ("deepseekmoe-145b", "deepseek-v2")
    require((found.device > 0) == spread, f"{case.kwargs['model']}: device loss {found.device}")
    require(
        not spread or found.device > found.expert, f"device loss {found.device}, expert loss {found.expert}"
    )


@law("moe.loss_coefficients")
def a_model_has_one_kind_of_balance(f: Loss, case: Case, close: object) -> None:  # noqa: ARG001
    """A model has importance and load losses, or a balance loss, or an expert loss."""
    found = f(model=case.kwargs["model"])
    require((found.importance > 0) == (found.load > 0), "importance and load go together")
    kinds = [found.importance > 0, found.balance > 0, found.expert > 0]
    require(sum(kinds) == 1, f"{case.kwargs['model']} has {sum(kinds)} kinds of balance")
