"""The shapes a Hopper backward kernel is compiled for: tile sizes, stages, registers, shared memory."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from cuda_backend.attention.arguments import array_words
from cuda_backend.attention.tiles_backward_hopper import BackwardTiles
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_hopper import SUBTILE

__all__ = [
    "CONSUMERS",
    "DESCRIPTORS",
    "LARGEST_WIDTH",
    "BackwardPlaces",
    "BackwardVariant",
    "choose_backward",
]

CONSUMERS = 2  # warpgroups that compute, 64 keys each
DESCRIPTORS = 6  # of Q, K, V, dO, and of what is known of rows: shifts and deltas
LARGEST_WIDTH = 128  # of this kernel: dK and dV of 64 keys, in registers: 2 * 128 / 2 numbers a thread


class BackwardPlaces(NamedTuple):
    """Where in shared memory things lie, in bytes: tiles, statistics, barriers, the tile's number."""

    k_tile: int
    v_tile: int
    q_tiles: int
    do_tiles: int
    ds_tiles: int
    dq_tile: int
    shifts: int
    deltas: int
    k_full: int
    v_full: int
    kv_empty: int
    q_full: int
    q_empty: int
    do_full: int
    do_empty: int
    dq_full: int
    dq_empty: int
    tile_slot: int
    entries: int
    end: int


class _Fields(NamedTuple):
    kind: str
    d: int
    causal: bool
    deterministic: bool
    dropout: bool
    block_m: int
    swapped: bool
    stages: int
    ds_stages: int
    early_dv: bool
    mods: Mods | None = None


class BackwardVariant(BackwardTiles, _Fields):
    """One compiled kernel.

    Attributes
    ----------
    kind
        ``"f16"`` or ``"bf16"``.
    d
        Head dimension of q, k and v after padding: 64 or 128.
    causal
        Whether masks by position are compiled in.
    deterministic
        Whether key blocks add to dQ in turn, so that results repeat bit for bit.
    dropout
        Whether dropout is compiled in.
    block_m
        Queries of a tile.
    swapped
        Whether dQ is computed turned, rows being channels: with heads of 128 `block_m` may then be any
        multiple of 16.
    stages
        Tiles of Q, and of dO, in flight.
    ds_stages
        Tiles of dS: with two, one barrier a step is enough.
    early_dv
        Whether dV is issued before dS is computed, to run beside it; not with dropout.
    mods
        Functions of the user's to be compiled in; a kernel with them walks lists of tiles (`tile_lists`), one
        without (None) has neither.
    """

    __slots__ = ()

    @property
    def lists(self) -> bool:
        """Whether the kernel walks lists of tiles."""
        return self.mods is not None

    @property
    def addresses(self) -> int:
        """Arguments of 8 bytes: addresses; two words of dropout, or arrays of the user's."""
        if self.mods is None:
            return 7
        return 8 + sum(array_words(axes) for _, axes in self.mods.arrays)

    @property
    def block_n(self) -> int:
        """Keys of a tile."""
        return 64 * CONSUMERS

    @property
    def d_v(self) -> int:
        """Head dimension of v after padding."""
        return self.d

    @property
    def shares(self) -> int:
        """Parts of a dQ tile that lie one behind the other."""
        return CONSUMERS

    @property
    def share_bytes(self) -> int:
        """Bytes of the part of a dQ tile that one consumer computes, in float32."""
        return 4 * self.block_m * self.d // CONSUMERS

    @property
    def row_split(self) -> bool:
        """Whether a consumer computes 64 rows of a dQ tile; otherwise 64 of its columns."""
        return self.block_m == 64 * CONSUMERS and not self.swapped

    @property
    def dq_columns(self) -> int:
        """Columns of dQ, or with `swapped` rows, that one product of 64 rows gives."""
        return self.block_m if self.swapped else 64

    @property
    def places(self) -> BackwardPlaces:
        """Tiles at multiples of 1024 bytes, statistics, barriers of eight bytes each, then words."""
        sizes = (
            self.k_bytes, self.k_bytes, self.stages * self.q_bytes, self.stages * self.q_bytes,
            self.ds_stages * self.ds_bytes, CONSUMERS * self.share_bytes,
            self.stages * self.stat_pitch, self.stages * self.stat_pitch,
            8, 8, 8, *[8 * self.stages] * 4, 8 * CONSUMERS, 8 * CONSUMERS,
            16 if self.lists else 8, 8 * self.stages if self.lists else 0,
        )  # fmt: skip
        return BackwardPlaces(*accumulate(sizes, initial=0))


def choose_backward(
    kind: str, d_qk: int, d_v: int, causal: bool, *, deterministic: bool = False, dropout: bool = False
) -> BackwardVariant:
    """Return the variant for a problem.

    Parameters
    ----------
    kind : str
        ``"f16"`` or ``"bf16"``.
    d_qk, d_v : int
        Head dimensions, at most 128; the narrower one is filled with zeros.
    causal, deterministic, dropout : bool
        As `BackwardVariant` says.

    Examples
    --------
    >>> choose_backward("f16", 64, 64, True).block_m, choose_backward("f16", 128, 64, True).block_m
    (128, 64)
    """
    d = -(-max(d_qk, d_v) // SUBTILE) * SUBTILE
    block_m = 128 if d == 64 else 64
    return BackwardVariant(
        kind, d, causal, deterministic, dropout, block_m, swapped=False, stages=2, ds_stages=2, early_dv=False
    )
