"""The one door to numba.cuda: what kernels are written in, and whether a GPU or the simulator runs them.

Numba decides between the two when it is first imported, by ``NUMBA_ENABLE_CUDASIM``.  In the simulator a
CUDA thread is a Python thread: no warp operations, no inline PTX, NumPy scalars in place of registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from numba import cuda as _cuda
from numba.core import config as _config
from numba.cuda import types as _types

__all__ = ["SIMULATOR", "cuda", "device_function", "kernel", "missing", "pretended", "require", "types"]

# Numba ships no types for these.  Kernels must call the module `cuda`: the simulator looks for that name.
cuda: Any = _cuda
types: Any = _types
_settings: Any = _config

SIMULATOR = bool(_settings.ENABLE_CUDASIM)

Function = Callable[..., Any]


def kernel(signature: Any) -> Callable[[Function], Any]:
    """Compile the decorated function as a kernel for exactly one `signature`, when it is decorated.

    One signature means one compiled overload, whatever the memory layout of the arrays: larger shared memory
    is allowed by overload, and another argument type would bring one for which it is not.
    """
    return cast(Callable[[Function], Any], cuda.jit(signature))


def device_function(function: Function) -> Function:
    """Make `function` callable in kernels; plain Python can call it in the simulator."""
    return cast(Function, cuda.jit(device=True)(function))


@functools.cache
def missing(backend: str) -> str | None:
    """Return why `backend` ("cuda" or "cudasim") cannot run in this process, or None."""
    if backend == "cudasim":
        return None if SIMULATOR else "set NUMBA_ENABLE_CUDASIM=1 before numba is first imported"
    if SIMULATOR:
        return "NUMBA_ENABLE_CUDASIM is set: this process simulates CUDA"
    if cuda.is_available():
        return None
    reason = str(cuda.cuda_error() or "no CUDA device was found")
    return " ".join(reason.split())


def require() -> None:
    """Raise `BackendUnavailableError` unless this process can run kernels."""
    from refimpl.errors import BackendUnavailableError

    reason = missing("cudasim" if SIMULATOR else "cuda")
    if reason:
        raise BackendUnavailableError(f"cuda: {reason}")


@contextmanager
def pretended(capability: tuple[Any, ...]) -> Iterator[None]:
    """Let Numba compile device functions for a GPU of `capability` that is not there.

    `cuda.compile` is told the capability of a kernel, but for the device functions in it Numba asks the
    current device.
    """
    from numba.cuda import dispatcher as _dispatcher

    dispatcher: Any = _dispatcher
    saved = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = saved
