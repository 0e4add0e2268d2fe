"""Which cases a technique is judged on: drawn from a seed, planned, and told again as a command."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.registry import Option, Technique

__all__ = ["draw", "plan", "reproducer"]


def draw(technique: Technique, seed: int, fixed: Mapping[str, Option] | None = None) -> dict[str, Option]:
    """Return axes and options of a case, drawn from `seed`, those in `fixed` as given."""
    rng = np.random.default_rng([seed, 0xA11E5])  # apart from the stream that fills the arrays
    chosen: dict[str, Option] = {
        axis: int(rng.integers(low, high + 1)) for axis, (low, high) in technique.axes.items()
    }
    for name, choices in technique.options.items():
        chosen[name] = choices[int(rng.integers(len(choices)))]
    unknown = set(fixed or {}) - set(chosen)
    if unknown:
        known = ", ".join(chosen)
        raise ValueError(f"{technique.name} has no axis {', '.join(sorted(unknown))}; it has {known}")
    return {**chosen, **(fixed or {})}


Plan = list[tuple[int, dict[str, Option]]]


def plan(
    technique: Technique, seed: int, axes: Mapping[str, Option] | None, examples: int, single: bool
) -> tuple[Plan, Plan]:
    """Return the edge cases, and random ones: more than asked for, because some may be refused."""
    fixed = dict(axes or {})
    if single:
        return [], [(seed, fixed)]
    edges = [
        (seed + index, {**draw(technique, seed + index), **edge, **fixed})
        for index, edge in enumerate(technique.edges)
        if all(edge.get(key, value) == value for key, value in fixed.items())
    ]
    return edges, [(seed + index, draw(technique, seed + index, fixed)) for index in range(5 * examples)]


def reproducer(
    name: str,
    target: str | None,
    backend: str,
    tier: str,
    dtype: str,
    seed: int,
    shape: Mapping[str, Option],
) -> str:
    """Return the command that runs this one case again."""
    parts = ["frugal verify", name]
    if target:
        parts.append(f"--with {target}")
    if backend != "numpy":
        parts.append(f"--backend {backend}")
    if tier:
        parts.append(f"--tier {tier}")
    if dtype != "float64":
        parts.append(f"--dtype {dtype}")
    axes = ",".join(f"{key}={_text(value)}" for key, value in shape.items())
    return " ".join([*parts, f"--seed {seed}", f"--axes {axes}"])


def _text(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
