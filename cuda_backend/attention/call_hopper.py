"""Calling the Hopper forward kernels: what they take, which variant, one launch with little host time."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

from cuda.bindings import driver

from cuda_backend._numba import cuda
from cuda_backend.arrays import View, empty, view
from cuda_backend.attention import forward_hopper
from cuda_backend.attention.descriptors import DescriptorCache, checked, encoder
from cuda_backend.attention.variant_hopper import Variant, choose
from cuda_backend.launch import stream_of
from refimpl.attention import AttentionOutput
from refimpl.errors import OptionError, UnsupportedError

__all__ = ["flash_attention_hopper", "launch_hopper", "supports_hopper"]

KINDS = {"float16": "f16", "bfloat16": "bf16"}
ALIGNMENTS = (False, True, "top_left", "bottom_right")
LARGEST_WIDTH = 256
LOG2_E = math.log2(math.e)
# Bytes of K and V of the heads worked on together: half of the 50 MB of L2, so that they stay in it.
SECTION_BYTES = 24 << 20
ARGUMENTS = struct.Struct("6Qf10i")  # forward_hopper.SIGNATURE, in native alignment
OFFSETS = [8 * i for i in range(6)] + [48 + 4 * i for i in range(11)]


def flash_attention_hopper(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    causal: bool | str = False,
    scale: float | None = None,
    return_lse: bool = False,
    stream: Any = None,
) -> Any:
    """Return attention of GPU arrays in float16 or bfloat16, on the tensor cores of a Hopper GPU.

    Parameters
    ----------
    q, k, v : array of float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        PyTorch, CuPy, JAX or Numba arrays, read where they lie; NumPy arrays are copied.  Hkv divides Hq.  D
        and Dv are multiples of 8 up to 256; the last axis is contiguous, other strides are multiples of 8.
    causal : {False, True, "top_left", "bottom_right"}
        As for `refimpl.attention.scaled_dot_product_attention`.
    scale : float, optional
        Factor of the scores, > 0.  Default: ``D ** -0.5``.
    return_lse : bool
        Also return the log-sum-exp of each row, natural logarithm, float32, shape (B, Hq, Tq).
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `q` works on.

    Returns
    -------
    array or AttentionOutput
        Shape (B, Tq, Hq, Dv), in `q`'s dtype and library; a row without keys is 0 with log-sum-exp -inf.

    Raises
    ------
    OptionError
        If `causal` is none of the four, or True where Tq != Tk.
    UnsupportedError
        With the reasons of `supports_hopper`.

    Notes
    -----
    P is rounded to `q`'s dtype before P V, unnormalised; sums are in float32.  Results repeat bit for bit.

    References
    ----------
    .. [1] Shah et al., 2024, arXiv:2407.08608, Algorithms 1 and 2.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     import numpy as np
    ...     x = np.ones((1, 3, 2, 8), np.float16)
    ...     assert flash_attention_hopper(x, x, x, causal=True).shape == x.shape
    """
    on = stream_of(q, stream)
    inputs = view("q", q, on), view("k", k, on), view("v", v, on)
    reasons = supports_hopper(*inputs, causal=causal, scale=scale)
    if reasons:
        raise UnsupportedError("flash_attention_hopper: " + "; ".join(reasons))
    shape, width = inputs[0].shape, inputs[2].shape[3]
    out, out_result = empty((*shape[:3], width), inputs[0].dtype, q, on)
    lse, lse_result = None, None
    if return_lse:
        lse, lse_result = empty((shape[0], shape[2], shape[1]), "float32", q, on)
    launch_hopper(*inputs, out, lse, causal=causal, scale=scale, stream=on)
    return out_result() if lse_result is None else AttentionOutput(out_result(), lse_result())


def supports_hopper(
    q: View, k: View, v: View, /, *, causal: bool | str = False, scale: float | None = None
) -> list[str]:
    """Return the reasons why the Hopper kernels refuse a call; none if they take it.

    Parameters
    ----------
    q, k, v : View
        Of four axes.
    causal, scale
        As for `flash_attention_hopper`.

    Returns
    -------
    list of str
        Reasons in words.

    Raises
    ------
    OptionError
        If `causal` is none of the four, or True where Tq != Tk.
    """
    if causal not in ALIGNMENTS:
        raise OptionError(f"causal: expected one of {ALIGNMENTS}, got {causal!r}")
    if causal is True and q.shape[1] != k.shape[1]:
        raise OptionError(
            f"causal=True needs Tq == Tk; got Tq={q.shape[1]}, Tk={k.shape[1]}: say top_left or bottom_right"
        )
    found = list(_reasons(q.shape, q.strides, k.shape, k.strides, v.shape, v.strides))
    if not q.dtype == k.dtype == v.dtype or q.dtype not in KINDS:
        found.append(f"inputs are {q.dtype}, {k.dtype}, {v.dtype}; the kernel takes float16 or bfloat16")
    if scale is not None and not scale > 0:
        found.append(f"scale is {scale}; the kernel needs it positive")
    if (q.address | k.address | v.address) % 16:
        found.append("an array does not start at a multiple of 16 bytes")
    return found


def launch_hopper(
    q: View,
    k: View,
    v: View,
    out: View,
    lse: View | None,
    /,
    *,
    causal: bool | str,
    scale: float | None,
    stream: int,
    variant: Variant | None = None,
) -> None:
    """Queue one attention on `stream`; no check is made, and nothing waits.

    Parameters
    ----------
    q, k, v : View
        To which `supports_hopper` has no objection.
    out : View
        Contiguous (B, Tq, Hq, Dv), of the same dtype.
    lse : View or None
        Contiguous (B, Hq, Tq), float32.
    causal, scale
        As for `flash_attention_hopper`.
    stream : int
        A CUstream of the current context.
    variant : Variant, optional
        In place of `choose`'s.
    """
    device = int(checked(driver.cuCtxGetDevice()))
    arrays = (q.shape, q.strides, k.shape, k.strides, v.shape, v.strides, q.dtype)
    plan = _plan(*arrays, causal, variant, device)
    state = _stream_state(stream, device)
    addresses = (q.address, k.address, v.address)
    factor = (q.shape[3] ** -0.5 if scale is None else scale) * LOG2_E
    with state.lock:
        maps = state.descriptors.address((addresses, plan.arrays), functools.partial(plan.encode, addresses))
        ARGUMENTS.pack_into(
            state.arguments,
            0,
            *(maps, maps + 128, maps + 256),
            *(out.address, 0 if lse is None else lse.address, state.counter),
            factor,
            *plan.numbers,
        )
        pointers = ctypes.addressof(state.pointers)
        checked(driver.cuLaunchKernel(plan.function, *plan.grid, plan.shared_bytes, stream, pointers, 0))


class _Plan(NamedTuple):
    """All of a launch that the shapes and strides settle."""

    function: Any
    grid: tuple[int, ...]
    shared_bytes: int
    numbers: tuple[int, ...]  # the integers of forward_hopper.SIGNATURE
    encoders: tuple[Callable[[int], Any], ...]
    arrays: Any  # what the descriptors depend on beside the addresses

    def encode(self, addresses: tuple[int, ...]) -> list[Any]:
        """Return the descriptors of q, k and v at these addresses."""
        return [encode(address) for encode, address in zip(self.encoders, addresses, strict=True)]


class _StreamState(NamedTuple):
    """What launches on one stream share: descriptors, the tile counter (0 between launches), arguments."""

    descriptors: DescriptorCache
    counter: int
    arguments: Any
    pointers: Any
    lock: Any


Axes = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _reasons(q: Axes, q_strides: Axes, k: Axes, k_strides: Axes, v: Axes, v_strides: Axes) -> tuple[str, ...]:
    found = []
    major = int(cuda.get_current_device().compute_capability[0])
    if major != 9:
        found.append(f"the GPU has compute capability {major}.x; the kernel needs 9.0")
    for axis, width in (("D", q[3]), ("Dv", v[3])):
        if not 0 < width <= LARGEST_WIDTH or width % 8:
            found.append(f"{axis} is {width}; the kernel takes multiples of 8 up to {LARGEST_WIDTH}")
    if q[0] != k[0] or q[0] != v[0] or k[1:3] != v[1:3] or q[3] != k[3] or not k[2] or q[2] % k[2]:
        found.append(f"shapes {q}, {k}, {v} do not fit together")
    if 0 in (*q, *k, *v):
        found.append("an axis is empty")
    for name, shape, strides in (("q", q, q_strides), ("k", k, k_strides), ("v", v, v_strides)):
        used = [step for step, size in zip(strides[:3], shape, strict=False) if size > 1]
        if strides[3] != 2 or any(step % 16 or not 0 < step < 1 << 40 for step in used):
            rule = "the last must be 2, the others multiples of 16"
            found.append(f"{name} has strides of {strides} bytes: {rule}")
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _plan(
    q: Axes,
    q_strides: Axes,
    k: Axes,
    k_strides: Axes,
    v: Axes,
    v_strides: Axes,
    dtype: str,
    causal: bool | str,
    variant: Variant | None,
    device: int,
) -> _Plan:
    batch, tq, heads, width = q
    tk, kv_heads = k[1], k[2]
    all_heads, processors = batch * heads, int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    if variant is None:
        variant = choose(
            KINDS[dtype], width, v[3], bool(causal), rows=tq, heads=all_heads, processors=processors
        )
    per_head = -(-tq // variant.block_m)
    tiles = per_head * all_heads
    section = 1
    if variant.causal:
        head_bytes = 2 * tk * (k[3] + v[3]) * kv_heads // heads
        section = min(all_heads, max(1, SECTION_BYTES // max(1, head_bytes)))
    offset = tk - tq if causal == "bottom_right" else 0
    encoders = (
        encoder(q, q_strides, dtype, variant.block_m),
        encoder(k, k_strides, dtype, variant.block_n),
        encoder(v, v_strides, dtype, variant.block_n),
    )
    return _Plan(
        function=_function(variant, device),
        grid=(min(tiles, processors), 1, 1, variant.threads, 1, 1),
        shared_bytes=variant.shared_bytes,
        numbers=(tiles, per_head, section, heads, all_heads, heads // kv_heads, tq, tk, offset, v[3]),
        encoders=encoders,
        arrays=(q, q_strides, k, k_strides, v, v_strides, dtype, variant.block_m, variant.block_n),
    )


@functools.cache
def _function(variant: Variant, _device: int) -> Any:
    """Compile `variant` for the current device, once a process, and allow it its shared memory."""
    compiled = cuda.jit(forward_hopper.SIGNATURE, launch_bounds=(variant.threads, 1))(
        forward_hopper.build(variant)
    )
    (overload,) = compiled.overloads.values()
    handle = overload._codelibrary.get_cufunc().handle
    function = checked(driver.cuKernelGetFunction(driver.CUkernel(int(handle))))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, attribute, variant.shared_bytes))
    return function


@functools.cache
def _stream_state(stream: int, _device: int) -> _StreamState:
    counter = int(checked(driver.cuMemAlloc(8)))
    checked(driver.cuMemsetD32Async(counter, 0, 2, stream))
    arguments = (ctypes.c_char * ARGUMENTS.size)()
    base = ctypes.addressof(arguments)
    pointers = (ctypes.c_void_p * len(OFFSETS))(*[base + offset for offset in OFFSETS])
    return _StreamState(DescriptorCache(stream, 3), counter, arguments, pointers, Lock())
