"""Arrays of any library on their way into a kernel and back: NumPy copied, GPU arrays taken as they lie.

A kernel sees a `View`: an address with shape and strides.  Arrays on a GPU come from PyTorch, from anything
with ``__cuda_array_interface__`` (CuPy, Numba) or ``__dlpack__`` (JAX), without a copy, and the result is an
array of the same library.  None of them is imported here: an array that exists has imported its own.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda
from cuda_backend.context import checked, current_device, driver
from refimpl.errors import DTypeError, LostGradientError
from refimpl.numerics import Array

__all__ = [
    "ITEMSIZE",
    "Layout",
    "View",
    "absent",
    "broadcast",
    "contiguous",
    "dtype_name",
    "empty",
    "empty_tensor",
    "is_host",
    "laid_out",
    "library_of",
    "poisoned_outputs",
    "refuse_gradient",
    "stub",
    "torch_layout",
    "view",
]

STORAGE = {"float16": np.uint16, "bfloat16": np.uint16}  # how a format travels into a kernel
ITEMSIZE = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "bool": 1,
    "int8": 1, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip

_poisoned = False


# What of an array settles how a kernel is launched, hashable: shape, strides, dtype, GPU.  In the terms of
# PyTorch, or with None for the GPU in those of `View`.
Layout = tuple[Any, Any, Any, int | None]


class View(NamedTuple):
    """An array as a kernel sees it.

    Attributes
    ----------
    shape, strides
        In elements and in bytes; a stride of 0 repeats.
    dtype
        Name of the number format, ``"bfloat16"`` among them.
    address
        Of the first element on the GPU; 0 in the simulator.
    owner
        What keeps the memory alive; in the simulator the NumPy array itself.
    stream
        CUDA stream whose work the memory waits for; None: nothing to wait for.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    address: int
    owner: Any
    stream: int | None = None

    @property
    def layout(self) -> Layout:
        """Shape, strides and dtype: what settles how a kernel is launched, all but the address."""
        return self.shape, self.strides, self.dtype, None


def library_of(value: Any) -> str:
    """Return the top package of `value`'s type, "numpy" for whatever NumPy is to convert."""
    if isinstance(value, np.ndarray):
        return "numpy"
    name = type(value).__module__.partition(".")[0]
    if name == "torch" or hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__"):
        return name
    return "numpy"


def is_host(value: Any) -> bool:
    """Return whether `value` is for NumPy: an ndarray, a list, a number."""
    return library_of(value) == "numpy"


def stub(name: str, value: Any) -> Array:
    """Return an array with the shape of GPU array `value`, without data, for the reference's checks.

    float32 stands for every floating format: NumPy has no bfloat16, and would widen the others with data.

    Raises
    ------
    DTypeError
        If `value` is a tensor on the host, or has a dtype that no kernel takes.
    """
    if not getattr(value, "is_cuda", True):
        raise DTypeError(f"{name}: expected a tensor on the GPU, got one on {value.device}")
    dtype = dtype_name(name, value)
    kind = np.dtype("float32" if "float" in dtype else dtype)
    return np.broadcast_to(np.zeros((), kind), tuple(int(size) for size in value.shape))


def view(name: str, value: Any, stream: int) -> View:
    """Return `value` as a kernel sees it; a host array is copied to the GPU on `stream` first.

    Raises
    ------
    DTypeError
        If an array is not on the current GPU, or its interface says something illegal.
    """
    library = library_of(value)
    if library == "numpy":
        return _upload(np.asarray(value), stream)
    if SIMULATOR:
        raise DTypeError(f"{name}: the simulator takes NumPy arrays, got {type(value).__name__}")
    if library == "torch":
        return laid_out(name, torch_layout(value), value.data_ptr(), value)
    dtype = dtype_name(name, value)
    if hasattr(value, "__cuda_array_interface__"):
        found = _from_interface(name, value, dtype)
    else:
        found = _from_dlpack(value, dtype, stream)
    _check_device(name, found)
    return found


