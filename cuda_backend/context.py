"""The GPU that this thread works on, and what the driver says."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

from cuda_backend._numba import SIMULATOR, cuda, missing
from refimpl.errors import BackendUnavailableError

__all__ = ["checked", "current_device", "driver", "is_hopper"]

driver: Any = None
if not SIMULATOR:
    with suppress(ImportError):  # without bindings there is no GPU: `missing` says so
        driver = importlib.import_module("cuda.bindings.driver")

_devices: dict[int, int] = {}  # ordinals, by the handle of a primary context that Numba has accepted


def current_device() -> int:
    """Return the ordinal of the current GPU; its primary context is current on this thread afterwards.

    Asking Numba takes twenty microseconds, asking the driver a third of one: Numba is asked once a context.

    Raises
    ------
    BackendUnavailableError
        If there is no GPU, or the simulator in its place.
    RuntimeError
        If the current context is not a primary one.
    """
    if _devices:
        device = _devices.get(int(driver.cuCtxGetCurrent()[1] or 0))
        if device is not None:
            return device
    reason = missing("cuda")
    if reason:
        raise BackendUnavailableError(f"cuda: {reason}")
    cuda.current_context()
    device = int(checked(driver.cuCtxGetDevice()))
    _devices[int(checked(driver.cuCtxGetCurrent()))] = device
    return device


def is_hopper() -> bool:
    """Return whether the current GPU has compute capability 9.0; the simulator and no GPU have not."""
    if SIMULATOR or missing("cuda"):
        return False
    return tuple(cuda.get_current_device().compute_capability)[:2] == (9, 0)


def checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a driver call, or raise RuntimeError with the driver's name for what went wrong."""
    if result[0]:
        raise RuntimeError(f"CUDA driver: {result[0].name}")
    return result[1] if len(result) > 1 else None
