"""What the layouts of q, k and v settle of a Hopper launch, found once: kernel, grid, numbers, descriptors.

A call with arrays of a known layout then packs five addresses and asks the driver for four things: whether
the stream is under capture, three exchanged addresses of descriptors, their copy, and the launch.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import struct
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import Layout, View, laid_out
from cuda_backend.attention.descriptors import DescriptorCache, encode_together, encoder
from cuda_backend.attention.variant_hopper import Variant, choose
from cuda_backend.context import checked, driver
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.launch import allow_shared_memory
from refimpl.attention.scores import Causal, score_rule
from refimpl.errors import DTypeError, UnsupportedError

__all__ = ["MISALIGNED", "Plan", "enqueue", "make_plan", "reasons"]

KINDS = {"float16": "f16", "bfloat16": "bf16"}
LARGEST_WIDTH = 256
MISALIGNED = "an array does not start at a multiple of 16 bytes"
LOG2_E = math.log2(math.e)
# Bytes of K and V of the heads worked on together: half of the 50 MB of L2, so that they stay in it.
SECTION_BYTES = 24 << 20
# forward_hopper.SIGNATURE in native alignment: what each call brings, and what the plan settles.
ADDRESSES, SETTLED = struct.Struct("5Q"), struct.Struct("Qf10i")
OFFSETS = [8 * i for i in range(6)] + [48 + 4 * i for i in range(11)]

_numbers = itertools.count()


class Plan(NamedTuple):
    """A launch on one stream but for its addresses.

    Attributes
    ----------
    number
        Names the layouts in the cache of descriptors.
    function, grid, shared_bytes, stream
        As ``cuLaunchKernel`` takes them.
    out_shape, lse_shape, dtype
        Of the results; `dtype` is that of the inputs.
    arguments, pointers
        The packed arguments, and the array of their addresses.
    encode
        Makes the descriptors of q, k and v on the host.
    shared
        What all launches on the stream share.
    """

    number: int
    function: Any
    grid: tuple[int, ...]
    shared_bytes: int
    stream: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    dtype: str
    arguments: Any
    pointers: Any
    encode: Callable[[Sequence[int]], int]
    shared: Shared


class Shared(NamedTuple):
    """Descriptors of one stream, and the address of its tile counter, which is 0 between launches."""

    descriptors: DescriptorCache
    counter: int
    lock: Any


def enqueue(plan: Plan, addresses: tuple[int, int, int], out: int, lse: int) -> None:
    """Queue a launch for q, k and v at `addresses`; `lse` is 0 if it is not wanted.  Nothing waits.

    Raises
    ------
    UnsupportedError
        If TMA cannot take an address, or a stream under capture has not seen the arrays before.
    """
    if (addresses[0] | addresses[1] | addresses[2]) % 16:
        raise UnsupportedError(f"flash_attention_hopper: {MISALIGNED}")
    shared = plan.shared
    with shared.lock:
        maps = shared.descriptors.address(plan.number, addresses, plan.encode)
        ADDRESSES.pack_into(plan.arguments, 0, maps, maps + 128, maps + 256, out, lse)
        pointers = ctypes.addressof(plan.pointers)
        checked(driver.cuLaunchKernel(plan.function, *plan.grid, plan.shared_bytes, plan.stream, pointers, 0))


@functools.lru_cache(maxsize=1024)
def make_plan(
    q: Layout,
    k: Layout,
    v: Layout,
    causal: Causal,
    scale: float | None,
    stream: int,
    device: int,
    variant: Variant | None = None,
) -> Plan:
    """Return the plan of a call on the current GPU, `device`; `variant` is in place of `choose`'s.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons.
    """
    views = [laid_out(name, layout) for name, layout in zip("qkv", (q, k, v), strict=True)]
    found = reasons(*views, causal=causal, scale=scale)
    if found:
        raise UnsupportedError("flash_attention_hopper: " + "; ".join(found))
    dtype = views[0].dtype
    batch, tq, heads, width = views[0].shape
    _, tk, kv_heads, value_width = views[2].shape
    all_heads, processors = batch * heads, int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    if variant is None:
        variant = choose(
            KINDS[dtype], width, value_width, bool(causal), rows=tq, heads=all_heads, processors=processors
        )
    per_head = -(-tq // variant.block_m)
    tiles = per_head * all_heads
    section = 1
    if variant.causal:
        head_bytes = 2 * tk * (width + value_width) * kv_heads // heads
        section = min(all_heads, max(1, SECTION_BYTES // max(1, head_bytes)))
    offset = tk - tq if causal == "bottom_right" else 0
    shared = _shared(stream, device)
    arguments = (ctypes.c_char * (ADDRESSES.size + SETTLED.size))()
    factor = (width**-0.5 if scale is None else scale) * LOG2_E
    numbers = (tiles, per_head, section, heads, all_heads, heads // kv_heads, tq, tk, offset, value_width)
    SETTLED.pack_into(arguments, ADDRESSES.size, shared.counter, factor, *numbers)
    base = ctypes.addressof(arguments)
    rows = (variant.block_m, variant.block_n, variant.block_n)
    encoders = [encoder(x.shape, x.strides, dtype, r) for x, r in zip(views, rows, strict=True)]
    return Plan(
        number=next(_numbers),
        function=_function(variant, device),
        grid=(min(tiles, processors), 1, 1, variant.threads, 1, 1),
        shared_bytes=variant.shared_bytes,
        stream=stream,
        out_shape=(batch, tq, heads, value_width),
        lse_shape=(batch, heads, tq),
        dtype=dtype,
        arguments=arguments,
        pointers=(ctypes.c_void_p * len(OFFSETS))(*[base + at for at in OFFSETS]),
        encode=encode_together(encoders),
        shared=shared,
    )


def reasons(q: View, k: View, v: View, /, *, causal: Causal, scale: float | None) -> list[str]:
    """Return the reasons why the Hopper kernels refuse arrays that the reference takes; none if they do not.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the reference would refuse them too.
    """
    stubs = [np.broadcast_to(np.zeros((), np.float32), x.shape) for x in (q, k, v)]
    score_rule(*stubs, causal=causal, scale=scale)
    if not q.dtype == k.dtype == v.dtype:
        kinds = ", ".join(sorted({q.dtype, k.dtype, v.dtype}))
        raise DTypeError(f"q, k and v: expected one dtype, got {kinds}")
    found = []
    major, minor = cuda.get_current_device().compute_capability
    if (major, minor) != (9, 0):
        found.append(f"the GPU has compute capability {major}.{minor}; the kernel needs 9.0")
    if q.dtype not in KINDS:
        found.append(f"inputs are {q.dtype}; the kernel takes float16 or bfloat16")
    for axis, width in (("D", q.shape[3]), ("Dv", v.shape[3])):
        if not 0 < width <= LARGEST_WIDTH or width % 8:
            found.append(f"{axis} is {width}; the kernel takes multiples of 8 up to {LARGEST_WIDTH}")
    if scale is not None and not scale > 0:
        found.append(f"scale is {scale}; the kernel needs it positive")
    if 0 in (*q.shape, *k.shape, *v.shape):
        found.append("an axis is empty")
    for name, x in (("q", q), ("k", k), ("v", v)):
        used = [step for step, size in zip(x.strides[:3], x.shape, strict=False) if size > 1]
        if x.strides[3] != 2 or any(step % 16 or not 0 < step < 1 << 40 for step in used):
            rule = "the last must be 2, the others multiples of 16"
            found.append(f"{name} has strides of {x.strides} bytes: {rule}")
    return found


@functools.cache
def _function(variant: Variant, device: int) -> Any:
    """Return the kernel of `variant` on the current GPU, compiled once, and allowed its shared memory."""
    function = load("attention_forward_hopper", variant, device, functools.partial(_compiled, variant))
    return allow_shared_memory(function, variant.shared_bytes)


def _compiled(variant: Variant) -> Image:
    from cuda_backend.attention.forward_hopper import SIGNATURE, build  # not needed if the kernel is on disk

    return compiled(build(variant), SIGNATURE, threads=variant.threads)


@functools.cache
def _shared(stream: int, _device: int) -> Shared:
    counter = int(checked(driver.cuMemAlloc(8)))
    checked(driver.cuMemsetD32Async(counter, 0, 2, stream))
    return Shared(DescriptorCache(stream, 3), counter, Lock())
