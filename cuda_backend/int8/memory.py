"""How arrays of codes lie in memory: turned, read several numbers at a time, kept between two kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda
from cuda_backend.arrays import ITEMSIZE, View, empty, is_host, library_of, view
from refimpl.numerics import Array

__all__ = ["allocated", "packed", "to_host", "transposed", "transposed_view", "words"]


def allocated(shape: tuple[int, ...], dtype: str, like: Any, stream: int) -> tuple[View, Callable[[], Any]]:
    """Allocate an array as `cuda_backend.arrays.empty` does, from memory that is reused in `stream`'s order.

    PyTorch and CuPy keep freed memory for the stream it was allocated on.  What lies between two kernels is
    freed before they have ended, so it must belong to the stream that they run on.
    """
    if library_of(like).startswith("jax") and dtype == "int64":
        return _int64_for_jax(shape, stream)
    with _allocating_on(like, stream):
        return empty(shape, dtype, like, stream)


def _int64_for_jax(shape: tuple[int, ...], stream: int) -> tuple[View, Callable[[], Any]]:
    """Allocate integers that JAX would make int32, as it does by default; it gets them as it likes."""
    array = cuda.device_array(shape, np.int64)

    def result() -> Any:
        cuda.synchronize()
        return sys.modules["jax.numpy"].asarray(array.copy_to_host())

    return view("out", array, stream), result


@contextmanager
def _allocating_on(like: Any, stream: int) -> Iterator[None]:
    """Make `stream` the one that PyTorch or CuPy allocates for."""
    library = library_of(like)
    if library not in ("torch", "cupy"):
        yield
        return
    module = sys.modules[library].cuda
    if library == "cupy":
        with _cupy_stream(module, stream):
            yield
    elif module.current_stream(like.device).cuda_stream == stream:
        yield
    else:
        with module.stream(module.ExternalStream(stream) if stream else module.default_stream(like.device)):
            yield


def _cupy_stream(module: Any, stream: int) -> Any:
    """Return a stream of CuPy that stands for a CUstream: CuPy 14 warns at the older way."""
    if hasattr(module.Stream, "from_external"):
        return module.Stream.from_external(_Protocol(stream))
    return module.ExternalStream(stream)


class _Protocol:
    """A stream of another library, as CuPy asks for it: version 0 of the CUDA stream protocol."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


def transposed(given: View) -> View:
    """Return a matrix with its axes exchanged; nothing moves."""
    owner = given.owner.T if SIMULATOR else given.owner
    return given._replace(shape=given.shape[::-1], strides=given.strides[::-1], owner=owner)


def transposed_view(name: str, value: Any, stream: int) -> View:
    """Return the transpose of a matrix as a kernel sees it; one from the host arrives with its rows whole."""
    if is_host(value):
        return view(name, np.asarray(value).T, stream)
    return transposed(view(name, value, stream))


def packed(given: View, dtype: str) -> View | None:
    """Return a matrix, or a vector, with neighbours of a row read together as one `dtype`, or None.

    They can be read so if rows are whole and begin, like the matrix, at multiples of the size of `dtype`.
    """
    size, itemsize = ITEMSIZE[dtype], ITEMSIZE[given.dtype]
    width = size // itemsize
    *outer, last = given.shape
    aligned = not any(step % size for step in (*given.strides[:-1], given.address))
    if last == 0 or last % width or given.strides[-1] != itemsize or not aligned:
        return None
    owner = given.owner.view(dtype) if SIMULATOR else given.owner
    strides = (*given.strides[:-1], size)
    return given._replace(shape=(*outer, last // width), strides=strides, dtype=dtype, owner=owner)


def words(codes: View) -> View:
    """Return a matrix of codes as words of four along its rows if it lies so, or as bytes."""
    found = packed(codes, "uint32") or packed(codes, "uint8")
    if found is not None:
        return found
    owner = codes.owner.view(np.uint8) if SIMULATOR else codes.owner
    return codes._replace(dtype="uint8", owner=owner)


def to_host(given: View, stream: int) -> Array:
    """Return a contiguous array on the host, when the work queued on `stream` has ended."""
    if SIMULATOR:
        return np.asarray(given.owner)
    from cuda.bindings import driver

    array = np.empty(given.shape, given.dtype)
    if array.size:
        (error,) = driver.cuMemcpyDtoHAsync(array.ctypes.data, given.address, array.nbytes, stream)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuMemcpyDtoHAsync: {error.name}")
        (cuda.external_stream(stream) if stream else cuda.default_stream()).synchronize()
    return array
