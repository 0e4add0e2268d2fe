"""The shapes of the Hopper backward kernel for heads wider than 128: two consumers that do different things.

dK and dV of 64 keys are all the registers of two warpgroups: 128 numbers a thread each for 256 columns.  One
warpgroup has dV and computes P, the other has dK and computes dS, and each computes its columns of dQ.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from cuda_backend.attention.tiles_backward_hopper import BackwardTiles
from cuda_backend.attention.variant_hopper import SUBTILE

__all__ = ["WideBackwardPlaces", "WideBackwardVariant", "choose_wide_backward"]

KEYS = QUERIES = 64  # of a tile: rows of one wgmma


class WideBackwardPlaces(NamedTuple):
    """Where in shared memory things lie, in bytes: tiles, statistics, barriers, the tile's number."""

    k_tile: int
    v_tile: int
    q_tiles: int
    do_tiles: int
    ds_tile: int
    p_tile: int
    shifts: int
    deltas: int
    k_full: int
    v_full: int
    kv_empty: int
    q_full: int
    q_empty: int
    do_full: int
    do_empty: int
    ds_empty: int
    tile_slot: int
    end: int


class _Fields(NamedTuple):
    kind: str
    d: int
    d_v: int
    causal: bool
    deterministic: bool
    dropout: bool
    stages: int = 2
    mods: None = None


class WideBackwardVariant(BackwardTiles, _Fields):
    """One compiled kernel.

    Attributes
    ----------
    kind
        ``"f16"`` or ``"bf16"``.
    d, d_v
        Head dimensions of q and k, and of v, after padding to multiples of 64; `d` is at least 128.
    causal, deterministic, dropout
        As of `BackwardVariant`.
    stages
        Tiles of Q, and of dO, in flight.
    mods
        None: there are no functions of the user's.
    """

    __slots__ = ()

    @property
    def addresses(self) -> int:
        """Arguments of 8 bytes: addresses, and two words of dropout."""
        return 7

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return QUERIES

    @property
    def block_n(self) -> int:
        """Keys of a tile."""
        return KEYS

    @property
    def p_bytes(self) -> int:
        """Bytes of P in float32, as it lies in the registers of a warpgroup."""
        return 4 * KEYS * QUERIES

    @property
    def shares(self) -> int:
        """Parts of a dQ tile that lie one behind the other, of `dq_columns` columns."""
        return self.d // SUBTILE

    @property
    def share_bytes(self) -> int:
        """Bytes of such a part, in float32."""
        return 4 * QUERIES * SUBTILE

    @property
    def dq_columns(self) -> int:
        """Columns of such a part."""
        return SUBTILE

    @property
    def row_split(self) -> bool:
        """Whether parts are of rows: they are of columns."""
        return False

    @property
    def swapped(self) -> bool:
        """Whether dQ is computed turned."""
        return False

    def dq_shares(self, consumer: int) -> tuple[int, int]:
        """Return the first share of dQ that a consumer computes, and how many: half; the odd one is 0's.

        >>> choose_wide_backward("f16", 192, 128, True).dq_shares(0)
        (0, 2)
        """
        most = -(-self.shares // 2)
        return (0, most) if consumer == 0 else (most, self.shares - most)

    @property
    def places(self) -> WideBackwardPlaces:
        """Tiles at multiples of 1024 bytes, statistics, then barriers of eight bytes each."""
        stages = 8 * self.stages
        sizes = (
            self.k_bytes, self.v_bytes, self.stages * self.q_bytes, self.stages * self.do_bytes,
            self.ds_bytes, self.p_bytes,
            self.stages * self.stat_pitch, self.stages * self.stat_pitch,
            8, 8, 8, stages, stages, stages, stages, 8, 8,
        )  # fmt: skip
        return WideBackwardPlaces(*accumulate(sizes, initial=0))


def choose_wide_backward(
    kind: str, d_qk: int, d_v: int, causal: bool, *, deterministic: bool = False, dropout: bool = False
) -> WideBackwardVariant:
    """Return the variant for a problem.

    Parameters
    ----------
    kind : str
        ``"f16"`` or ``"bf16"``.
    d_qk, d_v : int
        Head dimensions, at most 256; each is filled with zeros on its own.
    causal, deterministic, dropout : bool
        As `WideBackwardVariant` says.

    Examples
    --------
    >>> choose_wide_backward("f16", 256, 256, True).shared_bytes <= 232_448
    True
    """
    d, d_v = max(2 * SUBTILE, -(-d_qk // SUBTILE) * SUBTILE), -(-d_v // SUBTILE) * SUBTILE
    return WideBackwardVariant(kind, d, d_v, causal, deterministic, dropout)
