"""Launching a compiled kernel: its stream, its shared memory, its arguments.

On a GPU the driver is called directly: Numba compiles, we pack addresses and numbers once.  Numba's own
launch costs ten times as much host time and has no switch for more than 48 KB of shared memory.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_backend._numba import SIMULATOR, cuda, require
from cuda_backend.arrays import ITEMSIZE, View, is_host, library_of
from refimpl.errors import DTypeError

__all__ = ["launch", "shared_memory_bytes", "stream_of"]

Argument = View | np.generic

SLOTS = {"float32": "f4x", "uint64": "Q", "int64": "q"}


def launch(
    kernel: Any, arguments: Sequence[Argument], *, blocks: int, threads: int, shared_bytes: int, stream: int
) -> None:
    """Run `kernel` on `blocks` x `threads` threads; returns when it is queued on `stream`."""
    if SIMULATOR:
        fake = cuda.devicearray.FakeCUDAArray
        values = [fake(item.owner) if isinstance(item, View) else item for item in arguments]
        with _simulation():
            kernel[blocks, threads, 0, shared_bytes](*values)
        return
    from cuda.bindings import driver

    for item in arguments:
        if isinstance(item, View) and item.stream not in (None, stream, stream or 1):
            _checked(driver.cuStreamSynchronize(item.stream))
    function = _function(kernel, shared_bytes)
    values, addresses = _packed(arguments)
    grid = (blocks, 1, 1, threads, 1, 1)
    _checked(driver.cuLaunchKernel(function, *grid, shared_bytes, stream, addresses.ctypes.data, 0))
    del values  # the driver has copied the arguments; until then they must live


def shared_memory_bytes() -> int | None:
    """Return how much shared memory a block may use on the current GPU; None in the simulator."""
    if SIMULATOR:
        return None
    return int(cuda.get_current_device().MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)


def stream_of(value: Any, stream: Any) -> int:
    """Return the stream to launch on: `stream` if given, or the one that the library of `value` works on.

    Parameters
    ----------
    value : array
        The first input.
    stream : int, or a stream of PyTorch, CuPy, Numba or with ``__cuda_stream__``, or None
        The caller's choice.

    Returns
    -------
    int
        A CUstream; 0 is the legacy default stream, and what the simulator gets.

    Raises
    ------
    BackendUnavailableError
        If this process can run no kernels.
    DTypeError
        If `stream` is none of these.
    """
    require()
    if SIMULATOR:
        return 0
    cuda.current_context()  # makes the GPU's primary context current on this thread
    if stream is not None:
        return _stream_handle(stream)
    if is_host(value):
        return 0
    if library_of(value) == "torch":
        return int(sys.modules["torch"].cuda.current_stream(value.device).cuda_stream)
    interface = getattr(value, "__cuda_array_interface__", None)
    return int((interface or {}).get("stream") or 0)


def _stream_handle(stream: Any) -> int:
    if isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):  # PyTorch, CuPy
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    if hasattr(stream, "__cuda_stream__"):  # (version, handle)
        return int(stream.__cuda_stream__()[1])
    try:
        return int(stream.handle)  # Numba
    except (AttributeError, TypeError, ValueError):
        raise DTypeError(
            f"stream: expected a CUDA stream or its handle, got {type(stream).__name__}"
        ) from None


@functools.cache
def _function(kernel: Any, shared_bytes: int) -> Any:
    """Return the CUfunction of a kernel with one signature, allowed to use `shared_bytes`."""
    from cuda.bindings import driver

    (overload,) = kernel.overloads.values()
    handle = overload._codelibrary.get_cufunc().handle
    function = _checked(driver.cuKernelGetFunction(driver.CUkernel(int(handle))))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a driver call, or raise what went wrong."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None


def _packed(arguments: Sequence[Argument]) -> tuple[Any, npt.NDArray[np.uint64]]:
    """Return the arguments in slots of 8 bytes, and the address of each slot, as the driver wants them."""
    layout, values = "<", []
    for item in arguments:
        if isinstance(item, View):
            # Numba's array: two pointers for its own memory, items, item size, address, shape, strides.
            size = math.prod(item.shape)
            layout += f"{5 + 2 * len(item.shape)}q"
            values += [0, 0, size, ITEMSIZE[item.dtype], item.address, *item.shape, *item.strides]
        else:
            layout += SLOTS[item.dtype.name]
            values.append(item.item())
    buffer = ctypes.create_string_buffer(struct.pack(layout, *values))
    start = ctypes.addressof(buffer)
    return buffer, np.arange(start, start + 8 * len(values), 8, dtype=np.uint64)


@contextmanager
def _simulation() -> Iterator[None]:
    """Make Python threads change places often, and let NumPy scalars overflow and be invalid in silence.

    The simulator polls its threads, and each barrier costs a few changes of threads: at Python's 5 ms a
    kernel takes minutes.
    """
    saved = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.setswitchinterval(saved)
