"""What speculative decoding gains: tokens a pass of the target, walltime, and the operations spent on that.

>>> print(expected_tokens(alpha=0.8, gamma=5).explain()[0])
expected tokens a pass: (1 - α**(γ + 1))/(1 - α) = (1 - 0.8**(5 + 1))/(1 - 0.8) = 3.689
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = [
    "Speculation",
    "expected_tokens",
    "optimal_gamma",
    "speculative",
    "speculative_operations",
    "speculative_speedup",
]

_PAPER = "Leviathan et al. 2023, arXiv:2211.17192"
_LEAVES_OUT = (
    "acceptances that depend on each other; the target's pass over γ + 1 tokens taken as long as over one"
)


class Speculation(NamedTuple):
    """Tokens a pass, walltime improvement, and operations in units of the target's own, an estimate each."""

    tokens: Estimate
    speedup: Estimate
    operations: Estimate


def _sample(rng: np.random.Generator, *, percent: int, gamma: int, cost_percent: int) -> Case:
    share = int(rng.integers(0, 101))
    return Case(
        (),
        {"alpha": percent / 100, "gamma": gamma, "cost": cost_percent / 100, "operations_cost": share / 100},
    )


@technique(
    "cost.speculative",
    entries=(103,),
    kind="cost",
    source=Source("Leviathan et al. 2023", "arXiv:2211.17192", "eq. 1, theorems 3.8 and 3.11"),
    axes={"percent": (0, 100), "gamma": (0, 12), "cost_percent": (0, 120)},
    sample=_sample,
    edges=(
        {"percent": 100, "gamma": 4},
        {"percent": 0, "gamma": 3},
        {"percent": 80, "gamma": 0},
        {"percent": 60, "gamma": 2, "cost_percent": 0},
    ),
    exact=True,
)
def speculative(
    *, alpha: Quantity, gamma: Quantity, cost: Quantity, operations_cost: Quantity | None = None
) -> Speculation:
    """Return what speculative decoding gains if each draft stands with probability α, independently.

    Parameters
    ----------
    alpha : float
        α, the acceptance rate: the mean of Σ min(draft, target) over positions.
    gamma : int
        γ, drafted tokens a pass of the target (K in Chen et al.).
    cost : float
        c, time of a pass of the draft over that of the target.  It depends on the hardware.
    operations_cost : float, optional
        ĉ, the same for operations.  Default: `cost`.

    Returns
    -------
    Speculation
        Three estimates of unit 1.

    Raises
    ------
    OptionError
        If α is outside [0, 1], γ is no whole number from 0 on, or a cost is negative.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, eq. 1, theorems 3.8 and 3.11.

    Examples
    --------
    >>> gain = speculative(alpha=0.5, gamma=1, cost=0.25)
    >>> gain.tokens.total, gain.speedup.total, gain.operations.total
    (Fraction(3, 2), Fraction(6, 5), Fraction(3, 2))
    """
    return Speculation(
        expected_tokens(alpha=alpha, gamma=gamma),
        speculative_speedup(alpha=alpha, gamma=gamma, cost=cost),
        speculative_operations(
            alpha=alpha, gamma=gamma, cost=cost if operations_cost is None else operations_cost
        ),
    )


def expected_tokens(*, alpha: Quantity, gamma: Quantity) -> Estimate:
    """Return the expected tokens a pass of the target, ``(1 - α^(γ+1)) / (1 - α)``: γ + 1 for α = 1.

    Parameters
    ----------
    alpha, gamma
        As for `speculative`.

    Returns
    -------
    Estimate
        Of unit 1, from 1 to γ + 1.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, eq. 1.

    Examples
    --------
    >>> expected_tokens(alpha=0.5, gamma=2).total
    Fraction(7, 4)
    """
    values = _values(alpha, gamma)
    formula = "(1 - α**(γ + 1))/(1 - α)" if values["α"] != 1 else "γ + 1"
    return _one("expected tokens a pass", formula, values, "eq. 1")


