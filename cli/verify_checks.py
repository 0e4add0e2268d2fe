"""What any machine can judge of ``--axes`` of ``frugal verify``, before a backend is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from cli.parameters import AxisValue, axis_text

if TYPE_CHECKING:
    from refimpl.registry import Technique

__all__ = ["known_axes", "refuse_hours"]

# Times the sizes of the record; measured: 5 s for one check of attention 50 times as large.
MOST_SIMULATED = 64


def known_axes(technique: Technique, axes: Mapping[str, AxisValue]) -> dict[str, AxisValue]:
    """Return `axes` as the technique spells them; a word such as none may stand for a choice of that name.

    Raises
    ------
    click.BadParameter
        If the technique has no such axis or option, or it has other values.
    """
    known: dict[str, AxisValue] = {}
    for name, value in axes.items():
        if name in technique.axes:
            sizes = [edge[name] for edge in technique.edges if name in edge]
            least = min([technique.axes[name][0], *(size for size in sizes if isinstance(size, int))])
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                wanted = f"is a size of at least {least}"
                raise click.BadParameter(f"--axes: {name} {wanted}; got {axis_text(value)!r}")
            known[name] = value
            continue
        if name not in technique.options:
            has = ", ".join([*technique.axes, *technique.options])
            raise click.BadParameter(f"--axes: {technique.name} has no axis {name!r}; it has {has}")
        edges = (edge[name] for edge in technique.edges if name in edge)
        choices = {axis_text(choice): choice for choice in (*technique.options[name], *edges)}
        if axis_text(value) not in choices:
            raise click.BadParameter(
                f"--axes: {name} is one of {', '.join(choices)}; got {axis_text(value)!r}"
            )
        known[name] = choices[axis_text(value)]
    return known


def refuse_hours(technique: Technique, fixed: Mapping[str, AxisValue]) -> None:
    """Refuse sizes at which the simulator takes hours; it takes about a second at those of the record.

    Raises
    ------
    click.BadParameter
        If they are as large.
    """
    growth = math.prod(_larger(technique, fixed).values())
    # What an edge case of the record asks for is run without --axes, too.
    if growth > max([MOST_SIMULATED, *(math.prod(_larger(technique, e).values()) for e in technique.edges)]):
        sizes = ", ".join(f"{name}={fixed[name]}" for name in _larger(technique, fixed))
        times = f"{float(min(growth, 10**30)):.3g}"
        raise click.BadParameter(
            f"--axes: {sizes} make cases of {technique.name} {times} times as large as its record, and"
            f" the simulator takes minutes for {MOST_SIMULATED} times; a GPU takes them: --backend cuda"
        )


def _larger(technique: Technique, sizes: Mapping[str, Any]) -> dict[str, Fraction]:
    """Return how many times as large as the record's largest axes are, those that are larger."""
    return {
        name: Fraction(size, max(1, technique.axes[name][1]))
        for name, size in sizes.items()
        if name in technique.axes and isinstance(size, int) and size > technique.axes[name][1]
    }
