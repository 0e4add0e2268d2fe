"""What the layouts of q, k and v settle of a Hopper launch, found once: kernel, grid, numbers, descriptors.

A call with arrays of a known layout then exchanges the addresses in three descriptors, packs three more, and
asks the driver for the launch: nothing is copied to the GPU before it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import Layout, View, contiguous, laid_out
from cuda_backend.attention.counters import TileCounters, tile_counters
from cuda_backend.attention.descriptors import ALIGNMENT, DESCRIPTOR_BYTES, encode_together, encoder
from cuda_backend.attention.variant_hopper import Variant, choose
from cuda_backend.context import checked, driver
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.launch import allow_shared_memory
from refimpl.attention.scores import Causal, score_rule
from refimpl.errors import DTypeError, UnsupportedError

__all__ = [
    "COLUMNS",
    "KINDS",
    "LOG2_E",
    "MISALIGNED",
    "Plan",
    "early_config",
    "enqueue",
    "make_plan",
    "reasons",
    "section_of",
]

KINDS = {"float16": "f16", "bfloat16": "bf16"}
LARGEST_WIDTH = 256
COLUMNS = 8  # of the output in one store: 16 bytes
MISALIGNED = "an array does not start at a multiple of 16 bytes"
LOG2_E = math.log2(math.e)
# Bytes of K and V of the heads worked on together: half of the 50 MB of L2, so that they stay in it.
SECTION_BYTES = 24 << 20
# forward_hopper.SIGNATURE: the descriptors, what else each call brings, and what the plan settles.
MAPS_BYTES = 3 * DESCRIPTOR_BYTES
ADDRESSES, SETTLED = struct.Struct("3Q"), struct.Struct("f10i")
OFFSETS = [
    0,
    *range(MAPS_BYTES, MAPS_BYTES + ADDRESSES.size, 8),
    *range(MAPS_BYTES + ADDRESSES.size, MAPS_BYTES + ADDRESSES.size + SETTLED.size, 4),
]


class Plan(NamedTuple):
    """A launch on one stream but for its addresses.

    Attributes
    ----------
    function, config
        As ``cuLaunchKernelEx`` takes them.
    out_shape, lse_shape, dtype
        Of the results; `dtype` is that of the inputs.  Rows of the output are a multiple of 16 bytes: columns
        from Dv on are 0.
    out_is_like_q
        Whether the output has the shape of q, and q is contiguous.
    arguments, start, pointers
        Memory that holds the packed arguments, where in it they start, and the array of their addresses.
    encode
        Writes the descriptors of q, k and v among the arguments.
    counters
        Where the stream's launches draw tiles from.
    lock
        Held while arguments are written and not yet read.
    """

    function: Any
    config: Any
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    dtype: str
    out_is_like_q: bool
    arguments: Any
    start: int
    pointers: Any
    encode: Callable[[Sequence[int]], None]
    counters: TileCounters
    lock: Any


def enqueue(plan: Plan, addresses: tuple[int, int, int], out: int, lse: int) -> None:
    """Queue a launch for q, k and v at `addresses`; `lse` is 0 if it is not wanted.  Nothing waits.

    Raises
    ------
    UnsupportedError
        If TMA cannot take an address.
    """
    if (addresses[0] | addresses[1] | addresses[2]) % 16:
        raise UnsupportedError(f"flash_attention_hopper: {MISALIGNED}")
    with plan.lock:
        plan.encode(addresses)
        ADDRESSES.pack_into(plan.arguments, plan.start + MAPS_BYTES, out, lse, plan.counters.address())
        # The driver has copied the arguments when this returns.
        checked(driver.cuLaunchKernelEx(plan.config, plan.function, ctypes.addressof(plan.pointers), 0))


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
    head_bytes = 2 * tk * (width + value_width) * kv_heads // heads
    section = section_of(all_heads, head_bytes) if variant.causal else 1
    offset = tk - tq if causal == "bottom_right" else 0
    size = MAPS_BYTES + ADDRESSES.size + SETTLED.size
    arguments = (ctypes.c_char * (size + ALIGNMENT))()
    start = -ctypes.addressof(arguments) % ALIGNMENT
    base = ctypes.addressof(arguments) + start
    columns = -(-value_width // COLUMNS) * COLUMNS
    out_shape = (batch, tq, heads, columns)
    factor = (width**-0.5 if scale is None else scale) * LOG2_E
    numbers = (tiles, per_head, section, heads, all_heads, heads // kv_heads, tq, tk, offset, columns)
    SETTLED.pack_into(arguments, start + MAPS_BYTES + ADDRESSES.size, factor, *numbers)
    rows = (variant.block_m, variant.block_n, variant.block_n)
    encoders = [encoder(x.shape, x.strides, dtype, r) for x, r in zip(views, rows, strict=True)]
    return Plan(
        function=_function(variant, device),
        config=early_config(min(tiles, processors), variant.threads, variant.shared_bytes, stream),
        out_shape=out_shape,
        lse_shape=(batch, heads, tq),
        dtype=dtype,
        out_is_like_q=views[0].shape == out_shape and views[0].strides == contiguous(out_shape, 2),
        arguments=arguments,
        start=start,
        pointers=(ctypes.c_void_p * len(OFFSETS))(*[base + at for at in OFFSETS]),
        encode=encode_together(encoders, base),
        counters=tile_counters(stream, device),
        lock=Lock(),
    )


def section_of(heads: int, head_bytes: int) -> int:
    """Return how many heads to work on together, with K and V of `head_bytes` each.

    Their row blocks are drawn by falling length, so that the last section ends evenly, unless it is a small
    rest: sections are as large as the L2 cache allows, and alike if that is possible.

    >>> section_of(64, 2 << 20), section_of(16, 8 << 20), section_of(7, 8 << 20), section_of(32, 1 << 20)
    (8, 2, 3, 16)
    """
    most = min(heads, max(1, SECTION_BYTES // max(1, head_bytes)))
    alike = max(size for size in range(1, most + 1) if heads % size == 0)
    if 2 * alike >= most:
        return alike
    return -(-heads // -(-heads // most))


def early_config(blocks: int, threads: int, shared_bytes: int, stream: int, *, together: bool = False) -> Any:
    """Return a launch that may begin under the end of the one before it (`cuda_backend.ptx.grid`).

    All its blocks run at the same time if they are to be `together`, whatever else the GPU does: a
    cooperative launch.  CUDA C++ Programming Guide, "Cooperative Groups", grid synchronization.
    """
    kinds, attributes = driver.CUlaunchAttributeID, [driver.CUlaunchAttribute()]
    attributes[0].id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attributes[0].value = value
    if together:
        attributes.append(driver.CUlaunchAttribute())
        attributes[1].id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        value = driver.CUlaunchAttributeValue()
        value.cooperative = 1
        attributes[1].value = value
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, driver.CUstream(stream)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


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
        if not 0 < width <= LARGEST_WIDTH:
            found.append(f"{axis} is {width}; the kernel takes up to {LARGEST_WIDTH}")
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
