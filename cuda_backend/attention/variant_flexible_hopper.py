"""The shapes a Hopper kernel with functions of the user's is compiled for: the dense ones', and more."""

from __future__ import annotations

from typing import NamedTuple

from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_hopper import SUBTILE, Variant

__all__ = ["FlexibleVariant", "candidates"]

WORK_BYTES = 16  # of a tile of query rows: row block, head, number of steps, one word spare
FEW_KEYS = 0.65  # time of a tile of 64 keys, in those of 128: measured are 0.60 to 0.66 (H200)


class FlexibleVariant(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    tiles
        Tiles, stages, registers and shared memory: those of the dense kernel, without its causal mask.
    mods
        Functions of the user's, compiled in.
    ragged
        Whether the last key tile reaches beyond the last key.
    words
        Whether what may be seen of a tile is read (`mask_words`); otherwise the mask is asked.
    folded
        Whether the scale goes into what the score function adds (`traced.folds`): scores are over the scale,
        by which the softmax multiplies them, as it does without such a function.
    """

    tiles: Variant
    mods: Mods
    ragged: bool
    words: bool = False
    folded: bool = False

    @property
    def work_slot(self) -> int:
        """Where in shared memory the words of a tile of query rows lie, by stage of Q, 16 bytes each.

        The dense kernel has the number of a tile there.
        """
        return -(-self.tiles.places.tile_slot // WORK_BYTES) * WORK_BYTES

    @property
    def step_slot(self) -> int:
        """Where the steps lie, by stage of K, `STEP_BYTES` each."""
        return self.work_slot + WORK_BYTES * self.tiles.q_stages

    @property
    def masked(self) -> bool:
        """Whether there can be tiles that need a mask."""
        return self.words or self.ragged or self.mods.mask is not None


def candidates(kind: str, d_qk: int, d_v: int) -> list[tuple[Variant, float]]:
    """Return the tiles that a call may use, each with the time of one against those of the first.

    With heads of 64, a tile of 192 rows takes 1.25 times as long as one of 128 (`variant_hopper.choose`).  A
    tile of 64 keys takes more than half as long as one of 128, whose products are longer, and is for masks of
    small blocks far apart, such as BigBird's.

    >>> [(tiles.block_m, tiles.block_n, time) for tiles, time in candidates("f16", 64, 40)]
    [(128, 128, 1.0), (192, 128, 1.25), (128, 64, 0.65)]
    """
    d_qk, d_v = -(-d_qk // SUBTILE) * SUBTILE, -(-d_v // SUBTILE) * SUBTILE
    widest = max(d_qk, d_v)
    if widest <= 64:
        narrow = Variant(kind, d_qk, d_v, False, consumers=2, block_n=128, stages=4, q_stages=2)
        return [(narrow, 1.0), (narrow._replace(consumers=3), 1.25), (narrow._replace(block_n=64), FEW_KEYS)]
    if widest <= 128:
        wide = Variant(kind, d_qk, d_v, False, consumers=2, block_n=128, stages=2, q_stages=2)
        return [(wide, 1.0), (wide._replace(block_n=64, stages=4), FEW_KEYS)]
    if d_v <= 128 and d_qk <= 192:
        return [(Variant(kind, d_qk, d_v, False, consumers=2, block_n=128, stages=2, q_stages=1), 1.0)]
    return [(Variant(kind, d_qk, d_v, False, consumers=2, block_n=80, stages=2, q_stages=1), 1.0)]
