"""Laws of model states and of ZeRO's traffic: proportional to parameters, and activations add."""

from __future__ import annotations

from collections.abc import Callable

from memsim.estimate import Estimate
from memsim.laws.comparison import same
from refimpl.registry import Case, law

Model = Callable[..., Estimate]
Comparing = Callable[..., tuple[Estimate, Estimate]]


@law("cost.training_memory", "cost.zero_memory", "cost.zero_communication")
def proportional_to_parameters(f: Model, case: Case, _close: object) -> None:
    """Three times the parameters cost three times as much."""
    plain = case.without("activations")
    thrice = plain.replace(parameters=3 * plain.kwargs["parameters"])
    same(thrice.call(f).total, 3 * plain.call(f).total, "cost of three times the parameters")


@law("cost.training_memory")
def eight_times_the_weights(f: Model, case: Case, _close: object) -> None:
    """Mixed-precision Adam holds 16 bytes a parameter, eight times the fp16 weights."""
    states = case.without("activations").call(f)
    same(states.total, 16 * case.kwargs["parameters"], "model states")
    same(states.total, 8 * states["fp16 parameters"], "model states over weights")


@law("cost.training_memory")
def activations_add(f: Model, case: Case, _close: object) -> None:
    """Activations come on top of the model states and change nothing else."""
    if "activations" in case.kwargs:
        states = case.without("activations").call(f).total
        same(case.call(f).total, states + case.kwargs["activations"].total, "states and activations")
