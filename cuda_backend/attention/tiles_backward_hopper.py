"""What follows from the tiles of a Hopper backward kernel, of either variant: bytes, threads, registers."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["BackwardTiles"]


class _Tiles(Protocol):
    """What a variant says for itself."""

    @property
    def d(self) -> int: ...
    @property
    def d_v(self) -> int: ...
    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def places(self) -> Any: ...


class BackwardTiles:
    """What `BackwardVariant` and `WideBackwardVariant` have in common."""

    __slots__ = ()

    @property
    def threads(self) -> int:
        """Threads of a block: one producer warpgroup and two consumers."""
        return 3 * 128

    @property
    def producer_registers(self) -> int:
        """Registers a producer thread keeps."""
        return 24

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread gets: the 64 K of a multiprocessor, less the producer's."""
        return 240

    @property
    def q_bytes(self: _Tiles) -> int:
        """Bytes of a tile of Q."""
        return 2 * self.block_m * self.d

    @property
    def do_bytes(self: _Tiles) -> int:
        """Bytes of a tile of dO."""
        return 2 * self.block_m * self.d_v

    @property
    def k_bytes(self: _Tiles) -> int:
        """Bytes of a tile of K."""
        return 2 * self.block_n * self.d

    @property
    def v_bytes(self: _Tiles) -> int:
        """Bytes of a tile of V."""
        return 2 * self.block_n * self.d_v

    @property
    def ds_bytes(self: _Tiles) -> int:
        """Bytes of a tile of dS: rows of 64 keys."""
        return 2 * self.block_n * self.block_m

    @property
    def stat_pitch(self: _Tiles) -> int:
        """Bytes from one tile's statistics to the next's: the copy engine writes at multiples of 128."""
        return -(-4 * self.block_m // 128) * 128

    @property
    def shared_bytes(self: _Tiles) -> int:
        """Dynamic shared memory: slack for alignment, then `places`."""
        return 1024 + int(self.places.end)
