"""What a portable product of codes is compiled for: where it begins and ends, its tiles and threads."""

from __future__ import annotations

from typing import NamedTuple

from cuda_backend._numba import SIMULATOR

__all__ = ["CODES_PER_WORD", "Variant", "choose"]

CODES_PER_WORD = 4  # what one instruction multiplies
LARGEST_TILE, SMALLEST_TILE = 128, 32
SIMULATED_TILE = 4
PAD = 4  # words between the columns of a tile: what the threads of a warp store lies in different banks


class Variant(NamedTuple):
    """One compiled kernel.

    Threads stand in a grid of `side` x `side`; thread (y, x) owns rows y, y + side, ... and columns x,
    x + side, ... of a tile.

    Attributes
    ----------
    begin
        What a tile of the output starts from: "codes", whose product it computes; "product", an int32 matrix;
        "output", itself.  The first two are then scaled, unless the kernel ends with the product.
    kind
        Format of the output: "int32", or that of the activations.
    bias
        Added after scaling.
    outliers
        "" for none, or the convention under which columns set aside are multiplied: "released" with the
        dequantised codes of the weight, "paper" with the weight itself.
    a_words, b_words
        Whether codes are read as words of four, or as bytes.
    BM, BN, BK
        Rows and columns of a tile, words of its codes along K.
    side
        Threads, a power of two.
    """

    begin: str
    kind: str
    bias: bool = False
    outliers: str = ""
    a_words: bool = True
    b_words: bool = True
    BM: int = LARGEST_TILE
    BN: int = LARGEST_TILE
    BK: int = 8
    side: int = 16

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.side * self.side

    @property
    def a_stride(self) -> int:
        """Words from a column of a tile of A to the next."""
        return self.BM + PAD

    @property
    def b_stride(self) -> int:
        """Words from a row of a tile of B to the next."""
        return self.BN + PAD

    @property
    def b_offset(self) -> int:
        """Where the tile of B starts, in words."""
        return self.BK * self.a_stride

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return 4 * (self.b_offset + self.BK * self.b_stride)


def choose(variant: Variant, rows: int, columns: int) -> Variant:
    """Return `variant` with tiles for an output of `rows` x `columns`, no wider than it needs."""
    if SIMULATOR:
        return variant._replace(BM=SIMULATED_TILE, BN=SIMULATED_TILE, BK=2, side=2)

    def tile(n: int) -> int:
        return min(LARGEST_TILE, max(SMALLEST_TILE, 1 << (n - 1).bit_length()))

    return variant._replace(BM=tile(rows), BN=tile(columns))
