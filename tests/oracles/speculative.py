"""Oracle of the gain of speculative decoding: every way a round can end, with its chance."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle


@oracle("cost.speculative")
def rounds_enumerated(*, alpha: float, gamma: int, cost: float, operations_cost: float) -> Any:
    """A round keeps n drafts with chance α^n (1-α), or all γ, and yields one token more."""
    a, c, ops = (Fraction(str(number)) for number in (alpha, cost, operations_cost))
    tokens, chance = Fraction(0), Fraction(1)
    for kept in range(gamma):
        tokens += chance * (1 - a) * (kept + 1)  # the draft after them falls
        chance *= a
    tokens += chance * (gamma + 1)
    time, work = 1 + sum([c] * gamma), (gamma + 1) + sum([ops] * gamma)  # the target works on γ + 1 tokens
    found = tokens, tokens / time, work / tokens
    return {
        f"output {index}": np.asarray(number.numerator if number.denominator == 1 else number, dtype=object)
        for index, number in enumerate(found)
    }
