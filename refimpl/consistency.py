"""A reference against itself: its gradient against finite differences, its prices against counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import is_floating
from refimpl.registry import Case, Price, Technique, resolve
from refimpl.tolerances import outputs

__all__ = ["check_price", "check_vjp"]

DIRECTIONS = 2
GRADIENT_TOLERANCE = 1e-8


def check_vjp(technique: Technique, case: Case, seed: int = 0) -> str | None:
    """Return how a gradient differs from central differences along random directions; None if all agree.

    Every floating argument is moved, and every floating option for which the vector-Jacobian product returns
    a gradient: a field named ``d`` and the option's name.  The step is ``eps**(1/3)``, whose truncation and
    rounding errors are near ``eps**(2/3)``; the bound is 1e-8 of the terms.
    """
    if technique.vjp is None:
        return "the technique has no vector-Jacobian product"
    case = case.without("return_lse")
    rng = np.random.default_rng([seed, 0x96AD])
    base = outputs(case.call(technique.function))["output"]
    cotangent = rng.standard_normal(base.shape)
    gradients = resolve(technique.vjp)(*case.args, cotangent, **case.kwargs)
    slots: list[tuple[int | str, Any]] = [
        (place, gradient)
        for place, (gradient, argument) in enumerate(zip(gradients, case.args, strict=False))
        if isinstance(argument, np.ndarray) and is_floating(argument.dtype) and gradient is not None
    ]
    for name in case.kwargs:
        gradient = getattr(gradients, f"d{name}", None)
        if gradient is not None:
            slots.append((name, gradient))
    for slot, gradient in slots:
        for _ in range(DIRECTIONS):
            problem = _along_a_direction(technique, case, slot, gradient, cotangent, rng)
            if problem:
                return problem
    return None


def _along_a_direction(
    technique: Technique, case: Case, slot: int | str, gradient: Any, cotangent: Any, rng: np.random.Generator
) -> str | None:
    array = case.args[slot] if isinstance(slot, int) else np.asarray(case.kwargs[slot])
    direction = np.where(np.isfinite(array), rng.standard_normal(np.shape(array)), 0.0)
    step = np.finfo(np.float64).eps ** (1 / 3)
    sides = []
    for sign in (1.0, -1.0):
        moved = array + sign * step * direction
        if isinstance(slot, int):
            args = list(case.args)
            args[slot] = moved
            shifted = Case(tuple(args), case.kwargs)
        else:
            shifted = case.replace(**{slot: moved})
        sides.append(outputs(shifted.call(technique.function))["output"])
    numeric = float(np.sum(cotangent * (sides[0] - sides[1]))) / (2 * step)
    exact = float(np.sum(gradient * direction))
    terms = float(np.sum(np.abs(gradient * direction))) + float(np.sum(np.abs(cotangent * sides[0])))
    if not abs(numeric - exact) <= GRADIENT_TOLERANCE * (terms + 1.0):
        name = f"argument {slot}" if isinstance(slot, int) else slot
        return f"{name}, along a random direction: gradient {exact}, differences say {numeric}"
    return None


def _counter(counts: str) -> tuple[str, Any, Callable[[], dict[str, int]]]:
    """Return the option by which a reference takes its counter, a counter, and what to read off it."""
    if counts == "comm":
        from refimpl.parallel.traffic import Traffic  # not above: families import what this module imports

        traffic = Traffic()
        return "traffic", traffic, traffic.totals
    memory = Memory()
    return "memory", memory, partial(memory.counted, counts)


def check_price(price: Price, technique: Technique, case: Case) -> str | None:
    """Return how a model's prediction differs from what its function counts as it runs; None if equal.

    The function is the reference, or the implementation that the price names: a definition by a mask computes
    every score, and what is priced is the algorithm that does not.  ``storage`` is
    the bytes of the arrays that it returns.
    """
    function = resolve(price.of) if price.of else technique.function
    predicted = dict(price.function(case))
    if price.counts == "storage":
        counted = {"bytes": sum(np.asarray(part).nbytes for part in outputs(case.call(function)).values())}
    else:
        option, counter, read = _counter(price.counts)
        case.replace(**{option: counter}).call(function)
        counted = read()
    if set(predicted) != set(counted):
        return f"the model predicts {sorted(predicted)}, counted are {sorted(counted)}"
    wrong = {key: (value, counted[key]) for key, value in predicted.items() if counted[key] != value}
    return ", ".join(f"{key}: model says {a}, counted {b}" for key, (a, b) in wrong.items()) or None
