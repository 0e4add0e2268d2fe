"""Scaling laws: constants found by a fit, the optimum by a search, and what the print contradicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from memsim.compute_optimal import compute_optimal, compute_share, forward_flops, training_flops
from memsim.scaling_laws import chinchilla, kaplan, pruning_tokens
from refimpl.errors import OptionError

PF_DAY = 1e15 * 86400


def test_a_fit_returns_kaplans_constants() -> None:
    n = np.logspace(6, 11, 12)
    losses = [float(kaplan(parameters=float(size)).total) for size in n]
    (scale, exponent), _ = optimize.curve_fit(
        lambda x, c, a: a * (c - x), np.log(n), np.log(losses), p0=(30.0, 0.1)
    )
    assert math.exp(scale) == pytest.approx(8.8e13, rel=1e-6)
    assert exponent == pytest.approx(0.076, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(1e9, 1e10), (1e6, 1e13), (1e12, 1e7)])
def test_kaplans_joint_law(n: float, d: float) -> None:
    expected = ((6.4e13 / n) ** (0.076 / 0.103) + 1.8e13 / d) ** 0.103
    assert float(kaplan(parameters=n, tokens=d).total) == pytest.approx(expected, rel=1e-14)


def test_kaplan_by_floats() -> None:
    assert float(kaplan(tokens="22B").total) == pytest.approx((5.4e13 / 22e9) ** 0.095, rel=1e-14)
    assert float(kaplan(compute=PF_DAY).total) == pytest.approx(3.1e8**0.05, rel=1e-14)


@pytest.mark.parametrize("fit", ["hoffmann", "besiroglu"])
@pytest.mark.parametrize("compute", [1e18, 5.76e23, 1e26])
def test_a_search_finds_the_optimum(fit: Any, compute: float) -> None:
    E, A, B, α, β = {
        "hoffmann": (1.69, 406.4, 410.7, 0.34, 0.28),
        "besiroglu": (1.8172, 482.01, 2085.43, 0.34781, 0.36585),
    }[fit]

    def loss(log_n: float) -> float:
        n = math.exp(log_n)
        return E + A / n**α + B / (compute / 6 / n) ** β

    found = optimize.minimize_scalar(loss, bounds=(5, 45), method="bounded", options={"xatol": 1e-9})
    best = compute_optimal(compute=compute, fit=fit)
    assert float(best.parameters.total) == pytest.approx(math.exp(found.x), rel=1e-5)
    assert float(best.tokens.total) == pytest.approx(compute / 6 / math.exp(found.x), rel=1e-5)
    there = chinchilla(parameters=best.parameters.total, tokens=best.tokens.total, fit=fit)
    assert float(there.total) == pytest.approx(found.fun, rel=1e-12)


def test_the_print_contradicts_the_headline() -> None:
    printed, refit = (compute_optimal(compute=5.76e23, fit=fit) for fit in ("hoffmann", "besiroglu"))
    ratios = [float(best.tokens.total / best.parameters.total) for best in (printed, refit)]
    assert [round(ratio) for ratio in ratios] == [93, 18]


def test_chinchilla_beats_gopher() -> None:
    small, large = chinchilla(parameters="70B", tokens="1.4T"), chinchilla(parameters="280B", tokens="300B")
    assert (round(float(small.total), 3), round(float(large.total), 3)) == (1.937, 1.993)


def test_flops() -> None:
    assert forward_flops(layers=48, width=1600, context=1024).total == 2 * 48 * (12 * 1600**2 + 1024 * 1600)
    assert training_flops(parameters=10, tokens=7).total == 420


def test_pruning() -> None:
    assert pruning_tokens(steps=3200, batch=32, length=4096).total == 419_430_400
    twice = compute_share(parameters=2, tokens=3, of_parameters=1, of_tokens=3)
    assert twice.total == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: kaplan(),
        lambda: kaplan(parameters=1, compute=1),
        lambda: kaplan(parameters=1, tokens=1, compute=1),
        lambda: kaplan(parameters=0),
        lambda: kaplan(tokens=float("nan")),
        lambda: chinchilla(parameters=1, tokens=-1),
        lambda: chinchilla(parameters=1, tokens=1, fit="kaplan"),  # type: ignore[arg-type]
        lambda: compute_optimal(compute=0),
        lambda: compute_optimal(compute=1, fit="mine"),  # type: ignore[arg-type]
        lambda: pruning_tokens(steps=0, batch=1, length=1),
    ],
)
def test_bad_arguments(call: Callable[[], Any]) -> None:
    with pytest.raises(OptionError):
        call()
