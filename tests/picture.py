"""Renew docs/ball.png, the picture of 16 colours in docs/codebook.md: ``python -m tests.picture``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from refimpl.quant import codebook, codebook_dequantize

__all__ = ["draw_picture", "in_sixteen_colors"]

PAGE = Path(__file__).resolve().parents[1] / "docs/ball.png"


def draw_picture(size: int) -> Any:
    """Return a picture (size, size, 3) in [0, 1]: a shaded ball before a sky that changes its colour."""
    y, x = np.mgrid[0:size, 0:size] / max(size - 1, 1)
    sky = np.stack([0.2 + 0.7 * y, 0.4 + 0.3 * y, 0.9 - 0.5 * y], axis=2)
    u, v = (x - 0.5) / 0.3, (y - 0.55) / 0.3
    height = np.sqrt(np.maximum(1 - u**2 - v**2, 0))
    light = np.clip(0.15 + 0.85 * (0.6 * height - 0.5 * u - 0.6 * v), 0, 1)[..., None]
    ball = light * np.array([0.95, 0.35, 0.2])
    return np.where((u**2 + v**2 < 1)[..., None], ball, sky)


def in_sixteen_colors(picture: Any) -> tuple[Any, Any]:
    """Return the picture in 16 colours: evenly spaced along each channel, and found from there by k-means."""
    pixels = picture.reshape(-1, 3)
    levels = [np.linspace(1, 2 * count - 1, count) / (2 * count) for count in (4, 2, 2)]
    grid = np.stack(np.meshgrid(*levels, indexing="ij"), axis=3).reshape(-1, 3)
    start, best = (codebook(pixels, grid, iterations=rounds) for rounds in (0, 100))
    return codebook_dequantize(*start).reshape(picture.shape), codebook_dequantize(*best).reshape(
        picture.shape
    )


def main() -> None:
    """Draw the three pictures side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    picture = draw_picture(160)
    grid, best = in_sixteen_colors(picture)
    colors = len(np.unique(np.rint(255 * picture).reshape(-1, 3), axis=0))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
    for axis, shown, title in zip(
        axes,
        (picture, grid, best),
        (f"{colors:,} colours, 24 bits a pixel", "16 on a grid, 4 bits", "16 by k-means, 4 bits"),
        strict=True,
    ):
        rms = 255 * np.sqrt(np.mean((shown - picture) ** 2))
        axis.imshow(shown, interpolation="nearest")
        axis.set_title(title if shown is picture else f"{title}, off by {rms:.0f}", fontsize=10)
        axis.axis("off")
    figure.savefig(PAGE, dpi=110)


if __name__ == "__main__":
    main()
