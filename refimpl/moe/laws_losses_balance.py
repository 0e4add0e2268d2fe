"""Laws of the losses that balance experts by shares of tokens: of GShard, Switch, DeepSeek."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np

from refimpl.moe.laws_losses import only_in_float64
from refimpl.numerics import Array, FloatArray
from refimpl.registry import Case, law
from refimpl.testing import Close

Loss = Callable[..., Any]
BALANCE = ("moe.balance_loss", "moe.device_balance_loss.expert", "moe.device_balance_loss")


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
    only_in_float64(case)
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
    only_in_float64(case)
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
    only_in_float64(case)
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
    only_in_float64(case)
    probabilities, _ = case.args
    T, E = probabilities.shape
    one = case.replace(device_of=np.zeros(E, int))
    total: FloatArray = probabilities.sum(axis=1)
    expected = float(total.mean()) / case.kwargs["device_limit"] if T else 0.0
    close.on(one)(one.call(f), expected, "loss with one device")
    twice = case.replace(device_limit=2 * case.kwargs["device_limit"])
    close(2 * float(twice.call(f)), case.call(f), "loss at twice the limit of devices")
