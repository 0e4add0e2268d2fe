"""How a Hopper kernel begins, before its warpgroups part: shared memory, barriers, the next grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.ptx import copy, grid
from cuda_backend.ptx.assembly import types

__all__ = ["build_entry", "shared_base"]

uint32 = types.uint32


@device_function
def shared_base() -> Any:
    """Return where shared memory begins, at a multiple of 1024 bytes as the copy engine's swizzle wants."""
    shared = cuda.shared.array(0, types.uint8)
    return uint32((copy.shared_address(shared) + uint32(1023)) & uint32(0xFFFFFC00))


def build_entry(start: Callable[..., None]) -> Callable[..., None]:
    """Return ``enter(base, thread)``, a device function for all threads; `start` makes the barriers."""

    @device_function
    def enter(base: Any, thread: Any) -> None:
        if thread == 0:
            grid.let_next_grid_start()
            start(base)
        cuda.syncthreads()

    return enter
