"""Laws of the losses that balance experts: importance, load, shares of tokens, devices."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.moe.losses_importance import EPSILON
from refimpl.numerics import Array, FloatArray
from refimpl.registry import Case, law
from refimpl.testing import Close

Loss = Callable[..., Any]
BALANCE = ("moe.balance_loss", "moe.device_balance_loss.expert", "moe.device_balance_loss")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise LawViolation(message)


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


@law("moe.importance_loss", "moe.load_loss", "moe.mutual_information_loss", "moe.z_loss")
def losses_do_not_know_experts_by_name(f: Loss, case: Case, close: Close) -> None:
    """Experts in reverse order cost the same."""
    close(
        case.replace(*(array[:, ::-1].copy() for array in case.args)).call(f),
        case.call(f),
        "experts reversed",
    )


@law("moe.load_loss")
def equal_loads_cost_nothing(f: Loss, case: Case, close: Close) -> None:
    """Tokens and all their rotations over the experts load every expert alike: the loss is 0."""
    fair = case.replace(*map(_turned, case.args))
    close.on(fair)(fair.call(f), 0.0, "loss of equal loads")


@law("moe.load_loss")
def load_is_relative(f: Loss, case: Case, close: Close) -> None:
    """A number added to all logits, and twice the logits and their noise, change no probability."""
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


def _per_choice(case: Case) -> float:
    """Return what uniform probabilities cost: 1, K if all choices count, or 1/E² as GShard prints it."""
    E, K = case.args[0].shape[1], case.args[1].shape[1]
    scale = {"gshard": 1 / E**2, "flaxformer": K}
    return float(scale.get(str(case.kwargs.get("normalization")), 1.0))


def _counted(case: Case) -> Array:
    """Return the share of routing groups in which a token counts."""
    tokens = len(case.args[0])
    here = case.kwargs.get("counted")
    here = np.ones(tokens, bool) if here is None else here
    return np.asarray(np.any(here.reshape(case.kwargs.get("groups", 1), -1), axis=1))


@law(*BALANCE)
def uniform_probabilities_cost_one(f: Loss, case: Case, close: Close) -> None:
    """Uniform probabilities cost 1 whatever is selected; K where all choices count; 1/E² as GShard prints."""
    probabilities, selected = case.args
    uniform = case.replace(np.full_like(probabilities, 1 / probabilities.shape[1]), selected)
    full = float(np.mean(_counted(case))) if len(probabilities) else 0.0
    close.on(uniform)(uniform.call(f), full * _per_choice(case), "loss of uniform probabilities")


@law("moe.balance_loss", "moe.device_balance_loss.expert")
def everything_on_one_expert_costs_their_number(f: Loss, case: Case, close: Close) -> None:
    """If every token goes to one expert, with probability 1, the loss is E times that of balance."""
    T, E = case.args[0].shape
    alone = case.replace(np.eye(E)[np.zeros(T, int)], np.zeros((T, 1), int))
    full = float(np.mean(_counted(case))) if T else 0.0
    close.on(alone)(alone.call(f), full * E * _per_choice(alone), "loss of one expert for all")


@law(*BALANCE, "moe.device_balance_loss.communication")
def balance_is_linear_in_probabilities(f: Loss, case: Case, close: Close) -> None:
    """The shares f are constants: half the probabilities and half of others cost half of each."""
    probabilities, selected = case.args
    other = np.roll(probabilities, 1, axis=1)
    mixed = case.replace((probabilities + other) / 2, selected)
    halves = (float(case.call(f)) + float(case.replace(other, selected).call(f))) / 2
    close(mixed.call(f), halves, "loss of a mixture of probabilities", factor=2.0)


@law(*BALANCE, "moe.device_balance_loss.communication")
def experts_may_be_renumbered(f: Loss, case: Case, close: Close) -> None:
    """Experts in another order, in probabilities, choices and placement alike, cost the same."""
    probabilities, selected = case.args
    E = probabilities.shape[1]
    options = {"device_of": case.kwargs["device_of"][::-1].copy()} if "device_of" in case.kwargs else {}
    renamed = case.replace(probabilities[:, ::-1].copy(), E - 1 - selected, **options)
    close(renamed.call(f), case.call(f), "loss after renumbering the experts")


@law("moe.balance_loss")
def groups_are_averaged(f: Loss, case: Case, close: Close) -> None:
    """The loss of several routing groups is the mean of their losses: not that of one large group."""
    groups = case.kwargs.get("groups", 1)
    size = len(case.args[0]) // groups
    single = case.without("groups")
    parts = []
    for g in range(groups):
        take = itemgetter(slice(g * size, (g + 1) * size))
        parts.append(float(single.map_arrays(take).call(f)))
    close(case.call(f), np.mean(parts), "loss of the groups")


@law("moe.balance_loss", "moe.z_loss")
def padding_is_not_counted(f: Loss, case: Case, close: Close) -> None:
    """What stands in a padding token changes nothing."""
    here = case.kwargs.get("counted")
    if here is None:
        return
    args = [array.copy() for array in case.args]
    args[0][~here] = 1 / args[0].shape[1]
    if len(args) > 1:
        args[1][~here] = np.arange(args[1].shape[1])
    close(case.replace(*args).call(f), case.call(f), "loss after other padding")


@law("moe.balance_loss", "moe.device_balance_loss.expert")
def choices_after_the_first(f: Loss, case: Case, close: Close) -> None:
    """The order of a token's choices matters only where first choices alone are counted."""
    probabilities, selected = case.args
    if case.kwargs.get("normalization", "flaxformer") == "flaxformer":
        turned = case.replace(probabilities, selected[:, ::-1].copy())
        close(turned.call(f), case.call(f), "loss after reversing each token's choices")
    else:
        first = case.replace(probabilities, selected[:, :1].copy())
        close(first.call(f), case.call(f), "loss of first choices")


