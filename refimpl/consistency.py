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

__all__ = ["check_price", "check_vjp", "extrapolated"]

DIRECTIONS = 2
GRADIENT_TOLERANCE = 1e-8
STEP = float(np.finfo(np.float64).eps ** (1 / 3))
WIDEST, LEVELS = 16, 6  # of extrapolation: steps from 16 to half of STEP, a halving each


def check_vjp(technique: Technique, case: Case, seed: int = 0) -> str | None:
    """Return how a gradient differs from central differences along random directions; None if all agree.

    Every floating argument is moved, and every floating option for which the vector-Jacobian product returns
    a gradient: a field named ``d`` and the option's name.  The step is ``eps**(1/3)``, whose truncation and
    rounding errors are near ``eps**(2/3)``; the bound is 1e-8 of the terms.  Where the function is so curved
    that this step's truncation exceeds the bound, `extrapolated` differences judge, under the same bound.
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

    def at(distance: float) -> Any:
        """Return the output for the argument moved so far along the direction."""
        moved = array + distance * direction
        if isinstance(slot, int):
            shifted = Case((*case.args[:slot], moved, *case.args[slot + 1 :]), case.kwargs)
        else:
            shifted = case.replace(**{slot: moved})
        return outputs(shifted.call(technique.function))["output"]

    def difference(step: float) -> float:
        return float(np.sum(cotangent * (at(step) - at(-step)))) / (2 * step)

    exact = float(np.sum(gradient * direction))
    terms = float(np.sum(np.abs(gradient * direction))) + float(np.sum(np.abs(cotangent * at(STEP))))
    bound = GRADIENT_TOLERANCE * (terms + 1.0)
    if abs(difference(STEP) - exact) <= bound:
        return None
    numeric, doubt = extrapolated(difference)
    if abs(numeric - exact) <= bound:
        return None
    name = f"argument {slot}" if isinstance(slot, int) else slot
    return f"{name}, along a random direction: gradient {exact}, differences say {numeric} ± {doubt:.1g}"


def extrapolated(difference: Callable[[float], float]) -> tuple[float, float]:
    """Return the limit of a central difference as its step goes to 0, and an estimate of its error.

    The error is a series in the squared step, so combining steps of ratio 2 removes a power at a time
    (Richardson); the entry of that tableau which differs least from its parents is the limit, and this
    difference its error (Ridders).  Which gradient the limit is compared with plays no part.

    References
    ----------
    .. [1] Ridders, 1982, Advances in Engineering Software 4(2), doi:10.1016/S0141-1195(82)80057-0.

    Examples
    --------
    The derivative of ``exp(200 x)`` at 0:

    >>> def difference(step: float) -> float:
    ...     return float(np.exp(200 * step) - np.exp(-200 * step)) / (2 * step)
    >>> limit, error = extrapolated(difference)
    >>> abs(difference(STEP) - 200) > 1e-5, abs(limit - 200) < 1e-8, error < 1e-7
    (True, True, True)
    """
    best, error = float("nan"), float("inf")
    above: list[float] = []
    for level in range(LEVELS):
        row = [difference(WIDEST * STEP / 2**level)]
        for power, parent in enumerate(above, start=1):
            row.append(row[-1] + (row[-1] - parent) / (4**power - 1))
            doubt = max(abs(row[-1] - row[-2]), abs(row[-1] - parent))
            if doubt < error:
                best, error = row[-1], doubt
        above = row
    return best, error


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