def speculative_speedup(*, alpha: Quantity, gamma: Quantity, cost: Quantity) -> Estimate:
    """Return the expected improvement of walltime: the expected tokens over ``γ c + 1``.

    Parameters
    ----------
    alpha, gamma, cost
        As for `speculative`.

    Returns
    -------
    Estimate
        Of unit 1; below 1 it is a loss.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, theorem 3.8.

    Examples
    --------
    >>> speculative_speedup(alpha=1, gamma=3, cost=1).total
    1
    """
    values = _values(alpha, gamma, c=cost)
    formula = "(1 - α**(γ + 1))/((1 - α)*(γ*c + 1))" if values["α"] != 1 else "(γ + 1)/(γ*c + 1)"
    return _one("walltime improvement", formula, values, "theorem 3.8")


def speculative_operations(*, alpha: Quantity, gamma: Quantity, cost: Quantity) -> Estimate:
    """Return the expected operations a token, in units of the target's own for one token.

    Parameters
    ----------
    alpha, gamma
        As for `speculative`.
    cost : float
        ĉ, operations of the draft a token over those of the target.

    Returns
    -------
    Estimate
        Of unit 1: ``(1 - α)(γ ĉ + γ + 1) / (1 - α^(γ+1))``.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, theorem 3.11.

    Examples
    --------
    >>> speculative_operations(alpha=0, gamma=3, cost=0).total
    4
    """
    values = _values(alpha, gamma, ĉ=cost)
    formula = "(γ*ĉ + γ + 1)/(γ + 1)"
    if values["α"] != 1:
        formula = "(1 - α)*(γ*ĉ + γ + 1)/(1 - α**(γ + 1))"
    return _one("operations a token", formula, values, "theorem 3.11")


def optimal_gamma(*, alpha: Quantity, cost: Quantity) -> int | None:
    """Return the γ of the greatest walltime improvement; None if more is always better.

    Parameters
    ----------
    alpha, cost
        As for `speculative`.

    Returns
    -------
    int or None
        0 if drafting never pays, which is so iff α <= c; None if the draft costs nothing, or errs never and
        costs less than the target.

    Notes
    -----
    One more draft pays as long as ``α^(γ+1) (γ c + 1) > c E(γ)``: the left side falls against the right one,
    so the first γ at which it does not hold is the best.  Found in floating point.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, section 3.5 (by numbers) and corollary 3.9 (α > c).

    Examples
    --------
    >>> [optimal_gamma(alpha=alpha, cost=0.05) for alpha in (0.05, 0.6, 0.8, 0.9)]
    [0, 4, 8, 13]
    """
    values = _values(alpha, 0, c=cost)
    a, c = float(values["α"]), float(values["c"])
    if a <= c:
        return 0
    if c == 0 or a == 1:
        return None

    def pays(gamma: int) -> bool:
        power = math.exp((gamma + 1) * math.log(a)) if a else 0.0
        return power * (gamma * c + 1) > c * (1 - power) / (1 - a)

    high = 1
    while pays(high):
        high *= 2
    low = high // 2  # pays, or is 0, which does because a > c
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return high


def _one(name: str, formula: str, values: dict[str, Number], place: str) -> Estimate:
    return estimate(name, [term(name, formula, values, "1", f"{_PAPER}, {place}")], leaves_out=_LEAVES_OUT)


def _values(alpha: Quantity, gamma: Quantity, **costs: Quantity) -> dict[str, Number]:
    values = {"α": exact(alpha, "alpha"), "γ": exact(gamma, "gamma")}
    if not 0 <= values["α"] <= 1:
        raise OptionError(f"alpha: expected a share from 0 to 1; got {alpha!r}")
    if isinstance(values["γ"], Fraction) or values["γ"] < 0:
        raise OptionError(f"gamma: expected a whole number from 0 on; got {gamma!r}")
    for name, cost in costs.items():
        values[name] = exact(cost, "cost")
        if values[name] < 0:
            raise OptionError(f"cost: expected a number from 0 on; got {cost!r}")
    return values
