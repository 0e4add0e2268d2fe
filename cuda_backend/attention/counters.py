"""Counters in device memory from which blocks draw their next tile, 0 before and after each launch."""

from __future__ import annotations

from cuda_backend.capture import capturing, lasting
from cuda_backend.once import once_each
from refimpl.errors import UnsupportedError

__all__ = ["TileCounters", "tile_counters"]

COUNTER_BYTES = 8
CAPTURED = 4096  # launches that graphs captured on one stream may hold
ARENA_BYTES = 4 << 20  # for them, so that launches with many counters are fewer


class TileCounters:
    """The counters of one stream: those of its launches, which follow each other, and more for graphs.

    Graphs may be replayed side by side, on any streams: each captured launch has counters of its own.

    Parameters
    ----------
    stream : int
        A CUstream.
    size : int
        Bytes of the counters of one launch.
    """

    def __init__(self, stream: int, size: int = COUNTER_BYTES) -> None:
        self._stream, self._size = stream, size
        self._most = min(CAPTURED, ARENA_BYTES // size)
        self._base = lasting(size * (1 + self._most), bytes(size * (1 + self._most)))
        self._captured = 0

    def address(self) -> int:
        """Return where the counters of the next launch lie.

        Raises
        ------
        UnsupportedError
            If graphs hold all that there are.
        """
        if not capturing(self._stream):
            return self._base
        if self._captured == self._most:
            raise UnsupportedError(f"graphs hold the tile counters of {self._most} launches of this stream")
        self._captured += 1
        return self._base + self._size * self._captured


@once_each
def tile_counters(stream: int, _device: int, size: int = COUNTER_BYTES) -> TileCounters:
    """Return the counters of a stream of a GPU, `size` bytes for a launch."""
    return TileCounters(stream, size)
