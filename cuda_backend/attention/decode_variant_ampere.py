"""What the decoding kernel for tensor cores is compiled for, its places in shared memory, and its parts."""

from __future__ import annotations

import functools
from typing import NamedTuple

__all__ = ["DecodeVariant", "choose", "parts"]

KEYS = 16  # of one product
MOST_PARTS = 256  # of a cache: their log-sum-exps meet in shared memory
LEAST_KEYS = 256  # of a part, to be worth its beginning and its end
FULL = 0.96  # of the last wave of blocks
LINE = 128  # bytes of the L2 cache

# Keys of a step, warps, least stages, for one block of a multiprocessor: the first that there is room for.
# The first of each was the fastest on an H200 for D = Dv = 128 (docs/performance.md), the rest is unmeasured.
SMALLER = ((16, 4, 3), (16, 4, 2), (16, 2, 2), (16, 1, 2))
WHOLE, PAGED = ((32, 4, 3), *SMALLER), ((16, 8, 3), *SMALLER)
MOST_STAGES = 6
HINTED = 1  # steps of a warp, where launches begin early


class DecodeVariant(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    kind
        ``"f16"`` or ``"bf16"``.
    D, Dv
        Widths of a head, multiples of 16.
    rows
        Of a tile: queries that read the same keys, 8 or 16.
    paged
        Whether keys lie in pages.
    keys
        Of a step of a warp, a multiple of 16.
    warps, blocks
        Of a block, and of a multiprocessor.
    stages
        Steps of a warp in shared memory, all but one of them under way.
    ahead
        Bytes that a copy may bring to the L2 cache: 0, 64, 128 or 256.
    early
        Whether a launch may begin under the end of the one before it (`cuda_backend.ptx.grid`): from compute
        capability 9.0 on.
    hinted
        Steps of a warp that the L2 cache is asked for meanwhile.
    """

    kind: str
    D: int
    Dv: int
    rows: int
    paged: bool
    keys: int
    warps: int
    blocks: int
    stages: int
    ahead: int = 0
    early: bool = False
    hinted: int = 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def pitches(self) -> tuple[int, int]:
        """Bytes from a key to the next in K and V: eight rows of a block lie in different banks."""
        return 2 * self.D + 16, 2 * self.Dv + 16

    @property
    def stage_bytes(self) -> int:
        """Of one step of one warp."""
        return self.keys * sum(self.pitches)

    @property
    def sums_pitch(self) -> int:
        """Floats from a row of sums to the next, which a warp stores without conflicts."""
        return self.Dv + 4

    @property
    def sums_at(self) -> int:
        """Where the sums of the warps lie, behind maxima and totals, when the stages have been used."""
        return 8 * self.rows * self.warps

    @property
    def flag_at(self) -> int:
        """Where a block is told that it ends last, behind the weights of all parts."""
        return 4 * MOST_PARTS * self.rows

    @property
    def lse_at(self) -> int:
        """Where the log-sum-exps of rows over all parts lie."""
        return self.flag_at + 16

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, with slack for alignment."""
        ring = self.warps * self.stages * self.stage_bytes
        sums = self.sums_at + 4 * self.warps * self.rows * self.sums_pitch
        return 128 + max(ring, sums, self.lse_at + 4 * self.rows)


@functools.cache
def choose(
    kind: str, D: int, Dv: int, rows: int, paged: bool, limit: int, early: bool = False
) -> DecodeVariant:
    """Return the variant for `rows` queries a key head, on a GPU with `limit` bytes of shared memory a block.

    Copies bring whole lines to the L2 cache where a row of K and V fills lines.

    >>> choose("f16", 128, 128, 4, False, 232_448, True)[3:]
    (8, False, 32, 4, 1, 3, 128, True, 1)
    >>> choose("f16", 128, 128, 4, True, 232_448, True)[3:]
    (8, True, 16, 8, 1, 3, 128, True, 0)
    >>> choose("bf16", 256, 256, 4, True, 101_376)[3:]
    (8, True, 16, 2, 1, 2, 128, False, 0)
    """
    tile = 16 if rows > 8 and max(D, Dv) <= 128 else 8  # wider rows would not leave sums in registers
    lines = all(2 * width % LINE == 0 for width in (D, Dv))
    hinted = HINTED if early and lines and not paged else 0
    room = limit - 128
    for keys, warps, least in PAGED if paged else WHOLE:
        one = DecodeVariant(kind, D, Dv, tile, paged, keys, warps, 1, 1, LINE if lines else 0, early, hinted)
        found = one._replace(stages=min(MOST_STAGES, room // (warps * one.stage_bytes)))
        if found.stages >= least and found.shared_bytes <= limit:
            return found
    raise ValueError(f"no room for {D} + {Dv} numbers in {limit} bytes")


def parts(units: int, keys: int, slots: int) -> int:
    """Return in how many parts to cut each of `units` caches for `slots` blocks that run at once.

    The fewest whose last wave of blocks is as good as full, or else those whose last wave is the fullest.

    >>> parts(8, 32768, 132), parts(128, 131072, 132), parts(1, 300, 132), parts(264, 4096, 132)
    (16, 1, 2, 1)
    """
    most = max(1, min(MOST_PARTS, -(-keys // LEAST_KEYS)))

    def fullness(count: int) -> float:
        blocks = count * max(1, units)
        return blocks / (-(-blocks // slots) * slots)

    for count in range(1, most + 1):
        if fullness(count) >= FULL:
            return count
    return max(range(1, most + 1), key=fullness)