@law("moe.device_balance_loss")
def a_device_for_each_expert(f: Loss, case: Case, close: Close) -> None:
    """With one expert a device the loss is Σ f_i P_i, and with one device Σ P_i: the mean f is 1."""
    probabilities, selected = case.args
    T, E = probabilities.shape
    if not T:
        return
    f_i = np.bincount(selected.reshape(-1), minlength=E) * E / selected.size
    each = case.replace(device_of=np.arange(E))
    close.on(each)(each.call(f), float(f_i @ probabilities.mean(axis=0)), "loss with one expert a device")
    one = case.replace(device_of=np.zeros(E, int))
    close.on(one)(one.call(f), float(probabilities.mean(axis=0).sum()), "loss with one device")


@law("moe.device_balance_loss.communication")
def a_token_is_sent_to_a_device_once(f: Loss, case: Case, close: Close) -> None:
    """With one device every token is sent there once, whatever it selects: the loss is Σ P / M."""
    probabilities, _ = case.args
    T, E = probabilities.shape
    one = case.replace(device_of=np.zeros(E, int))
    total: FloatArray = probabilities.sum(axis=1)
    expected = float(total.mean()) / case.kwargs["device_limit"] if T else 0.0
    close.on(one)(one.call(f), expected, "loss with one device")
    twice = case.replace(device_limit=2 * case.kwargs["device_limit"])
    close(2 * float(twice.call(f)), case.call(f), "loss at twice the limit of devices")


@law("moe.loss_coefficients")
def deepseek_changes_its_coefficient_with_size(f: Loss, case: Case, close: object) -> None:  # noqa: ARG001
    """DeepSeekMoE weighs its expert loss 0.01 at 2B, 0.001 at 16B and 0.003 at 145B."""
    found = [float(f(model=f"deepseekmoe-{size}").expert) for size in ("2b", "16b", "145b")]
    _require(found == [0.01, 0.001, 0.003], f"the coefficients are {found}")


@law("moe.loss_coefficients")
def devices_are_balanced_where_there_are_several(f: Loss, case: Case, close: object) -> None:  # noqa: ARG001
    """Only models with experts on several devices have a device loss; it weighs more than the experts'."""
    found = f(model=case.kwargs["model"])
    spread = case.kwargs["model"] in ("deepseekmoe-145b", "deepseek-v2")
    _require((found.device > 0) == spread, f"{case.kwargs['model']}: device loss {found.device}")
    _require(
        not spread or found.device > found.expert, f"device loss {found.device}, expert loss {found.expert}"
    )


@law("moe.loss_coefficients")
def a_model_has_one_kind_of_balance(f: Loss, case: Case, close: object) -> None:  # noqa: ARG001
    """A model has importance and load losses, or a balance loss, or an expert loss."""
    found = f(model=case.kwargs["model"])
    _require((found.importance > 0) == (found.load > 0), "importance and load go together")
    kinds = [found.importance > 0, found.balance > 0, found.expert > 0]
    _require(sum(kinds) == 1, f"{case.kwargs['model']} has {sum(kinds)} kinds of balance")
