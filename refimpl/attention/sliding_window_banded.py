"""Sliding-window attention computed as a band: blocks of queries, each with the keys around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np

from refimpl.attention.dense import AttentionGradients, AttentionOutput
from refimpl.attention.patterns import Tile, blocks_of, looks_back_only, self_shape, tiled, tiled_vjp
from refimpl.attention.scores import AttentionOptions
from refimpl.memory import Memory
from refimpl.numerics import FloatArray
from refimpl.registry import implements
from refimpl.validation import whole

__all__ = [
    "sliding_window_attention_banded",
    "sliding_window_attention_banded_vjp",
    "window_block",
    "window_tiles",
]

SHORTEST_BLOCK = 16  # queries of a block of a narrow window: below it the loop costs more than the products


def window_block(radius: int, block_size: int | None) -> int:
    """Return the queries of a tile: `block_size`, or as many as a side of the window, 16 at least."""
    return max(radius, SHORTEST_BLOCK) if block_size is None else whole("block_size", block_size)


def window_tiles(
    length: int,
    radius: int,
    block_size: int,
    *,
    backward: bool,
    sequences: Sequence[int],
    heads: Sequence[int],
) -> Iterator[Tile]:
    """Yield the band in tiles of `block_size` queries and the keys within `radius` of any of them.

    If `backward`, keys after a tile's last query are left out: a causal mask hides them.
    """
    for rows in blocks_of(np.arange(length), block_size):
        first, last = int(rows[0]), int(rows[-1])
        end = last + 1 if backward else min(length, last + radius + 1)
        columns = np.arange(max(0, first - radius), end)
        yield Tile(sequences, heads, rows, columns, np.abs(rows[:, None] - columns) <= radius)


@implements("attention.sliding_window", backend="numpy")
def sliding_window_attention_banded(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    return_lse: bool = False,
    block_size: int | None = None,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `sliding_window_attention`, computed in blocks of queries: O(N radius) time and memory.

    Parameters
    ----------
    q, k, v, radius, return_lse, **options
        As for `sliding_window_attention`.
    block_size : int, optional
        Queries of a block; it reads ``block_size + 2 radius`` keys.  Default ``max(radius, 16)``.
    memory : Memory, optional
        Counts traffic and operations.

    Returns
    -------
    ndarray or AttentionOutput
        As `sliding_window_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `sliding_window_attention`, and if `block_size` is not positive.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, appendix A (blocks that overlap: "chunks").

    Examples
    --------
    >>> from refimpl.attention import sliding_window_attention
    >>> x = np.random.default_rng(0).standard_normal((1, 40, 1, 4))
    >>> banded = sliding_window_attention_banded(x, x, x, radius=3)
    >>> bool(np.allclose(banded, sliding_window_attention(x, x, x, radius=3)))
    True
    """
    tiles = _tiles(q, k, v, radius, block_size, options)
    return tiled(q, k, v, tiles, options, return_lse=return_lse, memory=memory)


def sliding_window_attention_banded_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    radius: int,
    block_size: int | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `sliding_window_attention_banded`, in O(N radius) time and memory.

    Raises
    ------
    UnsupportedError
        With `bias`, whose gradient is as large as the scores.

    Examples
    --------
    >>> x = np.ones((1, 3, 1, 4))
    >>> sliding_window_attention_banded_vjp(x, x, x, x, radius=0).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    return tiled_vjp(q, k, v, do, _tiles(q, k, v, radius, block_size, options), options)


def _tiles(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    radius: int,
    block_size: int | None,
    options: AttentionOptions,
) -> Iterator[Tile]:
    shape, radius = self_shape(q, k, v), whole("radius", radius, 0)
    return window_tiles(
        shape.Tq,
        radius,
        window_block(radius, block_size),
        backward=looks_back_only(options),
        sequences=range(shape.B),
        heads=range(shape.Hq),
    )
