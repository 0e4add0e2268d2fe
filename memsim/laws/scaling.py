"""Laws of scaling laws: powers, limits, and what is optimal about an optimum."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from memsim.scaling_laws import scaling_constants
from refimpl.errors import LawViolation
from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Any]
ROUNDING = 1e-14


def _near(got: Any, expected: Any, what: str, rounding: float = ROUNDING) -> None:
    if not abs(Fraction(got) - Fraction(expected)) <= rounding * abs(Fraction(expected)):
        raise LawViolation(f"{what}: expected {float(expected)}, got {float(got)}")


def _scaled(case: Case, factor: int) -> Case:
    return case.replace(**{name: factor * value for name, value in case.kwargs.items() if name != "fit"})


@law("cost.kaplan")
def a_power_has_no_scale(f: Model, case: Case, _close: object) -> None:
    """Doubling what is given lowers the loss by one factor, wherever one starts."""
    if len(case.kwargs) > 1:
        return
    one, two, many, twice_many = (_scaled(case, factor).call(f).total for factor in (1, 2, 64, 128))
    _near(Fraction(two) / Fraction(one), Fraction(twice_many) / Fraction(many), "factor of a doubling")


@law("cost.kaplan")
def one_nat_at_the_constant(f: Model, case: Case, _close: object) -> None:
    """8.8e13 parameters, 5.4e13 tokens or 3.1e8 PF-days are what a loss of 1 nat takes."""
    constants = {"parameters": 88 * 10**12, "tokens": 54 * 10**12, "compute": 31 * 10**7 * 864 * 10**17}
    if len(case.kwargs) == 1:
        (name,) = case.kwargs
        _near(case.replace(**{name: constants[name]}).call(f).total, 1, f"loss of {name} at the constant")


@law("cost.kaplan", "cost.chinchilla")
def more_of_anything_helps(f: Model, case: Case, _close: object) -> None:
    """The loss falls as parameters, tokens or compute grow, each alone."""
    before = case.call(f).total
    for name in case.kwargs.keys() - {"fit"}:
        after = case.replace(**{name: 3 * case.kwargs[name]}).call(f).total
        require(after < before, f"three times the {name}: {float(before)} became {float(after)}")


@law("cost.kaplan")
def either_limit_is_a_power(f: Model, case: Case, _close: object) -> None:
    """With endless data twice N lowers the joint loss by 2^-0.076, with endless size twice D by 2^-0.103."""
    if len(case.kwargs) < 2:
        return
    endless = 10**300
    for name, other, exponent in (("parameters", "tokens", 0.076), ("tokens", "parameters", 0.103)):
        limit = case.replace(**{other: endless})
        twice = limit.replace(**{name: 2 * case.kwargs[name]})
        _near(
            twice.call(f).total, Fraction(limit.call(f).total) * Fraction(2.0**-exponent), f"twice the {name}"
        )


@law("cost.chinchilla")
def nothing_beats_the_irreducible_loss(f: Model, case: Case, _close: object) -> None:
    """The loss stays above E, and reaches it with endless parameters and tokens."""
    entropy = {"hoffmann": Fraction("1.69"), "besiroglu": Fraction("1.8172")}[case.kwargs["fit"]]
    require(case.call(f).total > entropy, "a loss below E")
    _near(case.replace(parameters=10**100, tokens=10**100).call(f).total, entropy, "the limit of the loss")


@law("cost.chinchilla")
def size_and_data_do_not_interact(f: Model, case: Case, _close: object) -> None:
    """What more tokens save does not depend on the size, and falls by one factor a doubling."""
    small = [case.replace(tokens=2**i * case.kwargs["tokens"]).call(f).total for i in range(3)]
    large = case.replace(parameters=7 * case.kwargs["parameters"])
    saved = large.call(f).total - large.replace(tokens=2 * case.kwargs["tokens"]).call(f).total
    _near(saved, small[0] - small[1], "what a doubling of tokens saves", rounding=1e-10)
    _, β = (scaling_constants(case.kwargs["fit"])[0][name] for name in "αβ")
    _near(small[1] - small[2], (small[0] - small[1]) * Fraction(2.0 ** -float(β)), "the next doubling", 1e-10)


@law("cost.chinchilla.optimal")
def the_budget_is_spent(f: Model, case: Case, _close: object) -> None:
    """6 N D is the compute."""
    n, d = (Fraction(one.total) for one in case.call(f))
    _near(6 * n * d, case.kwargs["compute"], "6 N D")


@law("cost.chinchilla.optimal")
def both_margins_are_equal(f: Model, case: Case, _close: object) -> None:
    """One percent more parameters or one percent more tokens save the same: αA/N^α = βB/D^β."""
    constants = {name: float(value) for name, value in scaling_constants(case.kwargs["fit"])[0].items()}
    n, d = (float(one.total) for one in case.call(f))
    size = constants["α"] * constants["A"] * n ** -constants["α"]
    data = constants["β"] * constants["B"] * d ** -constants["β"]
    _near(size, data, "marginal loss of size and of data", rounding=1e-12)


@law("cost.chinchilla.optimal")
def no_other_split_is_better(f: Model, case: Case, _close: object) -> None:
    """Along 6 N D = C the loss is higher on either side."""
    constants = {name: float(value) for name, value in scaling_constants(case.kwargs["fit"])[0].items()}
    n, d = (float(one.total) for one in case.call(f))

    def loss(factor: float) -> float:
        size = constants["A"] * (n * factor) ** -constants["α"]
        return float(size + constants["B"] * (d / factor) ** -constants["β"])

    best = loss(1.0)
    require(best < min(loss(0.9), loss(1.1)), "the loss is lower beside the optimum")


@law("cost.pruning_tokens")
def tokens_are_proportional_to_each(f: Model, case: Case, _close: object) -> None:
    """Three times the steps, the batch or the length read three times the tokens."""
    for name in ("steps", "batch", "length"):
        more = case.replace(**{name: 3 * case.kwargs[name]}).call(f).total
        require(more == 3 * case.call(f).total, f"three times the {name}: {more} tokens")


@law("cost.pruning_tokens")
def one_of_each_is_one_token(f: Model, case: Case, _close: object) -> None:
    """A step of one sequence of one token reads one token."""
    tokens = case.replace(steps=1, batch=1, length=1).call(f).total
    require(tokens == 1, f"one token is read as {tokens}")
