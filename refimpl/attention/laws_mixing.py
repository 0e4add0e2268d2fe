"""Laws of mixing on graphs: where gap and diameter are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.registry import Case, law
from refimpl.testing import Close, require

Measure = Callable[..., Any]
ROUNDING = 64 * np.finfo(np.float64).eps  # of an eigenvalue of size 1, for each vertex


def _measured(f: Measure, mask: Any) -> tuple[float, float]:
    gap, far = (float(value) for value in f(mask))
    return gap, far


def _require_gap(found: float, expected: float, count: int, what: str) -> None:
    require(abs(found - expected) <= ROUNDING * max(count, 1), f"{what}: gap {found}, expected {expected}")


@law("attention.rapid_mixing")
def names_of_tokens_do_not_matter(f: Measure, case: Case, close: Close) -> None:
    """Renumbering the tokens, or seeing the other way along every edge, changes nothing."""
    (mask,) = case.args
    order = np.random.default_rng(0).permutation(len(mask))
    whole = case.call(f)
    close(case.replace(mask[np.ix_(order, order)]).call(f), whole, "tokens renumbered", of="spectral_gap")
    close(case.replace(mask.T.copy()).call(f), whole, "edges turned", of="spectral_gap")


@law("attention.rapid_mixing")
def complete_graphs_mix_at_once(f: Measure, case: Case, close: Close) -> None:  # noqa: ARG001
    """Where every token sees all, one step forgets everything: gap 1, diameter 1."""
    count = max(len(case.args[0]), 2)
    gap, far = _measured(f, np.ones((count, count), dtype=bool))
    _require_gap(gap, 1.0, count, f"complete graph of {count}")
    require(far == 1.0, f"complete graph of {count}: diameter {far}")


@law("attention.rapid_mixing")
def rings_mix_slowly(f: Measure, case: Case, close: Close) -> None:  # noqa: ARG001
    """A ring of N with loops has gap (2/3)(1 - cos(2π/N)), which falls as 1/N², and diameter N // 2."""
    count = len(case.args[0]) + 3
    eye = np.eye(count, dtype=bool)
    gap, far = _measured(f, eye | np.roll(eye, 1, axis=1))
    _require_gap(gap, 2 / 3 * (1 - math.cos(2 * math.pi / count)), count, f"ring of {count}")
    require(far == count // 2, f"ring of {count}: diameter {far}")


@law("attention.rapid_mixing")
def a_hub_brings_the_diameter_to_two(f: Measure, case: Case, close: Close) -> None:  # noqa: ARG001
    """With a token that all are joined to, no two are further than two steps apart."""
    mask = case.args[0].copy()
    if len(mask):
        mask[:, len(mask) // 2] = True
        require(_measured(f, mask)[1] <= 2.0, "a hub, and two tokens further apart than two steps")


@law("attention.rapid_mixing")
def graphs_in_parts_never_mix(f: Measure, case: Case, close: Close) -> None:  # noqa: ARG001
    """Beside a graph of its own, a walk stays where it began: gap 0, infinite diameter."""
    (mask,) = case.args
    if not len(mask):
        return
    apart = np.kron(np.eye(2, dtype=bool), mask)
    gap, far = _measured(f, apart)
    _require_gap(gap, 0.0, len(apart), "two graphs apart")
    require(math.isinf(far), f"two graphs apart: diameter {far}")


@law("attention.rapid_mixing")
def more_edges_bring_tokens_nearer(f: Measure, case: Case, close: Close) -> None:  # noqa: ARG001
    """Adding a window never lengthens the longest way."""
    (mask,) = case.args
    i = np.arange(len(mask))
    before, after = _measured(f, mask)[1], _measured(f, mask | (np.abs(i[:, None] - i) <= 1))[1]
    require(after <= before, f"with more edges the diameter grew from {before} to {after}")
