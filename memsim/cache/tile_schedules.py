"""Which tiles a kernel reads and writes, and in which order: schedules for `memsim.cache.replay`.

Each function returns the kernels of one operation and the bytes of its arrays.  Sizes bear the letters of the
sources: B sequences, H query heads, G key heads, N queries, Tk keys, D wide; elements of e bytes.

>>> from memsim.cache.replay import replay
>>> kernels, arrays = flash2_forward(AttentionShape(B=1, H=2, N=256, D=64), rows=128, columns=128)
>>> replay(kernels, arrays, cache=1 << 20)[0].dram_read == 3 * 2 * 256 * 64 * 2
True
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from memsim.cache.replay import Access, Block, Kernel, Kind

__all__ = [
    "AttentionShape",
    "Schedule",
    "flash1_forward",
    "flash2_forward",
    "hopper_forward",
    "int8_gemm",
    "portable_forward",
    "rows_of",
    "standard_forward",
    "tiles_of",
]

Schedule = tuple[list[Kernel], dict[str, int]]


class AttentionShape(NamedTuple):
    """Sizes of attention; `Tk` and `G` are N and H unless given; an element takes `e` bytes."""

    B: int
    H: int
    N: int
    D: int
    Tk: int | None = None
    G: int | None = None
    e: int = 2

    @property
    def keys(self) -> int:
        """Keys of a head."""
        return self.N if self.Tk is None else self.Tk

    @property
    def heads(self) -> int:
        """Heads of all sequences."""
        return self.B * self.H

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.H // (self.G or self.H)

    def arrays(self, queries: Iterable[str], keys: Iterable[str], rows: Iterable[str] = ()) -> dict[str, int]:
        """Return bytes: of arrays like Q, like K, and of one fp32 number a query."""
        query, key = (n * self.D * self.e for n in (self.N, self.keys))
        return {
            **dict.fromkeys(queries, self.heads * query),
            **dict.fromkeys(keys, self.B * (self.G or self.H) * key),
            **dict.fromkeys(rows, 4 * self.heads * self.N),
        }


def tiles_of(length: int, size: int) -> list[tuple[int, int]]:
    """Return first row and rows of each tile; the last one may be shorter."""
    return [(start, min(size, length - start)) for start in range(0, length, size)]


def rows_of(
    array: str, head: int, length: int, tile: tuple[int, int], bytes_of_row: int, kind: Kind = "read"
) -> Access:
    """Return what is done with the rows of a tile of one head."""
    return Access(array, (head * length + tile[0]) * bytes_of_row, tile[1] * bytes_of_row, kind)


def flash1_forward(
    shape: AttentionShape, *, rows: int, columns: int, workers: int = 1, initialize: bool = False
) -> Schedule:
    """Return Algorithm 1 of arXiv:2205.14135: a block a head, keys and values outside, O and l, m in HBM."""
    N, Tk, width = shape.N, shape.keys, shape.D * shape.e
    blocks = []
    for head in range(shape.heads):
        moves = []
        if initialize:
            moves += [rows_of("O", head, N, (0, N), width, kind="write")]
            moves += [rows_of(name, head, N, (0, N), 4, kind="write") for name in ("l", "m")]
        for keys in tiles_of(Tk, columns):
            moves += [rows_of(name, head // shape.group, Tk, keys, width) for name in ("K", "V")]
            for queries in tiles_of(N, rows):
                moves.append(rows_of("Q", head, N, queries, width))
                moves.append(rows_of("O", head, N, queries, width, kind="update"))
                moves += [rows_of(name, head, N, queries, 4, kind="update") for name in ("l", "m")]
        blocks.append(Block(tuple(moves)))
    arrays = shape.arrays(("Q", "O"), ("K", "V"), ("l", "m"))
    return [Kernel("flash1 forward", tuple(blocks), workers)], arrays


def _forward(
    name: str,
    shape: AttentionShape,
    places: Iterable[tuple[int, tuple[int, int]]],
    columns: int,
    workers: int,
    *,
    causal: bool,
    backwards: bool,
    lse: bool,
) -> Schedule:
    """Return a forward pass with queries outside: a block for each head and tile of queries of `places`."""
    N, Tk, width = shape.N, shape.keys, shape.D * shape.e
    tiles = tiles_of(Tk, columns)
    pairs = {  # of each key head; the same ones in all blocks that read them
        head: [tuple(rows_of(array, head, Tk, tile, width) for array in ("K", "V")) for tile in tiles]
        for head in range(shape.heads // shape.group)
    }
    blocks = []
    for head, queries in places:
        seen = pairs[head // shape.group]
        if causal:
            seen = seen[: -(-sum(queries) // columns)]
        keys = chain.from_iterable(reversed(seen) if backwards else seen)
        results = [rows_of("O", head, N, queries, width, kind="write")]
        if lse:
            results.append(rows_of("lse", head, N, queries, 4, kind="write"))
        blocks.append(Block((rows_of("Q", head, N, queries, width), *keys, *results)))
    return [Kernel(name, tuple(blocks), workers)], shape.arrays(("Q", "O"), ("K", "V"), ("lse",) * lse)


def flash2_forward(
    shape: AttentionShape, *, rows: int, columns: int, workers: int = 1, causal: bool = False
) -> Schedule:
    """Return Algorithm 1 of arXiv:2307.08691, head by head, with the log-sum-exp; keys from the last on."""
    places = ((head, tile) for head in range(shape.heads) for tile in tiles_of(shape.N, rows))
    return _forward(
        "flash2 forward", shape, places, columns, workers, causal=causal, backwards=True, lse=True
    )


def portable_forward(
    shape: AttentionShape,
    *,
    rows: int,
    columns: int,
    workers: int = 1,
    causal: bool = False,
    lse: bool = False,
) -> Schedule:
    """Return the order of ``cuda_backend.attention.forward_portable``: in a head, the last queries first."""
    places = ((head, tile) for head in range(shape.heads) for tile in reversed(tiles_of(shape.N, rows)))
    return _forward("portable", shape, places, columns, workers, causal=causal, backwards=False, lse=lse)


def hopper_forward(
    shape: AttentionShape,
    *,
    rows: int,
    columns: int,
    section: int = 1,
    workers: int = 1,
    causal: bool = False,
    lse: bool = False,
) -> Schedule:
    """Return the schedule of ``cuda_backend.attention.schedule_hopper``, with `section` heads together."""
    return _forward(
        "hopper",
        shape,
        _sections(shape, rows, section, causal),
        columns,
        workers,
        causal=causal,
        backwards=True,
        lse=lse,
    )


def _sections(
    shape: AttentionShape, rows: int, section: int, causal: bool
) -> Iterator[tuple[int, tuple[int, int]]]:
    tiles = tiles_of(shape.N, rows)
    for first in range(0, shape.heads, section):
        for tile in reversed(tiles) if causal else tiles:
            for head in range(first, min(first + section, shape.heads)):
                yield head, tile


def standard_forward(shape: AttentionShape, *, rows: int, workers: int = 1) -> Schedule:
    """Return Algorithm 0 of arXiv:2205.14135: scores, softmax, and the product with V, a pass each.

    A block has all keys of its queries in one tile, so K and V are asked for once a tile of queries.
    """
    N, Tk, width = shape.N, shape.keys, shape.D * shape.e
    passes: dict[str, list[Block]] = {"S = Q Kᵀ": [], "P = softmax(S)": [], "O = P V": []}
    for head in range(shape.heads):
        for queries in tiles_of(N, rows):
            S, P = (rows_of(name, head, N, queries, Tk * shape.e) for name in ("S", "P"))
            Q, O = (rows_of(name, head, N, queries, width) for name in ("Q", "O"))  # noqa: E741
            K, V = (rows_of(name, head // shape.group, Tk, (0, Tk), width) for name in ("K", "V"))
            passes["S = Q Kᵀ"].append(Block((Q, K, S._replace(kind="write"))))
            passes["P = softmax(S)"].append(Block((S, P._replace(kind="write"))))
            passes["O = P V"].append(Block((P, V, O._replace(kind="write"))))
    arrays = shape.arrays(("Q", "O"), ("K", "V"))
    arrays |= dict.fromkeys(("S", "P"), shape.heads * N * Tk * shape.e)
    return [Kernel(name, tuple(blocks), workers) for name, blocks in passes.items()], arrays


def int8_gemm(
    *,
    M: int,
    N: int,
    K: int,
    rows: int = 128,
    columns: int = 256,
    depth: int = 128,
    group: int = 8,
    out: int = 2,
    workers: int = 132,
) -> Schedule:
    """Return the product of ``cuda_backend.int8.gemm_hopper``: down `group` tiles, then to the next column.

    Parameters
    ----------
    M, N, K : int
        Rows of A, columns of B, depth; B has K contiguous.
    rows, columns, depth : int
        Sizes of a tile and of its steps.
    group, out, workers : int
        Tiles of rows together, bytes of an output, persistent blocks.

    Returns
    -------
    Schedule
        Of the arrays A and B, int8, and C; scales are left out.  A step's rows lie apart in memory: A and B
        are counted as if they were stored tile by tile.
    """
    blocks = []
    downs, acrosses, steps = tiles_of(M, rows), tiles_of(N, columns), tiles_of(K, depth)
    A, B = (  # of each row of tiles, and of each column, its steps
        {
            tile: [Access(name, tile[0] * K + tile[1] * step[0], tile[1] * step[1]) for step in steps]
            for tile in tiles
        }
        for name, tiles in (("A", downs), ("B", acrosses))
    )
    for first in range(0, len(downs), group):
        for across in acrosses:
            for down in downs[first : first + group]:
                start = (down[0] * N + down[1] * across[0]) * out
                result = Access("C", start, down[1] * across[1] * out, "write")
                blocks.append(Block((*chain.from_iterable(zip(A[down], B[across], strict=True)), result)))
    return [Kernel("int8 product", tuple(blocks), workers)], {"A": M * K, "B": N * K, "C": M * N * out}
