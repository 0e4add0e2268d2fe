"""A drawn image in 16 colours: by k-means, and by the palette that is spread evenly over all colours.

``python -m tests.quant.palette docs/codebook.png`` draws the picture of ``docs/apply.md``.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np

from refimpl.quant.codebook import codebook, codebook_dequantize

HEIGHT, WIDTH, COLORS = 96, 144, 16


def image(seed: int = 0) -> Any:
    """An evening: sky, sun, hills, water with waves, grain; 8 bits a channel, shape (HEIGHT, WIDTH, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : HEIGHT * 1j, 0 : WIDTH / HEIGHT : WIDTH * 1j]
    sky = np.stack([0.25 + 0.9 * y, 0.2 + 0.55 * y, 0.5 - 0.1 * y], axis=2)
    glow = np.exp(-12 * ((x - 1.0) ** 2 + (y - 0.42) ** 2))[..., None]
    picture = sky + glow * [0.5, 0.35, 0.05]
    picture[(x - 1.0) ** 2 + (y - 0.42) ** 2 < 0.008] = [1.0, 0.92, 0.6]
    for height, color in ((0.5, [0.3, 0.22, 0.35]), (0.57, [0.14, 0.2, 0.2])):
        rough = sum(rng.uniform(0.005, 0.03) * np.sin(f * x + rng.uniform(0, 6)) for f in (3, 7, 13, 29))
        picture[y > height + rough] = color
    water = y > 0.68
    waves = 0.12 * np.sin(90 * y**2 + 3 * np.sin(9 * x))[..., None] * [1, 0.8, 0.4]
    mirrored = picture[::-1][np.clip(np.arange(HEIGHT) - 34, 0, None)]
    picture[water] = (0.6 * mirrored + waves + [0.0, 0.03, 0.1])[water]
    picture += 0.015 * rng.standard_normal(picture.shape)
    return np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)


def uniform_palette() -> Any:
    """16 colours: two levels of red and blue, four of green, in the middle of equal parts of the range."""
    levels = [(np.arange(n) + 0.5) / n * 255 for n in (2, 4, 2)]
    return np.array(list(itertools.product(*levels)))


def drawn_palette(picture: Any) -> Any:
    """16 of the image's own colours, evenly spaced in order of brightness: where k-means starts."""
    pixels = picture.reshape(-1, 3).astype(np.float64)
    order = np.argsort(pixels.sum(axis=1), kind="stable")
    return pixels[order[len(order) // (2 * COLORS) :: len(order) // COLORS]]


def in_colors(picture: Any, palette: Any, *, rounds: int = 0) -> tuple[Any, float]:
    """The picture in a palette after so many rounds of Lloyd, and its mean squared error a channel."""
    pixels = picture.reshape(-1, 3).astype(np.float64)
    found = codebook_dequantize(*codebook(pixels, palette, iterations=rounds))
    error = float(np.mean((found - pixels) ** 2))
    return np.rint(found).astype(np.uint8).reshape(picture.shape), error


def main(path: str) -> None:
    from matplotlib.figure import Figure

    picture = image()
    panels: list[tuple[str, Any, Any]] = [
        ("24 bits a pixel", picture, None),
        ("16 colors, spread evenly", *in_colors(picture, uniform_palette())),
        ("16 colors, k-means", *in_colors(picture, drawn_palette(picture), rounds=200)),
    ]
    figure = Figure(figsize=(8.4, 2.2), layout="constrained")
    for axes, (title, shown, error) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(shown, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title if error is None else f"{title}: error {error:.0f}", fontsize=9)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
