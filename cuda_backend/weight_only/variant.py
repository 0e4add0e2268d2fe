"""What a decoding kernel is compiled for, how its weight lies in memory, and where things lie on the chip."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MOST_TOKENS", "ROWS", "Grid", "Stream", "Variant", "Wide", "choose", "choose_nf4_hopper", "deep"]

ROWS = 16  # output features of a tile: what one product of a warp has
MOST_TOKENS = 16
CHUNK_BYTES = 2048  # of codes that a warp asks for at once: 4 vectors of 16 bytes a lane
BLOCK = 64  # weights that share an absmax in NF4
SHARED_LIMIT = 232_448  # bytes that a block may use on sm_90
RESERVED = 1024  # of shared memory, for each block, by the system
TABLE_BYTES = 1 << 16  # of pairs of NF4 levels: 256 rows of 256 bytes, the first half of each in use
SLACK = 256  # by which a base is aligned
MAP_BYTES = 1024  # of levels of absmax codes
TILES = 4  # that share activations in `Wide`
STAGE_BYTES = TILES * (CHUNK_BYTES // 2 + 4 * ROWS)  # of what the copy engine brings at once


class Grid(NamedTuple):
    """A launch of a kernel: blocks, bytes of dynamic shared memory, and the most parts of tiles of a warp."""

    blocks: int
    shared_bytes: int
    parts: int = 0


class Variant(NamedTuple):
    """One compiled kernel for any GPU, `cuda_backend.weight_only.decode`.

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
    early
        Whether it may start before the grid ahead of it has ended, which takes compute capability 9.0.
    """

    weight: str
    kind: str
    warps: int
    wide: bool
    resident: bool
    depth: int = 2
    early: bool = False

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
        return self.map_at + (MAP_BYTES if self.weight == "nf4" else 0)

    def shared_bytes(self, tokens: int, K: int) -> int:
        """Dynamic shared memory, with slack for alignment."""
        return SLACK + self.x_at + (tokens * x_pitch(K) if self.resident else 0)

    def grid(self, tokens: int, K: int, N: int, processors: int) -> Grid:
        """Return how a layer is launched on so many multiprocessors."""
        return Grid(min(-(-N // ROWS), self.blocks * processors), self.shared_bytes(tokens, K))


class Stream(NamedTuple):
    """One compiled kernel for up to 2, 4 or 8 `tokens`, `cuda_backend.weight_only.stream_nf4`."""

    kind: str
    tokens: int
    warps: int = 16

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def columns(self) -> int:
        """Blocks of 64 weights that share a product of tensor cores."""
        return min(4, 8 // self.tokens)

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds."""
        return 1

    def grid(self, tokens: int, K: int, N: int, processors: int) -> Grid:
        """Return how a layer is launched; shared memory holds tables, activations, sums of parts of tiles."""
        tiles = -(-N // ROWS)
        blocks = min(tiles, processors)
        parts = _parts(tiles, K // deep("nf4"), blocks, self.warps)
        sums = 4 * ROWS * self.tokens * self.warps * parts
        return Grid(blocks, SLACK + TABLE_BYTES + MAP_BYTES + 2 * tokens * K + sums, parts)


class Wide(NamedTuple):
    """One compiled kernel for up to 8 or 16 `tokens`, `cuda_backend.weight_only.wide_nf4`."""

    kind: str
    tokens: int
    warps: int = 8
    depth: int = 3

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def part_bytes(self) -> int:
        """Bytes of the sums of four tiles."""
        return 4 * TILES * ROWS * self.tokens

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds."""
        return 1

    def grid(self, _tokens: int, K: int, N: int, processors: int) -> Grid:
        """Return how a layer is launched; shared memory holds tables, stages, sums but for a warp's last."""
        fours = -(-N // (ROWS * TILES))
        blocks = min(fours, processors)
        parts = _parts(fours, 2 * (K // deep("nf4")), blocks, self.warps)
        stages = self.warps * self.depth * (STAGE_BYTES + 8)
        sums = self.warps * (parts - 1) * self.part_bytes
        return Grid(blocks, SLACK + TABLE_BYTES + MAP_BYTES + stages + sums, parts)


def _parts(things: int, units: int, blocks: int, warps: int) -> int:
    """Return the most things of `units` units that a warp may have a part of, divided evenly.

    >>> _parts(5, 4, 2, 3), _parts(4, 4, 2, 2), _parts(1, 1, 1, 8)
    (2, 2, 1)
    """
    per = -(-(-(-things // blocks) * units) // warps)
    return (per - 2) // units + 2 if per > 1 else 1


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


def choose_nf4_hopper(
    kind: str, tokens: int, K: int, N: int, processors: int, limit: int = SHARED_LIMIT
) -> Variant | Stream | Wide:
    """Return the variant for a layer in NF4 on Hopper.

    Where activations fit beside the tables, they lie there: `Stream` up to 8 tokens, and `Variant` for more.
    Where they do not, they are read once for 64 features: `Wide`.  docs/performance.md has the times.

    >>> layers = (1, 28672), (8, 8192), (16, 4096), (16, 8192), (8, 28672)
    >>> [type(choose_nf4_hopper("f16", M, K, 8192, 132)).__name__ for M, K in layers]
    ['Stream', 'Stream', 'Variant', 'Wide', 'Wide']
    """
    if tokens <= 8:
        stream = Stream(kind, 2 if tokens <= 2 else 4 if tokens <= 4 else 8)
        if stream.grid(tokens, K, N, processors).shared_bytes <= limit:
            return stream
    else:
        portable = choose("nf4", kind, tokens, K, limit)
        if portable.resident:
            return portable
    wide = Wide(kind, 8 if tokens <= 8 else 16)
    while wide.grid(tokens, K, N, processors).shared_bytes > limit:
        wide = wide._replace(depth=wide.depth - 1)
    return wide
