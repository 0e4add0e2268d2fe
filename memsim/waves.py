"""Matrix products in waves of tiles: what a GPU computes beside what was asked for.

A product of M x N outputs is cut into tiles of 256 x 128, one for each multiprocessor at a time, so the last
wave, and tiles at the edges, are computed as if they were whole.  That is no efficiency to be measured: it
follows from the shapes, and explains why a product on 109 tiles takes as long as one on 216.

>>> from memsim.formula import evaluate
>>> evaluate(extra("2048", "4608"), {"S": 108})  # 288 tiles in 3 waves of 108
Fraction(9, 8)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from memsim.derivation import Definition

__all__ = ["PRODUCTS", "TILE", "Product", "extra", "in_waves"]

# The tile that cuBLAS prefers on A100 where a product is large.
TILE = (256, 128)
_GUIDE = "NVIDIA Matrix Multiplication Background User's Guide, sections on tile and wave quantization"


class Product(NamedTuple):
    """Depth and width of one product of an operator of `memsim.roofline`; its rows are the tokens x."""

    name: str
    depth: str
    width: str


PRODUCTS = (
    Product("qkv", "h", "((A_q + A_k + A_v)/t)"),
    Product("out", "(A_o/t)", "h"),
    Product("up", "h", "max(1, (j - 1)*F/(max(1, L_f)*t))"),
    Product("down", "max(1, F/(max(1, L_f)*t))", "h"),
    Product("head", "h", "(V/t)"),
)


def extra(rows: str, columns: str) -> str:
    """Return the formula of computed over wanted outputs, with whichever way the tile lies fits better.

    >>> extra("2", "3")[:40]
    'min(ceil(ceil(2/256)*ceil(3/128)/S)*S*25'
    """
    height, width = TILE
    tiles = (f"ceil({rows}/{a})*ceil({columns}/{b})" for a, b in ((height, width), (width, height)))
    computed = ", ".join(f"ceil({count}/S)*S*{height}*{width}" for count in tiles)
    return f"min({computed})/({rows}*{columns})"


def in_waves(chain: Iterable[Definition]) -> Iterator[Definition]:
    """Yield a chain of formulas whose matrix products run in waves; it needs S, the multiprocessors."""
    products = {product.name: product for product in PRODUCTS}
    for definition in chain:
        kind, _, name = definition.name.partition("_")
        if kind not in ("f", "g") or name not in products:
            yield definition
            continue
        _, depth, width = products[name]
        once, flop = f"FLOP_{name}", f"FLOP_{name}"
        waves = extra("x", width)
        if kind == "g":  # gradients of inputs, and of weights
            once, waves = f"2*FLOP_{name}", f"{extra('x', depth)} + {extra(depth, width)}"
        if once not in definition.formula:
            raise ValueError(f"{definition.name}: expected {once} in {definition.formula!r}")
        yield Definition(f"waves_{definition.name}", waves, "1", f"waves, {definition.meaning}", _GUIDE)
        formula = definition.formula.replace(once, f"{flop}*waves_{definition.name}")
        yield definition._replace(formula=formula)
