"""What a decoding kernel is compiled for, how its weight lies in memory, and where things lie on the chip."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MOST_TOKENS", "ROWS", "Variant", "choose", "deep"]

ROWS = 16  # output features of a tile: what one product of a warp has
MOST_TOKENS = 16
CHUNK_BYTES = 2048  # of codes that a warp asks for at once: 4 vectors of 16 bytes a lane
BLOCK = 64  # weights that share an absmax in NF4
SHARED_LIMIT = 232_448  # bytes that a block may use on sm_90
RESERVED = 1024  # of shared memory, for each block, by the system
TABLE_BYTES = 1 << 16  # of pairs of NF4 levels: 256 rows of 256 bytes, the first half of each in use


class Variant(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    weight
        ``"int8"`` or ``"nf4"``.
    kind
        ``"f16"`` or ``"bf16"``: the format of activations and outputs.
    warps
        Of a block; they share the input features of a tile.
    wide
        Whether there are more than 8 tokens, the columns of one product.
    resident
        Whether all activations lie in shared memory, or are read from global memory as they are needed.
    depth
        Chunks in flight for each warp.
    """

    weight: str
    kind: str
    warps: int
    wide: bool
    resident: bool
    depth: int = 2

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor shall hold."""
        return 2 if self.warps <= 8 else 1

    @property
    def sums(self) -> int:
        """Sums of a thread: four for each eight tokens."""
        return 8 if self.wide else 4

    @property
    def chunk(self) -> int:
        """Input features of a chunk of a tile."""
        return deep(self.weight)

    @property
    def table_at(self) -> int:
        """Where the tables of NF4 lie behind the sums of two tiles, at a multiple of 256."""
        return 2 * 4 * self.sums * self.threads

    @property
    def map_at(self) -> int:
        """Where the levels of absmax codes lie."""
        return self.table_at + (TABLE_BYTES if self.weight == "nf4" else 0)

    @property
    def x_at(self) -> int:
        """Where the activations lie."""
        return self.map_at + (1024 if self.weight == "nf4" else 0)

    def shared_bytes(self, tokens: int, K: int) -> int:
        """Dynamic shared memory, with slack for alignment."""
        return 256 + self.x_at + (tokens * x_pitch(K) if self.resident else 0)


def deep(weight: str) -> int:
    """Return the input features of a chunk: of 16 rows, what `CHUNK_BYTES` hold.

    >>> deep("int8"), deep("nf4")
    (128, 256)
    """
    return CHUNK_BYTES // ROWS * (2 if weight == "nf4" else 1)


def x_pitch(K: int) -> int:
    """Return the bytes from a token to the next in shared memory: two tokens in a row hit other banks.

    >>> x_pitch(256) % 128
    64
    """
    return 2 * K + 64


def choose(weight: str, kind: str, tokens: int, K: int, limit: int = SHARED_LIMIT) -> Variant:
    """Return the variant for a layer on a GPU whose blocks may use `limit` bytes of shared memory.

    Two blocks of 8 warps on a multiprocessor cover each other's reductions where their memory allows it.

    >>> choose("nf4", "f16", 1, 8192).warps, choose("nf4", "f16", 8, 8192).warps
    (8, 16)
    >>> choose("int8", "f16", 16, 28672).resident
    False
    """
    wide = tokens > 8
    small = Variant(weight, kind, 8, wide, resident=True)
    if 2 * (small.shared_bytes(tokens, K) + RESERVED) <= limit:
        return small
    large = Variant(weight, kind, 16, wide, resident=True)
    return large if large.shared_bytes(tokens, K) <= limit else large._replace(resident=False)
