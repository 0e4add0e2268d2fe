"""The product of codes for many rows on Hopper, played by all its roles: results are the definition's bits.

On the way nobody waits for what nobody does, reads a stage before it is full, overwrites one before all warps
have handed it back, or touches accumulators while products run: `test_int8_wide_mutants` shows that each is
seen.
"""

from __future__ import annotations

import pytest

from tests.cuda.int8_wide_played import Asked, played

# Steps along K: 1, which a tile in halves takes as 2; 2, the last ones; 3; more than two turns of the ring.
PRODUCTS = [
    Asked("int32", 128, 200, 300, 100, blocks=1),
    Asked("int32", 256, 130, 521, 256, blocks=3),
    Asked("int32", 128, 1, 1, 1, blocks=1),
    Asked("float16", 256, 200, 300, 1400, blocks=3),
    Asked("bfloat16", 256, 70, 520, 384, blocks=1, biased=False),
    Asked("float16", 128, 130, 136, 1930, blocks=3),
    Asked("bfloat16", 128, 1100, 130, 128, blocks=4, biased=False),  # two groups of rows of tiles
]
LAYERS = [
    Asked("float16", 128, 200, 260, 1500, blocks=3, beside=True),  # with no threshold
    Asked("bfloat16", 256, 130, 300, 100, blocks=1, number=0),
    Asked("float16", 128, 130, 141, 700, blocks=3, number=1),
    Asked("bfloat16", 256, 200, 300, 300, blocks=3, number=17, biased=False),
    Asked("float16", 256, 130, 520, 100, blocks=1, number=33),
    Asked("bfloat16", 128, 200, 260, 1500, blocks=3, number=33),
    Asked("float16", 128, 130, 141, 2200, blocks=4, number=70),
    Asked("bfloat16", 128, 130, 128, 300, blocks=1, number=33, room=32),
    Asked("float16", 256, 130, 300, 200, blocks=1, number=0, outliers="paper"),
    Asked("bfloat16", 128, 130, 141, 700, blocks=3, number=1, outliers="paper"),
    Asked("float16", 128, 200, 260, 1500, blocks=3, number=17, outliers="paper", biased=False),
    Asked("bfloat16", 256, 200, 300, 100, blocks=3, number=33, outliers="paper"),
    Asked("float16", 256, 130, 520, 600, blocks=1, number=70, outliers="paper"),
]
WHOLE = [  # tiles that are not in halves
    Asked("int32", 128, 200, 300, 100, blocks=1, halves=False),
    Asked("float16", 256, 200, 300, 1400, blocks=3, halves=False),
    Asked("float16", 128, 130, 141, 2200, blocks=4, number=70, halves=False),
    Asked("bfloat16", 256, 200, 300, 300, blocks=3, number=17, biased=False, halves=False),
    Asked("float16", 256, 130, 520, 100, blocks=1, number=33, halves=False),
    Asked("bfloat16", 128, 130, 141, 700, blocks=3, number=1, outliers="paper", halves=False),
    Asked("bfloat16", 256, 130, 300, 100, blocks=1, number=0, halves=False),
]


def words(asked: Asked) -> str:
    """Return a product's name."""
    outliers = "codes" if asked.number is None else f"{asked.number} {asked.outliers}"
    whole = "" if asked.halves else " whole"
    return f"{asked.kind} {asked.block_n}{whole} {asked.M}x{asked.N}x{asked.K} {asked.blocks} {outliers}"


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("asked", [*PRODUCTS, *LAYERS, *WHOLE], ids=words)
def test_products(asked: Asked, late: bool) -> None:
    assert played(asked, late=late) is None


def test_rings_are_short() -> None:
    """The products above go around them more than once."""
    assert {asked.variant.stages for asked in (*PRODUCTS, *LAYERS)} == {4, 6, 7}
