"""The picture of ``frugal apply``: saving against error, a labelled point for each technique."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["draw", "spread"]

FLOOR = 0.02  # smaller errors stand here, with their size in words
ROW = 0.075  # decades that a line of text takes


def draw(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw each row's saving, of bytes or of operations, and the relative error of its last states."""
    points = []
    for row in rows:
        of_bytes, of_flops = 100 * (1 - row["bytes_share"]), 100 * (1 - row["flops_share"])
        error = row["relative_error_last"] or 0.0
        label = row["technique"] if error >= FLOOR else f"{row['technique']} (error {error:.0e})"
        points.append((max(of_bytes, of_flops), max(error, FLOOR), of_bytes >= of_flops, label))
    heights = spread([(x, math.log10(y)) for x, y, *_ in points])
    for (x, y, by_bytes, label), height in zip(points, heights, strict=True):
        marker = "v" if y == FLOOR else "o" if by_bytes else "s"
        axes.plot(x, y, marker, color="tab:blue" if by_bytes else "tab:orange")
        left = x > 60
        axes.annotate(
            label,
            (x, y),
            xytext=(x - 2 if left else x + 2, 10**height),
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
    top = max(2.0, *(10 ** (height + ROW) for height in heights))
    axes.plot([], [], "o", color="tab:blue", label="bytes")
    axes.plot([], [], "s", color="tab:orange", label="operations")
    axes.legend(title="what it saves most of", loc="center", bbox_to_anchor=(0.25, 0.32), fontsize=8)
    axes.set(xlim=(-2, 100), yscale="log", ylim=(FLOOR * 0.8, top), xlabel="saved, %")
    axes.set_ylabel("relative error of the last states")
    axes.grid(visible=True, alpha=0.3)


def spread(points: Sequence[tuple[float, float]], near: float = 22.0) -> list[float]:
    """Return a height for each label, so that those of near points do not cover each other.

    >>> spread([(0.0, 0.0), (1.0, 0.0), (90.0, 0.0)])
    [0.0, 0.075, 0.0]
    """
    heights: dict[int, float] = {}
    for index in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, height = points[index]
        below = [heights[other] + ROW for other in heights if abs(points[other][0] - x) < near]
        heights[index] = max([height, *below])
    return [heights[index] for index in range(len(points))]
