"""Laws of hard-concrete masks, of the penalty for a target structure, and of shares of domains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
DOMAINS = ("prune.dynamic_batch_loading", "prune.dynamic_batch_loading.released")


def _like(array: Any, case: Case) -> Any:
    return round_to(np.asarray(array, np.float64), case.args[0].dtype)


# Hard-concrete masks


@law("prune.hard_concrete")
def masks_lie_in_the_unit_interval(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A mask is 0 to 1, and both ends are reached by draws near 0 and near 1."""
    z = in_float64(case.call(f))
    require((z >= 0) & (z <= 1), "a mask outside [0, 1]")
    ends = case.replace(_like([0.0, 0.0], case), _like([2.0**-7, 1 - 2.0**-7], case)).call(f)
    require(in_float64(ends) == [0, 1], f"draws at the ends give {in_float64(ends)}")


@law("prune.hard_concrete")
def masks_grow_with_alpha_and_draw(f: Function, case: Case, close: Close) -> None:
    """A larger log alpha, or a larger draw, never gives a smaller mask."""
    log_alpha, u = case.args
    z = in_float64(case.call(f))
    room = 2 * close.tolerance
    for other in (
        case.replace(_like(in_float64(log_alpha) + 1, case), u),
        case.replace(log_alpha, _like((in_float64(u) + 1) / 2, case)),
    ):
        require(in_float64(other.call(f)) >= z - room, "a mask falls")


@law("prune.hard_concrete")
def open_and_closed_mirror(f: Function, case: Case, close: Close) -> None:
    """With log alpha negated and the draw 1 - u the mask is 1 - z."""
    log_alpha, u = case.args
    u = _like(np.clip(in_float64(u), 2.0**-6, 1 - 2.0**-6), case)
    turned = case.replace(-log_alpha, _like(1 - in_float64(u), case))
    straight = case.replace(log_alpha, u)
    if np.all(in_float64(turned.args[1]) == 1 - in_float64(u)):
        close.on(straight)(
            1 - in_float64(turned.call(f)), in_float64(straight.call(f)), "the mirrored mask", factor=4.0
        )


