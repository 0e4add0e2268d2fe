"""The shapes a portable backward kernel is compiled for: the tiles of both of its kernels."""

from __future__ import annotations

from typing import Literal

from cuda_backend.attention.variant_portable import Variant

__all__ = ["BackwardVariant", "Side"]

Side = Literal["queries", "keys"]


class BackwardVariant(Variant):
    """One compiled pair of backward kernels, with one layout of shared memory.

    In the kernel of the queries a block owns a tile of queries and walks over keys, in that of the keys the
    other way round.  Threads stand in a grid of `rows` x `columns`: thread (y, x) owns the rows y, y + rows,
    ... of the block's tile, where they meet rows x, x + columns, ... of a passing one, and their gradient at
    every `columns`-th channel.
    """

    __slots__ = ()

    def tile(self, side: Side) -> int:
        """Return the rows of a tile of queries or keys."""
        return self.Br if side == "queries" else self.Bc

    def padded(self, side: Side) -> int:
        """Return the rows that a tile has room for: either kernel cuts it by rows or by columns."""
        lanes = max(self.rows, self.columns)
        return -(-self.tile(side) // lanes) * lanes

    def channels(self, width: int) -> int:
        """Return how many of `width` channels a thread owns."""
        return max(1, -(-width // self.columns))

    def stride(self, width: int) -> int:
        """Return the floats from a row of a tile to the next: odd, so that a column meets every bank."""
        return (self.channels(width) * self.columns) | 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where Q, dO, K, V, P, dS, and the statistics of the queries, L and D, start, and where they end."""
        queries, keys = self.padded("queries"), self.padded("keys")
        wide, value_wide = self.stride(self.D), self.stride(self.Dv)
        scores = (queries | 1) * (keys | 1)
        sizes = (queries * wide, queries * value_wide, keys * wide, keys * value_wide)
        ends = [0]
        for size in (*sizes, scores, scores, queries, queries):
            ends.append(ends[-1] + size)
        return tuple(ends)
