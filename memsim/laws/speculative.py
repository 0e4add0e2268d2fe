"""Laws of the gain of speculative decoding."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Any]


def _totals(f: Model, case: Case) -> tuple[Any, Any, Any]:
    tokens, speedup, operations = (estimate.total for estimate in case.call(f))
    return tokens, speedup, operations


@law("cost.speculative")
def tokens_lie_between_one_and_all(f: Model, case: Case, _close: object) -> None:
    """A pass yields 1 to γ + 1 tokens, all of them if every draft stands."""
    gamma = case.kwargs["gamma"]
    tokens, *_ = _totals(f, case)
    require(1 <= tokens <= gamma + 1, f"{tokens} tokens a pass with γ = {gamma}")
    everything, *_ = _totals(f, case.replace(alpha=1))
    require(everything == gamma + 1, f"{everything} tokens a pass where every draft stands, γ = {gamma}")


@law("cost.speculative")
def one_more_draft_adds_its_chance(f: Model, case: Case, _close: object) -> None:
    """A longer draft adds α^(γ+1) tokens: the chance that all of it stands."""
    gamma, alpha = case.kwargs["gamma"], Fraction(str(case.kwargs["alpha"]))
    tokens, *_ = _totals(f, case)
    more, *_ = _totals(f, case.replace(gamma=gamma + 1))
    require(more - tokens == alpha ** (gamma + 1), f"γ = {gamma + 1} adds {more - tokens} tokens")


@law("cost.speculative")
def a_better_draft_yields_more(f: Model, case: Case, _close: object) -> None:
    """Tokens and walltime improve with α, and operations fall."""
    here, sure = _totals(f, case), _totals(f, case.replace(alpha=1))
    better = (here[0] <= sure[0], here[1] <= sure[1], here[2] >= sure[2])
    require(all(better), f"a draft that always stands is worse: {sure} against {here}")


@law("cost.speculative")
def one_draft_pays_if_it_is_right_more_often_than_it_costs(f: Model, case: Case, _close: object) -> None:
    """With γ = 1 the improvement is (1 + α)/(1 + c): above 1 if and only if α > c (corollary 3.9)."""
    alpha, cost = case.kwargs["alpha"], case.kwargs["cost"]
    tokens, speedup, _ = _totals(f, case.replace(gamma=1))
    require((speedup > 1) == (alpha > cost), f"α = {alpha}, c = {cost}: improvement {speedup}")
    require(speedup <= tokens, f"the improvement {speedup} exceeds the {tokens} tokens of a pass")


@law("cost.speculative")
def no_draft_changes_nothing(f: Model, case: Case, _close: object) -> None:
    """With γ = 0 there is one token a pass, at the time and the operations of the target."""
    found = _totals(f, case.replace(gamma=0))
    require(found == (1, 1, 1), f"without drafts: {found}")