def refuse_gradient(*tensors: Any) -> None:
    """Refuse tensors whose gradient would be lost: kernels read memory, PyTorch records nothing of it.

    Raises
    ------
    LostGradientError
        If PyTorch is recording, and one of them requires a gradient.
    """
    if sys.modules["torch"].is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise LostGradientError(
            "a tensor requires a gradient, which functions of arrays do not record: take the operators of "
            "cuda_backend.torch_ops, or call under torch.no_grad() and use the function's own ..._vjp"
        )


def torch_layout(tensor: Any) -> Layout:
    """Return what of a PyTorch tensor settles a launch, all but its address.

    Raises
    ------
    LostGradientError
        As `refuse_gradient`.
    """
    if tensor.requires_grad:
        refuse_gradient(tensor)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def laid_out(name: str, layout: Layout, address: int = 0, owner: Any = None) -> View:
    """Return the array of this layout at `address`.

    Raises
    ------
    DTypeError
        If it is not on the current GPU, or has a dtype that no kernel takes.
    """
    shape, strides, kind, device = layout
    if device is None:
        return View(shape, strides, kind, address, owner)
    dtype = _format(name, kind)
    if device != current_device():
        raise _elsewhere(name, f"GPU {device}" if device >= 0 else "memory of the host")
    size = ITEMSIZE[dtype]
    return View(tuple(shape), tuple([size * step for step in strides]), dtype, address, owner)


def broadcast(given: View, shape: tuple[int, ...]) -> View:
    """Return `given` repeated to `shape` by strides of 0; the caller has checked that it broadcasts."""
    missing = len(shape) - len(given.shape)
    strides = [0] * missing
    for size, stride, target in zip(given.shape, given.strides, shape[missing:], strict=True):
        strides.append(stride if size == target else 0)
    owner = np.broadcast_to(given.owner, shape) if SIMULATOR else given.owner
    return given._replace(shape=shape, strides=tuple(strides), owner=owner)


def absent(dtype: str, ndim: int) -> View:
    """Return what stands for an array that a kernel does not read."""
    owner = np.zeros((1,) * ndim, STORAGE.get(dtype, dtype)) if SIMULATOR else None
    return View((1,) * ndim, (0,) * ndim, dtype, 0, owner)


def empty(shape: tuple[int, ...], dtype: str, like: Any, stream: int) -> tuple[View, Callable[[], Any]]:
    """Allocate an output beside `like`; return it for the kernel, and a function that gives it to the caller.

    Host arrays get a buffer on the GPU, copied back, which waits for the kernel; GPU libraries get an array
    of their own, for which nothing waits, except JAX, which knows of no streams but its own.
    """
    library = library_of(like)
    if library == "numpy":
        return _empty_host(shape, dtype, like, stream)
    module = sys.modules["jax.numpy" if library.startswith("jax") else library]
    if library == "numba":
        array = cuda.device_array(shape, dtype)
    elif library == "cupy":
        array = module.empty(shape, dtype=dtype)
    else:
        array = module.empty(shape, dtype=getattr(module, dtype), device=like.device)
    if library == "torch":
        given = View(shape, contiguous(shape, ITEMSIZE[dtype]), dtype, array.data_ptr(), array)
    else:
        given = view("out", array, stream)
    _poison(given, stream)

    def result() -> Any:
        if library.startswith("jax"):
            cuda.synchronize()
        return array

    return given, result


