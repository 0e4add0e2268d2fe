"""What the Hopper products of codes are compiled for: tiles, stages, clusters, what follows the product."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CHUNK", "CONSUMERS", "LISTED", "NEAR", "STEP", "TAKEN_CHUNK", "Few", "Narrow", "Wide",
    "blocks_of_narrow", "choose", "choose_few", "one_kernel_wins",
]  # fmt: skip

SHARED_LIMIT = 232_448  # bytes a block may use on sm_90 (227 KiB)
STEP = 128  # codes of a row in one stage: one swizzled row of 128 bytes
CHUNK = 16  # outliers that one product of 16-bit numbers takes
TAKEN_CHUNK = 32  # outliers whose codes one product takes away
NEAR = 32  # outliers that a block of few rows has in shared memory: one for each lane of a warp
LISTED = 1024  # outliers whose columns a block knows in shared memory
CONSUMERS = 2  # warpgroups that multiply, 64 rows of a tile each
LARGEST_NARROW = 64
LARGEST_FEW, LARGEST_OF_MANY = 16, 2  # rows that one kernel takes: of few columns, of many
FEW_COLUMNS, SOME, MANY, SHORT = 1024, 2048, 8192, 4096  # columns; features
SMALL_TILE = 0.6
LAST = 2  # stages of a tile in halves that are multiplied half by half
HELD = 8  # vectors of x in the registers of a thread
START = 4
ROOM_BESIDE = 16 * 1024  # bytes of shared memory for blocks of a quantiser that has not ended


class Wide(NamedTuple):
    """A product for many rows, by persistent blocks.

    Attributes
    ----------
    kind
        Format of the output: "int32", "float16" or "bfloat16".
    outliers
        The convention that says what weights outliers meet, "released" or "paper"; if there are none, any.
    aligned
        Whether rows of the output begin at multiples of 16 bytes.
    block_n
        Columns of a tile; it has 128 rows.
    beside
        Whether it sets outliers aside itself, beside the product of all codes.
    halves
        Whether the last stages of a tile are multiplied half by half, beside scales of the other half.
    """

    kind: str
    outliers: str
    aligned: bool
    block_n: int
    beside: bool = False
    halves: bool = False

    @property
    def width(self) -> int:
        """Columns of a part: of a half, or of the whole tile."""
        return self.block_n // (2 if self.halves else 1)

    @property
    def last(self) -> int:
        """Stages that are multiplied half by half: as long as the scales of a half take."""
        return LAST if self.halves else 0

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return 64 * CONSUMERS

    @property
    def threads(self) -> int:
        """Threads of a block: a producer warpgroup and the consumers."""
        return 128 * (CONSUMERS + 1)

    @property
    def a_bytes(self) -> int:
        """Bytes of a tile of A in a stage."""
        return self.block_m * STEP

    @property
    def b_bytes(self) -> int:
        """Bytes of a tile of B in a stage."""
        return self.block_n * STEP

    @property
    def other_bytes(self) -> int:
        """Bytes behind the stages: a scale and a bias for each column, the list of outliers, barriers."""
        return 8 * self.block_n + 4 * LISTED * self.beside + 256

    @property
    def stages(self) -> int:
        """Tiles in flight: what fits beside 2 KiB of scales, the list of outliers and the barriers."""
        return min(8, (SHARED_LIMIT - 1024 - self.other_bytes) // (self.a_bytes + self.b_bytes))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: alignment slack, stages, and what is behind them."""
        return 1024 + self.stages * (self.a_bytes + self.b_bytes) + self.other_bytes


