"""The judge of gradients: differences that see a curved function, and a gradient that is off by little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.consistency import GRADIENT_TOLERANCE, STEP, check_vjp, extrapolated
from refimpl.registry import Case

registry.load()

Differences = Callable[[float], float]


def differences(f: Callable[[float], float], x: float) -> Differences:
    return lambda step: (f(x + step) - f(x - step)) / (2 * step)


@pytest.mark.parametrize("rate", [1.0, 30.0, 300.0, 1000.0])
def test_the_limit_is_the_derivative(rate: float) -> None:
    difference = differences(lambda x: float(np.exp(rate * x)), 0.0)
    limit, error = extrapolated(difference)
    assert abs(limit - rate) <= GRADIENT_TOLERANCE * rate / 2
    assert abs(limit - rate) <= 10 * error < 1e-7 * rate
    assert rate < 100 or abs(difference(STEP) - rate) > GRADIENT_TOLERANCE * rate


def test_steps_over_a_corner_are_not_believed() -> None:
    """Wider steps than two cross it; the tableau says which entries agree."""
    limit, error = extrapolated(differences(abs, 2 * STEP))
    assert limit == pytest.approx(1.0, abs=1e-9)
    assert error < 1e-8


CURVED = {
    "B": 1, "T": 2, "M": 4, "Hkv": 2, "group": 1, "pairs": 1, "F": 4,
    "make": "gpt2", "extra": "none", "square": False,
}  # fmt: skip


def test_a_layer_norm_of_four_features_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token nearly constant over so few features: one step of differences is off by 4e-8."""
    record = registry.get("transformer.decoder")
    assert record.sample is not None
    case = record.sample(np.random.default_rng(0), **CURVED)
    assert check_vjp(record, case) is None
    right = registry.resolve(str(record.vjp))

    def nearly(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        return found._replace(**{found._fields[0]: found[0] * (1 + 1e-7)})

    monkeypatch.setattr("refimpl.consistency.resolve", lambda _target: nearly)
    problem = check_vjp(record, case)
    assert problem is not None
    assert problem.startswith("argument 0, along a random direction: gradient ")


def test_a_gradient_of_another_function_is_caught() -> None:
    record = registry.get("transformer.gelu")
    assert record.vjp is not None
    wrong = registry.Technique(**{
        **{name: getattr(record, name) for name in record.__slots__},
        "function": lambda x, **_: np.tanh(200 * x),
    })  # fmt: skip
    assert check_vjp(wrong, Case((np.linspace(-0.01, 0.01, 3),), {})) is not None
