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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_backend._numba import SIMULATOR, cuda, require
from cuda_backend.arrays import ITEMSIZE, View, library_of
from cuda_backend.context import checked, current_device, driver
from refimpl.errors import DTypeError

__all__ = [
    "allow_shared_memory",
    "checked",
    "launch",
    "shared_memory_bytes",
    "simulation",
    "stream_of",
    "torch_stream",
    "wait_for",
]

Argument = View | np.generic | tuple[View, ...]

SLOTS = {"float32": "f4x", "uint64": "Q", "int64": "q"}
_raising = Lock()  # what a function is allowed is read, then raised


def launch(
    kernel: Any, arguments: Sequence[Argument], *, blocks: int, threads: int, shared_bytes: int, stream: int
) -> None:
    """Run `kernel` on `blocks` x `threads` threads; returns when it is queued on `stream`."""
    if SIMULATOR:
        fake = cuda.devicearray.FakeCUDAArray

        def given(item: Any) -> Any:
            if isinstance(item, View):
                return fake(item.owner)
            return tuple(map(given, item)) if isinstance(item, tuple) else item

        values = [given(item) for item in arguments]
        with simulation():
            kernel[blocks, threads, 0, shared_bytes](*values)
        return
    flat: list[View | np.generic] = list(_flat(arguments))
    wait_for((item for item in flat if isinstance(item, View)), stream)
    function = _function(kernel, shared_bytes)
    values, addresses = _packed(flat)
    grid = (blocks, 1, 1, threads, 1, 1)
    checked(driver.cuLaunchKernel(function, *grid, shared_bytes, stream, addresses.ctypes.data, 0))
    del values  # the driver has copied the arguments; until then they must live


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    """Yield arguments, those in tuples one by one: that is how Numba passes a tuple."""
    for item in arguments:
        if isinstance(item, tuple) and not isinstance(item, View):
            yield from item
        else:
            yield item


def wait_for(views: Iterable[View], stream: int) -> None:
    """Wait until the memory of `views` is ready for work on `stream`, if it is another stream's."""
    for item in views:
        if item.stream not in (None, stream, stream or 1):
            checked(driver.cuStreamSynchronize(item.stream))


def allow_shared_memory(function: Any, size: int) -> Any:
    """Return CUfunction `function`, allowed to use `size` bytes of shared memory, beyond 48 KB too.

    Plans of several sizes share a function: what one was allowed no later one takes back, which the driver
    would say by refusing the next launch of the first.
    """
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    with _raising:
        if checked(driver.cuFuncGetAttribute(attribute, function)) < size:
            checked(driver.cuFuncSetAttribute(function, attribute, size))
    return function


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
    if SIMULATOR:
        require()
        return 0
    current_device()
    if stream is not None:
        return _stream_handle(stream)
    library = library_of(value)
    if library == "numpy":
        return 0
    if library == "torch":
        return torch_stream(value)
    interface = getattr(value, "__cuda_array_interface__", None)
    return int((interface or {}).get("stream") or 0)


def torch_stream(tensor: Any) -> int:
    """Return PyTorch's current stream on the GPU of `tensor`.

    The public way makes a Stream object in four microseconds; Inductor and Triton ask as we do.
    """
    torch = sys.modules["torch"]
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if not tensor.is_cuda:
        return 0  # `view` refuses it
    if raw is None:
        return int(torch.cuda.current_stream(tensor.device).cuda_stream)
    return int(raw(tensor.get_device()))


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
    (overload,) = kernel.overloads.values()
    handle = overload._codelibrary.get_cufunc().handle
    return allow_shared_memory(
        checked(driver.cuKernelGetFunction(driver.CUkernel(int(handle)))), shared_bytes
    )


def _packed(arguments: Sequence[View | np.generic]) -> tuple[Any, npt.NDArray[np.uint64]]:
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
def simulation() -> Iterator[None]:
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