class Narrow(NamedTuple):
    """A product for few rows: the weight takes the place of A, and a cluster shares sums along K.

    Attributes
    ----------
    kind, outliers
        As of `Wide`.
    tokens
        Rows of X in a tile, a multiple of 8 up to 64.
    blocks
        Of a cluster, which shares a tile: 1, 2, 4 or 8.
    beside
        Whether it sees to outliers itself, from marks that an earlier kernel has left.
    alone
        Whether a block has a multiprocessor for itself.
    """

    kind: str
    outliers: str
    tokens: int
    blocks: int
    beside: bool = False
    alone: bool = False

    @property
    def features(self) -> int:
        """Rows of the weight in a tile."""
        return 64 * CONSUMERS

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers, a producer warp, and one that lists outliers."""
        return 128 * CONSUMERS + 32 + 32 * self.beside

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor has registers and shared memory for, at least."""
        return 1 if self.alone else 2

    @property
    def w_bytes(self) -> int:
        """Bytes of a tile of the weight in a stage."""
        return self.features * STEP

    @property
    def x_bytes(self) -> int:
        """Bytes of a tile of X in a stage."""
        return self.tokens * STEP

    @property
    def token_step(self) -> int:
        """Tokens from one whose outputs a thread writes to its next."""
        return self.blocks * 128 * CONSUMERS // self.features

    @property
    def own_tokens(self) -> int:
        """Tokens whose outputs a thread writes, at most."""
        return max(1, self.tokens // self.token_step)

    @property
    def own_rows(self) -> int:
        """Tokens whose outputs a block writes, at most."""
        return self.own_tokens * 128 * CONSUMERS // self.features

    @property
    def together(self) -> int:
        """Of the tokens of a thread, how many at once."""
        return min(8 if self.alone else 4, self.own_tokens)

    @property
    def met_bytes(self) -> int:
        """Bytes of what the first outliers meet in the columns of a tile: codes, or numbers of 16 bits."""
        return NEAR * self.features * (1 if self.outliers == "released" else 2)

    @property
    def number_bytes(self) -> int:
        """Bytes of what a token holds at an outlier: a number, and the code that is taken away."""
        return 5 if self.outliers == "released" else 4

    @property
    def other_bytes(self) -> int:
        """Bytes behind the stages: barriers; the first outliers, their numbers in x, their codes."""
        outliers = 4 * NEAR + self.number_bytes * self.own_rows * NEAR + self.met_bytes
        return 256 + self.beside * outliers

    @property
    def stages(self) -> int:
        """Tiles in flight, which leave room for a second block or not."""
        limit = SHARED_LIMIT - ROOM_BESIDE if self.alone else SHARED_LIMIT // 2
        return min(8, (limit - 2048 - self.other_bytes) // (self.w_bytes + self.x_bytes))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: alignment slack, stages, and what is behind them."""
        return 1024 + self.stages * (self.w_bytes + self.x_bytes) + self.other_bytes


class Few(NamedTuple):
    """A whole layer for few rows: each block quantises what it multiplies, a cluster shares the rest.

    Attributes
    ----------
    kind
        Format of x and of the output.
    rows
        At most as many rows of x: a power of two up to 16.
    blocks
        Of a cluster, which shares a tile of 128 outputs.
    room
        Steps of 128 features that a block works on, at most: a power of two.
    alone
        Whether a block has a multiprocessor for itself.
    """

    kind: str
    rows: int
    blocks: int
    room: int
    alone: bool

    @property
    def tokens(self) -> int:
        """Rows of x in a product, a multiple of 8."""
        return max(8, self.rows)

    @property
    def features(self) -> int:
        """Rows of the weight in a tile."""
        return 64 * CONSUMERS

    @property
    def threads(self) -> int:
        """Threads of a block: the consumers and a producer warp."""
        return 128 * CONSUMERS + 32

    @property
    def vectors(self) -> int:
        """Vectors of eight numbers of x that a thread holds."""
        return max(1, self.rows * self.room // 16)

    @property
    def w_bytes(self) -> int:
        """Bytes of a tile of the weight in a stage."""
        return self.features * STEP

    @property
    def x_bytes(self) -> int:
        """Bytes of the codes of x for one stage; all of them stay."""
        return self.tokens * STEP

    @property
    def stages(self) -> int:
        """Tiles in flight, which leave room for a second block or not."""
        limit = SHARED_LIMIT if self.alone else SHARED_LIMIT // 2 - 1024
        return min(8, (limit - 1024 - 256 - 4096 - self.room * self.x_bytes) // self.w_bytes)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: alignment slack, stages, codes, barriers; 4 KiB are static."""
        return 1024 + self.stages * self.w_bytes + self.room * self.x_bytes + 256


def choose_few(kind: str, M: int, N: int, K: int, processors: int) -> Few | None:
    """Return the variant that is a whole layer, if a thread can hold its part of x.

    As many blocks share a tile as in `choose`, or more of them, so that their parts are small enough.

    >>> choose_few("float16", 1, 4096, 4096, 132), choose_few("float16", 16, 8192, 28672, 132)
    (Few(kind='float16', rows=1, blocks=2, room=16, alone=True), None)
    """
    if not 0 < M <= LARGEST_FEW or not N or not K or K % 8:
        return None
    steps, tiles = -(-K // STEP), -(-N // (64 * CONSUMERS))
    blocks = blocks_of_narrow(tiles, steps, processors)
    while blocks <= 8:
        room = max(2, 1 << (-(-steps // blocks) - 1).bit_length())
        alone = tiles <= clusters_at_once(blocks, processors)
        variant = Few(kind, 1 << (M - 1).bit_length(), blocks, room, alone)
        if variant.vectors <= HELD and variant.stages >= 4:
            return variant
        blocks *= 2
    return None


def one_kernel_wins(M: int, N: int, K: int) -> bool:
    """Return whether a layer of few rows is taken as one kernel, not as a quantiser and a product.

    Every cluster quantises x again, which costs more the more rows there are, and the more the shorter the
    rest takes; the time of a launch is saved.  Measured on an H200 in float16, us of one kernel and of two,
    K x N: 8192 x 1024 10.0 and 11.8 for 1 row, 13.6 and 14.6 for 16; 4096 x 1024 8.3 and 10.7, 10.3 and 11.0;
    4096 x 2048 10.4 and 11.4, 11.0 and 11.6 for 4, 13.2 and 11.7 for 16; 8192 x 2048 13.4 and 13.5, 15.3 and
    14.6 for 4; 4096 x 11008 18.1 and 20.4, 19.4 and 20.5 for 2, 21.8 and 20.8 for 4; 4096 x 14336 21.2 and
    23.4; 4096 x 4096 13.7 and 13.2; 8192 x 8192 24.1 and 24.3, 28.2 and 26.1 for 4; 8192 x 28672 66.9 and
    63.1; 11008 x 4096 22.3 and 20.8.  What is between these was not measured.

    >>> [one_kernel_wins(M, N, K) for M, N, K in ((1, 4096, 4096), (2, 11_008, 4096), (4, 11_008, 4096))]
    [False, True, False]
    """
    if N <= FEW_COLUMNS:
        return M <= LARGEST_FEW
    return M <= LARGEST_OF_MANY and K <= SHORT and not SOME < N < MANY


def choose(kind: str, outliers: str, M: int, N: int, K: int, processors: int) -> Wide | Narrow:
    """Return the variant for a product of M x K and K x N codes.

    Parameters
    ----------
    kind, outliers : str
        As of `Wide`.
    M, N, K : int
        Sizes.
    processors : int
        Streaming multiprocessors.

    Notes
    -----
    A tile of 128 x 128 takes `SMALL_TILE` of the time of one of 128 x 256; the least sum of waves wins.  Few
    rows, or tiles for less than a quarter of the processors, go the narrow way.  Tiles in halves read A twice
    from shared memory and wait for outliers earlier: they pay where tiles of 128 x 256 fill the GPU.

    Examples
    --------
    >>> choose("float16", "released", 16, 4096, 4096, 132)
    Narrow(kind='float16', outliers='released', tokens=16, blocks=2, beside=False, alone=True)
    >>> [choose("float16", "released", M, 4096, 4096, 132)[3] for M in (4096, 256)]
    [256, 128]
    """
    rows = -(-M // (64 * CONSUMERS))
    if M <= LARGEST_NARROW or 4 * rows * -(-N // 128) < processors:
        tokens = next(tokens for tokens in (8, 16, 32, 64) if tokens >= min(M, LARGEST_NARROW))
        tiles = -(-M // tokens) * -(-N // (64 * CONSUMERS))
        blocks = blocks_of_narrow(tiles, -(-K // STEP), processors)
        return Narrow(kind, outliers, tokens, blocks, alone=tiles <= clusters_at_once(blocks, processors))
    item = 4 if kind == "int32" else 2

    def cost(block_n: int) -> float:
        waves = -(-rows * -(-N // block_n) // processors)
        return waves * (1.0 if block_n == 256 else SMALL_TILE)

    block_n = min((256, 128), key=cost)
    halves = block_n == 256 and 4 * rows * -(-N // block_n) >= 3 * processors
    return Wide(kind, outliers, item * N % 16 == 0, block_n, halves=halves)


def clusters_at_once(blocks: int, processors: int) -> int:
    """Return how many clusters of so many blocks run at once, a block on each multiprocessor.

    A cluster lies within a part of the GPU (a GPC), whose multiprocessors are no multiple of four: an H200
    has 132 of them and runs 66 clusters of two, but 30 of four.

    >>> [clusters_at_once(blocks, 132) for blocks in (1, 2, 4, 8)]
    [132, 66, 30, 15]
    """
    usable = processors if blocks <= 2 else processors * 10 // 11
    return max(1, usable // blocks)


def blocks_of_narrow(tiles: int, steps: int, processors: int) -> int:
    """Return how many blocks share a tile, 1, 2, 4 or 8: as many as run at once for all tiles.

    A block costs `START` steps beside its own; of several that take as many waves the least time wins, then
    the fewest blocks: measured so on an H200, at every size tried.

    >>> blocks_of_narrow(32, 32, 132), blocks_of_narrow(16, 64, 132), blocks_of_narrow(224, 64, 132)
    (2, 4, 1)
    """

    def cost(blocks: int) -> tuple[int, int]:
        waves = -(-tiles // clusters_at_once(blocks, processors))
        return waves, waves * (-(-steps // blocks) + START)

    return min((blocks for blocks in (1, 2, 4, 8) if blocks <= max(1, steps)), key=cost)