@law("prune.hard_concrete")
def as_often_open_as_it_says(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Over evenly spread draws the share of masks that are not 0 is the closed form's probability."""
    draws = (np.arange(4096) + 0.5) / 4096
    for log_alpha in (-2.0, 0.0, 1.0):
        # The draw at which the stretched number crosses 0: σ((log u/(1-u) + log α) β⁻¹) = γ / (γ - ζ).
        truth = 1 / (1 + np.exp(-(log_alpha - (2 / 3) * np.log(0.1 / 1.1))))
        z = in_float64(case.replace(_like(np.full(4096, log_alpha), case), _like(draws, case)).call(f))
        room = 1e-2 if case.args[0].dtype.itemsize < 4 else 1e-3
        require(abs(np.mean(z > 0) - truth) < room, f"log alpha {log_alpha}: {np.mean(z > 0)} of {truth}")


@law("prune.hard_concrete.open")
def probability_grows_from_0_to_1(f: Function, case: Case, close: Close) -> None:
    """The probability is monotone, near 0 far to the left and near 1 far to the right."""
    (log_alpha,) = case.args
    ends = in_float64(case.replace(_like([-100.0, 100.0], case)).call(f))
    require((ends[0] < 0.06, ends[1] > 0.99), f"ends {ends}")
    more = in_float64(case.replace(_like(in_float64(log_alpha) + 1, case)).call(f))
    require(more >= in_float64(case.call(f)) - 2 * close.tolerance, "the probability falls")


@law("prune.hard_concrete.open")
def half_open_where_it_should_be(f: Function, case: Case, close: Close) -> None:
    """It is 1/2 where log alpha is β log(-γ / ζ), and mirrors about that point."""
    center = (2 / 3) * np.log(0.1 / 1.1)
    steps = np.array([0.0, 0.25, 0.5, 1.0])
    right = case.replace(_like(center + steps, case))
    left = case.replace(_like(center - steps, case))
    total = in_float64(right.call(f)) + in_float64(left.call(f))
    room = 2.0 if case.args[0].dtype == np.float64 else 64.0
    close.on(right)(total, np.ones(4), "the two sides", factor=room)


# The penalty


@law("prune.target_structure")
def met_targets_cost_nothing(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """At its target a sparsity costs 0, whatever the multipliers."""
    sparsity = case.args[0]
    require(in_float64(case.replace(target=sparsity.copy()).call(f)) == 0, "a met target costs something")


@law("prune.target_structure")
def even_and_odd_parts(f: Function, case: Case, close: Close) -> None:
    """λ weighs the signed gap, φ its square: the mean and half the difference of both sides say so."""
    sparsity, first, second = case.args
    gap = _like(np.full(sparsity.size, 0.25), case)
    above = case.replace(_like(np.full(sparsity.size, 0.75), case), first, second, target=gap * 0 + gap + gap)
    below = above.replace(_like(np.full(sparsity.size, 0.25), case), first, second)
    up, down = in_float64(above.call(f)), in_float64(below.call(f))
    close.on(above)((up - down) / 2, 0.25 * in_float64(first), "the odd part", factor=4.0)
    close.on(above)((up + down) / 2, 0.0625 * in_float64(second), "the even part", factor=4.0)


# Domains


def _mixed(close: Close, shares: FloatArray) -> FloatArray:
    """Return the shares with the part of the uniform distribution that the released code mixes in."""
    c = 1e-4 if close.technique.name.endswith("released") else 0.0
    return (1 - c) * shares + c / max(shares.size, 1)


@law(*DOMAINS)
def shares_sum_to_one(f: Function, case: Case, close: Close) -> None:
    """Shares are at least 0 and sum to 1."""
    shares = in_float64(case.call(f))
    require(shares >= 0, "a negative share")
    close(np.asarray(shares.sum()), np.asarray(1.0), "the sum of shares", factor=2.0 * shares.size)


@law(*DOMAINS)
def lagging_domains_gain(f: Function, case: Case, close: Close) -> None:
    """The one domain that lags gains a share, by the factor e^Δ against the others."""
    n = 4
    loss = np.array([2.0, 1.0, 1.0, 1.0])
    lagging = case.replace(_like(np.full(n, 0.25), case), _like(loss, case), _like(np.ones(n), case))
    e = np.exp(1.0)
    shares = _mixed(close, np.array([e, 1, 1, 1]) / (e + 3))
    close.on(lagging)(lagging.call(f), shares, "one domain lags by 1", factor=2.0)


@law(*DOMAINS)
def a_common_lag_changes_nothing(f: Function, case: Case, close: Close) -> None:
    """If every domain lags by 1 the shares stay, but for the uniform share of the released code."""
    weights = case.args[0]
    ones = np.ones(weights.size)
    even = case.replace(weights, _like(2 * ones, case), _like(ones, case))
    w = _mixed(close, in_float64(weights) / in_float64(weights).sum())
    close.on(even)(even.call(f), w, "a common lag", factor=4.0)


@law("prune.dynamic_batch_loading")
def a_share_of_zero_stays(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A domain with share 0 keeps it, however far it lags."""
    closed = case.replace(*(_like(x, case) for x in ([0.0, 1.0], [9.0, 1.0], [1.0, 1.0])))
    require(in_float64(closed.call(f)) == [0, 1], "a share of 0 came back")


@law("prune.dynamic_batch_loading")
def domains_ahead_keep_their_ratio(f: Function, case: Case, close: Close) -> None:
    """Domains below their reference, by however much, keep their shares."""
    weights, _, reference = case.args
    ahead = round_to(in_float64(reference) - 1 - np.arange(weights.size), weights.dtype)
    w = in_float64(weights) / in_float64(weights).sum()
    below = case.replace(weights, ahead, reference)
    close.on(below)(below.call(f), w, "all ahead", factor=4.0)


@law("prune.dynamic_batch_loading.released")
def no_share_vanishes(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every domain keeps at least c / n, also one whose share was 0, and one ahead loses."""
    shares = in_float64(case.call(f))
    require(shares >= 0.9e-4 / max(shares.size, 1), "a share vanishes")
    ahead = case.replace(*(_like(x, case) for x in ([0.5, 0.5], [1.0, 1.0], [1.0, 3.0])))
    require(in_float64(ahead.call(f))[1] < 0.2, "a domain ahead of its reference does not lose")
