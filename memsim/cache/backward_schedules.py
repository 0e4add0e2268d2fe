"""Tile schedules of the backward pass of attention, for `replay`; sizes as in `tile_schedules`.

>>> from memsim.cache.replay import replay, total
>>> shape = AttentionShape(B=1, H=2, N=256, D=64)
>>> found = total(replay(*standard_backward(shape, rows=256), cache=0))
>>> (found.dram_read + found.dram_write) // (2 * 2) == 7 * 256**2 + 8 * 256 * 64  # Algorithm 3, elements
True
"""

from __future__ import annotations

from itertools import chain

from memsim.cache.replay import Access, Block, Kernel
from memsim.cache.tile_schedules import AttentionShape, Schedule, rows_of, tiles_of

__all__ = ["flash2_backward", "portable_backward", "standard_backward"]


def flash2_backward(shape: AttentionShape, *, rows: int, columns: int, workers: int = 1) -> Schedule:
    """Return Algorithm 2 of arXiv:2307.08691 as FlashAttention 2 launches it: three kernels.

    Row sums of dO O, where the fp32 dQ is set to zero; the loop with keys outside, which adds to it; and dQ
    in the inputs' format.
    """
    N, Tk, width, wide = shape.N, shape.keys, shape.D * shape.e, shape.D * 4
    sums, loop, convert = [], [], []
    for head in range(shape.heads):
        for queries in tiles_of(N, rows):
            moves = [rows_of(name, head, N, queries, width) for name in ("O", "dO")]
            moves.append(rows_of("delta", head, N, queries, 4, kind="write"))
            moves.append(rows_of("dQ sum", head, N, queries, wide, kind="write"))
            sums.append(Block(tuple(moves)))
            back = [rows_of("dQ sum", head, N, queries, wide)]
            back.append(rows_of("dQ", head, N, queries, width, kind="write"))
            convert.append(Block(tuple(back)))
        through = []  # all queries, the same for every tile of keys
        for queries in tiles_of(N, rows):
            through += [rows_of(name, head, N, queries, width) for name in ("Q", "dO")]
            through += [rows_of(name, head, N, queries, 4) for name in ("lse", "delta")]
            through.append(rows_of("dQ sum", head, N, queries, wide, kind="add"))
        for keys in tiles_of(Tk, columns):
            reads = [rows_of(name, head // shape.group, Tk, keys, width) for name in ("K", "V")]
            results = [rows_of(name, head, Tk, keys, width, kind="write") for name in ("dK", "dV")]
            loop.append(Block((*reads, *through, *results)))
    arrays = shape.arrays(("Q", "O", "dO", "dQ"), ("K", "V"), ("lse", "delta"))
    arrays |= dict.fromkeys(("dK", "dV"), shape.heads * Tk * width)
    arrays["dQ sum"] = shape.heads * N * wide
    named = (("flash2 row sums", sums), ("flash2 backward", loop), ("flash2 convert dQ", convert))
    return [Kernel(name, tuple(blocks), workers) for name, blocks in named], arrays


def portable_backward(
    shape: AttentionShape, *, rows: int, columns: int, workers: int = 1, causal: bool = False
) -> Schedule:
    """Return the order of ``cuda_backend.attention.backward_portable``: two kernels, and nothing added to.

    The first owns queries, the last ones of a head first, and writes dQ and the row sums of dO O; the second
    owns keys, and goes through the queries of every head that shares them.
    """
    N, Tk, width = shape.N, shape.keys, shape.D * shape.e
    query_tiles, key_tiles = tiles_of(N, rows), tiles_of(Tk, columns)
    pairs = [  # K and V of each key head, the same ones in all blocks that read them
        [tuple(rows_of(name, head, Tk, keys, width) for name in ("K", "V")) for keys in key_tiles]
        for head in range(shape.heads // shape.group)
    ]
    queries_first, keys_first = [], []
    for head in range(shape.heads):
        for queries in reversed(query_tiles):
            reads = [rows_of(name, head, N, queries, width) for name in ("Q", "dO", "O")]
            sums = rows_of("delta", head, N, queries, 4, kind="write")
            seen = pairs[head // shape.group][: -(-(queries[0] + rows) // columns) if causal else None]
            result = rows_of("dQ", head, N, queries, width, kind="write")
            lse = rows_of("lse", head, N, queries, 4)
            queries_first.append(Block((*reads, sums, lse, *chain.from_iterable(seen), result)))
    for key_head in range(shape.heads // shape.group):
        through = [  # of each query head that shares it, what a tile of queries needs
            [
                (
                    *(rows_of(name, head, N, queries, width) for name in ("Q", "dO")),
                    *(rows_of(name, head, N, queries, 4) for name in ("lse", "delta")),
                )
                for queries in query_tiles
            ]
            for head in range(key_head * shape.group, (key_head + 1) * shape.group)
        ]
        for keys, pair in zip(key_tiles, pairs[key_head], strict=True):
            first = keys[0] // rows if causal else 0
            moves = chain.from_iterable(chain.from_iterable(tiles[first:] for tiles in through))
            results = [rows_of(name, key_head, Tk, keys, width, kind="write") for name in ("dK", "dV")]
            keys_first.append(Block((*pair, *moves, *results)))
    arrays = shape.arrays(("Q", "O", "dO", "dQ"), ("K", "V", "dK", "dV"), ("lse", "delta"))
    named = (("portable dQ", queries_first), ("portable dK, dV", keys_first))
    return [Kernel(name, tuple(blocks), workers) for name, blocks in named], arrays


def standard_backward(shape: AttentionShape, *, rows: int, workers: int = 1) -> Schedule:
    """Return Algorithm 3 of arXiv:2205.14135 in kernels one after the other, P kept from the forward pass.

    A block of dV and dK has the scores of some keys with all queries, counted as if they lay together.
    """
    N, Tk, width = shape.N, shape.keys, shape.D * shape.e
    passes: dict[str, list[Block]] = {
        name: [] for name in ("dP = dO Vᵀ", "dV = Pᵀ dO", "dS = softmax'(dP)", "dQ = dS K", "dK = dSᵀ Q")
    }
    for head in range(shape.heads):
        whole = {name: rows_of(name, head // shape.group, Tk, (0, Tk), width) for name in ("K", "V")}
        whole |= {name: rows_of(name, head, N, (0, N), width) for name in ("Q", "dO")}
        for queries in tiles_of(N, rows):
            P, dP, dS = (rows_of(name, head, N, queries, Tk * shape.e) for name in ("P", "dP", "dS"))
            dO, dQ = (rows_of(name, head, N, queries, width) for name in ("dO", "dQ"))
            passes["dP = dO Vᵀ"].append(Block((dO, whole["V"], dP._replace(kind="write"))))
            passes["dS = softmax'(dP)"].append(Block((P, dP, dS._replace(kind="write"))))
            passes["dQ = dS K"].append(Block((dS, whole["K"], dQ._replace(kind="write"))))
        for keys in tiles_of(Tk, rows):
            for name, scores, other in (("dV = Pᵀ dO", "P", "dO"), ("dK = dSᵀ Q", "dS", "Q")):
                strip = Access(scores, (head * Tk + keys[0]) * N * shape.e, keys[1] * N * shape.e)
                result = rows_of(name[:2], head, Tk, keys, width, kind="write")
                passes[name].append(Block((strip, whole[other], result)))
    arrays = shape.arrays(("Q", "dO", "dQ"), ("K", "V"))
    arrays |= dict.fromkeys(("dK", "dV"), shape.heads * Tk * width)
    arrays |= dict.fromkeys(("P", "dP", "dS"), shape.heads * N * Tk * shape.e)
    return [Kernel(name, tuple(blocks), workers) for name, blocks in passes.items()], arrays
