"""Counters in device memory from which blocks draw their next tile, 0 before and after each launch."""

from __future__ import annotations

import functools

from cuda_backend.context import checked, driver
from refimpl.errors import UnsupportedError

__all__ = ["TileCounters", "tile_counters"]

COUNTER_BYTES = 8
CAPTURED = 4096  # launches that graphs captured on one stream may hold


class TileCounters:
    """The counters of one stream: one for its launches, which follow each other, and more for graphs.

    Graphs may be replayed side by side, on any streams: each captured launch has a counter of its own.

    Parameters
    ----------
    stream : int
        A CUstream, not under capture.
    """

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._base = int(checked(driver.cuMemAlloc(COUNTER_BYTES * (1 + CAPTURED))))
        checked(driver.cuMemsetD32Async(self._base, 0, COUNTER_BYTES // 4 * (1 + CAPTURED), stream))
        self._captured = 0

    def address(self) -> int:
        """Return where the counter of the next launch lies.

        Raises
        ------
        UnsupportedError
            If graphs hold all that there are.
        """
        if not checked(driver.cuStreamIsCapturing(self._stream)):
            return self._base
        if self._captured == CAPTURED:
            raise UnsupportedError(f"graphs hold the tile counters of {CAPTURED} launches of this stream")
        self._captured += 1
        return self._base + COUNTER_BYTES * self._captured


@functools.cache
def tile_counters(stream: int, _device: int) -> TileCounters:
    """Return the counters of a stream of a GPU.

    Raises
    ------
    UnsupportedError
        If the stream is under capture and has none yet.
    """
    if checked(driver.cuStreamIsCapturing(stream)):
        raise UnsupportedError("a stream under capture: call once on it before capturing")
    return TileCounters(stream)