def empty_tensor(shape: tuple[int, ...] | None, dtype: Any, like: Any, stream: int) -> Any:
    """Allocate an output as a PyTorch tensor beside tensor `like`; `dtype` is PyTorch's, or its name.

    Without a shape it is that of `like`, which is contiguous and of that dtype: a microsecond less.
    """
    torch = sys.modules["torch"]
    if shape is None:
        tensor = torch.empty_like(like)
    else:
        tensor = like.new_empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if _poisoned:
        _poison(view("out", tensor, stream), stream)
    return tensor


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill every output with NaN before a kernel writes it, so that what nothing wrote shows: for tests."""
    global _poisoned
    saved, _poisoned = _poisoned, True
    try:
        yield
    finally:
        _poisoned = saved


def _upload(array: Array, stream: int) -> View:
    dtype = array.dtype.name
    stored = array.view(STORAGE[dtype]) if dtype in STORAGE else array
    if SIMULATOR:
        return View(array.shape, array.strides, dtype, 0, stored)
    if array.size == 0:
        return View(array.shape, array.strides, dtype, 0, None)
    stored = np.ascontiguousarray(stored)
    owner = cuda.to_device(stored, stream=_numba_stream(stream))
    return View(array.shape, stored.strides, dtype, _address(owner), owner)


def _empty_host(shape: tuple[int, ...], dtype: str, like: Any, stream: int) -> tuple[View, Callable[[], Any]]:
    number = np.asarray(like).dtype if dtype == "bfloat16" else np.dtype(dtype)
    array = np.empty(shape, number)
    stored = array.view(STORAGE.get(dtype, number))
    if SIMULATOR:
        given = View(shape, array.strides, dtype, 0, stored)
        _poison(given, stream)
        return given, lambda: array
    if array.size == 0:
        return View(shape, array.strides, dtype, 0, None), lambda: array
    owner = cuda.device_array(shape, stored.dtype)
    given = View(shape, array.strides, dtype, _address(owner), owner)
    _poison(given, stream)

    def result() -> Array:
        on = _numba_stream(stream)
        owner.copy_to_host(stored, stream=on)  # on stream 0 it waits by itself
        if on:
            on.synchronize()
        return array

    return given, result


def _poison(given: View, stream: int) -> None:
    """Set every byte to 0xFF, a NaN in every format."""
    if not _poisoned or 0 in given.shape:
        return
    if SIMULATOR:
        given.owner.view(np.uint8)[...] = 0xFF
        return
    size = math.prod(given.shape) * ITEMSIZE[given.dtype]
    checked(driver.cuMemsetD8Async(given.address, 0xFF, size, stream))


def _numba_stream(stream: int) -> Any:
    return cuda.external_stream(stream) if stream else 0


def _address(owner: Any) -> int:
    return int(owner.__cuda_array_interface__["data"][0])


def dtype_name(name: str, value: Any) -> str:
    """Return the number format of GPU array `value`; raise `DTypeError` for one that no kernel takes."""
    return _format(name, value.dtype)


@functools.lru_cache(maxsize=256)
def _format(name: str, dtype: Any) -> str:
    text = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    if text not in ITEMSIZE:
        raise DTypeError(f"{name}: expected one of {', '.join(ITEMSIZE)}, got {text}")
    return text


def _from_interface(name: str, value: Any, dtype: str) -> View:
    interface: dict[str, Any] = value.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise DTypeError(f"{name}: expected an array, got a masked array; pass attn_mask for masking")
    stream = interface.get("stream")
    if stream == 0:  # version 3 of the interface: 1 is the legacy stream, 0 is ambiguous and disallowed
        raise DTypeError(f"{name}: __cuda_array_interface__ says stream 0, which is not allowed")
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or contiguous(shape, ITEMSIZE[dtype])
    return View(shape, tuple(strides), dtype, int(interface["data"][0]), value, stream)


def _from_dlpack(value: Any, dtype: str, stream: int) -> View:
    from cuda.core.utils import StridedMemoryView

    # The producer makes its work visible to our stream; DLPack calls the legacy default stream 1.
    memory = StridedMemoryView.from_dlpack(value, stream_ptr=stream or 1)
    size = ITEMSIZE[dtype]
    steps = memory.strides
    strides = contiguous(memory.shape, size) if steps is None else tuple(size * step for step in steps)
    return View(tuple(memory.shape), strides, dtype, int(memory.ptr), (value, memory))


def _check_device(name: str, given: View) -> None:
    """Refuse memory that the current GPU is not the home of."""
    if given.address == 0:
        return
    kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, ordinal = driver.cuPointerGetAttribute(kind, given.address)
    if error or int(ordinal) != current_device():
        raise _elsewhere(name, "memory that CUDA does not know" if error else f"GPU {int(ordinal)}")


def _elsewhere(name: str, where: str) -> DTypeError:
    return DTypeError(f"{name}: expected an array on the current GPU, {current_device()}; got one in {where}")


@functools.lru_cache(maxsize=1024)
def contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a contiguous array."""
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()
