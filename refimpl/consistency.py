"""A reference against itself: its gradient against finite differences, its prices against counts."""

from __future__ import annotations

import numpy as np

from refimpl.memory import Memory
from refimpl.registry import Case, Price, Technique, resolve
from refimpl.tolerances import outputs

__all__ = ["check_price", "check_vjp"]


def check_vjp(technique: Technique, case: Case, seed: int = 0) -> str | None:
    """Return how the gradient differs from central differences along random directions; None if it agrees.

    The step is ``eps**(1/3)``; the bound allows the truncation and rounding error of that step.
    """
    if technique.vjp is None:
        return "the technique has no vector-Jacobian product"
    case = case.without("return_lse")
    rng = np.random.default_rng([seed, 0x96AD])
    base = outputs(case.call(technique.function))["output"]
    cotangent = rng.standard_normal(base.shape)
    gradients = resolve(technique.vjp)(*case.args, cotangent, **case.kwargs)
    step = np.finfo(np.float64).eps ** (1 / 3)
    for index, array in enumerate(case.args):
        direction = np.where(np.isfinite(array), rng.standard_normal(np.shape(array)), 0.0)
        sides = []
        for sign in (1.0, -1.0):
            moved = list(case.args)
            moved[index] = array + sign * step * direction
            sides.append(outputs(Case(tuple(moved), case.kwargs).call(technique.function))["output"])
        numeric = float(np.sum(cotangent * (sides[0] - sides[1]))) / (2 * step)
        exact = float(np.sum(gradients[index] * direction))
        scale = float(np.sum(np.abs(gradients[index] * direction))) + float(
            np.sum(np.abs(cotangent) * np.abs(base))
        )
        if not abs(numeric - exact) <= 1e-6 * (scale + 1.0):
            return (
                f"gradient of argument {index} along a random direction: {exact}, differences say {numeric}"
            )
    return None


def check_price(price: Price, technique: Technique, case: Case) -> str | None:
    """Return how a model's prediction differs from what the reference counts as it runs; None if equal."""
    memory = Memory()
    case.replace(memory=memory).call(technique.function)
    predicted, counted = dict(price.function(case)), memory.totals()
    wrong = {key: (value, counted[key]) for key, value in predicted.items() if counted[key] != value}
    return ", ".join(f"{key}: model says {a}, counted {b}" for key, (a, b) in wrong.items()) or None
