"""Calling the Hopper kernel for attention in int8: codes, descriptors, the launch."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

from cuda_backend._numba import cuda
from cuda_backend.arrays import View
from cuda_backend.attention.counters import tile_counters
from cuda_backend.attention.descriptors import ALIGNMENT, DESCRIPTOR_BYTES, encode_together, encoder
from cuda_backend.attention.int8_call import prepare
from cuda_backend.attention.int8_codes_call_hopper import coded
from cuda_backend.attention.int8_forward_hopper import KEYS, QUERIES, WIDEST, choose
from cuda_backend.attention.padding import aligned_rows
from cuda_backend.attention.plan_hopper import COLUMNS, KINDS, LOG2_E, MISALIGNED, early_config, section_of
from cuda_backend.attention.variant_hopper import SUBTILE, Variant
from cuda_backend.context import checked, current_device, driver, is_hopper
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.int8.memory import allocated
from cuda_backend.launch import allow_shared_memory
from refimpl.attention.scores import Causal
from refimpl.errors import UnsupportedError

__all__ = ["int8_attention_hopper"]

# int8_forward_hopper.SIGNATURE: the descriptors, addresses, and what the plan settles.
MAPS_BYTES = 3 * DESCRIPTOR_BYTES
ADDRESSES, SETTLED = struct.Struct("4Q"), struct.Struct("f12i")
OFFSETS = [
    0,
    *range(MAPS_BYTES, MAPS_BYTES + ADDRESSES.size, 8),
    *range(MAPS_BYTES + ADDRESSES.size, MAPS_BYTES + ADDRESSES.size + SETTLED.size, 4),
]


def int8_attention_hopper(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    causal: Causal = False,
    scale: float | None = None,
    smooth: bool = True,
    block_sizes: tuple[int, int] = (QUERIES, KEYS),
    stream: Any = None,
) -> Any:
    """Return attention whose scores are products of int8 codes, on the tensor cores of a Hopper GPU.

    Parameters
    ----------
    q, k, v : array of float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `cuda_backend.int8_attention`; D and Dv up to 128.  The last axis of `v` is contiguous, its
        other strides are multiples of 8 numbers, or it is contiguous and copied to such rows first.
    causal, scale, smooth, stream
        As for `cuda_backend.int8_attention`.
    block_sizes : tuple of int
        (64, 128): what a warpgroup and a key tile hold.

    Returns
    -------
    array, shape (B, Tq, Hq, Dv)
        In the dtype and library of `q`; P is rounded to that dtype, unnormalised.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `cuda_backend.int8_attention`.
    UnsupportedError
        For another GPU, format, width, layout or block; without keys, as `flash_attention_hopper`.
    BackendUnavailableError
        If there is no GPU.

    Notes
    -----
    Run on an H200 with D = 128 and 8192 or 16384 tokens: 1.07 to 1.14 times as fast as
    `flash_attention_hopper` in bursts, 1.15 to 1.21 times without a pause, when power sets the clock
    (docs/performance.md).

    References
    ----------
    .. [1] Zhang et al., 2024, arXiv:2410.02367, section 4.2 and Algorithm 1.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     import numpy as np
    ...     x = np.ones((1, 3, 2, 8), np.float16)
    ...     assert int8_attention_hopper(x, x, x).shape == x.shape
    """
    caller = "int8_attention_hopper"
    device = current_device()
    if not is_hopper():
        raise UnsupportedError(f"{caller}: the kernel needs a GPU of compute capability 9.0")
    if tuple(block_sizes) != (QUERIES, KEYS):
        raise UnsupportedError(f"{caller}: block_sizes are {block_sizes}; the kernel has {(QUERIES, KEYS)}")
    D, Dv = int(q.shape[-1]), int(v.shape[-1])
    if max(D, Dv) > WIDEST:
        raise UnsupportedError(f"{caller}: heads are {D} and {Dv} wide; the kernel takes {WIDEST}")
    call = prepare(caller, q, k, v, causal, scale, smooth, block_sizes, stream, coded=coded)
    if call.dtype not in KINDS:
        raise UnsupportedError(f"{caller}: inputs are {call.dtype}; the kernel takes float16 or bfloat16")
    B, Tq, H, _ = call.shape
    columns = -(-Dv // COLUMNS) * COLUMNS
    out, result = allocated((B, Tq, H, columns), call.dtype, call.like, call.on)
    if 0 in call.shape:
        return result()
    if 0 in call.v.shape:
        raise UnsupportedError(f"{caller}: there are no keys")
    with aligned_rows(call.v, call.on) as values:
        used = [step for step, size in zip(values.strides[:3], values.shape, strict=False) if size > 1]
        if values.strides[3] != 2 or any(step % 16 or step <= 0 for step in used):
            rule = "expected multiples of 16"
            raise UnsupportedError(f"{caller}: v has strides of {values.strides} bytes; {rule}")
        if values.address % 16:
            raise UnsupportedError(f"{caller}: {MISALIGNED}")
        queries, keys = (_rows(codes.words) for codes in (call.queries, call.keys))
        plan = _plan(
            queries.shape, keys.shape, values.shape, values.strides, call.dtype, bool(causal), call.offset,
            call.scale, columns, call.on, device,
        )  # fmt: skip
        addresses = out.address, call.queries.scale.address, call.keys.scale.address
        plan.enqueue((queries.address, keys.address, values.address), addresses)
    return result() if columns == Dv else result()[..., :Dv]


class Plan(NamedTuple):
    """A launch on one stream but for its addresses; `lock` is held until the driver has read them."""

    function: Any
    config: Any
    arguments: Any
    start: int
    pointers: Any
    encode: Callable[[Sequence[int]], None]
    counters: Any
    lock: Any

    def enqueue(self, matrices: tuple[int, int, int], addresses: tuple[int, int, int]) -> None:
        """Queue the kernel; nothing waits."""
        with self.lock:
            self.encode(matrices)
            ADDRESSES.pack_into(self.arguments, self.start + MAPS_BYTES, *addresses, self.counters.address())
            checked(driver.cuLaunchKernelEx(self.config, self.function, ctypes.addressof(self.pointers), 0))


def _rows(words: View) -> View:
    """Return codes [B, T, H, 32 words] as rows of as many 16-bit numbers as the producer expects."""
    shape = (*words.shape[:3], SUBTILE)
    return words._replace(shape=shape, strides=(*words.strides[:3], 2), dtype="float16")


@functools.lru_cache(maxsize=256)
def _plan(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: str,
    causal: bool,
    offset: int,
    scale: float,
    columns: int,
    stream: int,
    device: int,
) -> Plan:
    batch, tq, heads, _ = q
    _, tk, kv_heads, value_width = v
    variant = choose(KINDS[dtype], value_width, causal)
    all_heads, processors = batch * heads, int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    per_head = -(-tq // variant.block_m)
    tiles = per_head * all_heads
    head_bytes = tk * (WIDEST + 2 * value_width) * kv_heads // heads
    section = section_of(all_heads, head_bytes) if causal else 1
    size = MAPS_BYTES + ADDRESSES.size + SETTLED.size
    arguments = (ctypes.c_char * (size + ALIGNMENT))()
    start = -ctypes.addressof(arguments) % ALIGNMENT
    base = ctypes.addressof(arguments) + start
    numbers = (tiles, per_head, section, heads, all_heads, heads // kv_heads, tq, tk, offset, columns)
    blocks = -(-tq // QUERIES), -(-tk // KEYS)
    SETTLED.pack_into(arguments, start + MAPS_BYTES + ADDRESSES.size, scale * LOG2_E, *numbers, *blocks)
    encoders = [
        encoder(shape, strides, kind, rows)
        for shape, strides, kind, rows in (
            (q, _contiguous(q), "float16", variant.block_m),
            (k, _contiguous(k), "float16", variant.block_n),
            (v, v_strides, dtype, variant.block_n),
        )
    ]
    config = early_config(min(tiles, processors), variant.threads, variant.shared_bytes, stream)
    return Plan(
        _function(variant, device),
        config,
        arguments,
        start,
        (ctypes.c_void_p * len(OFFSETS))(*[base + at for at in OFFSETS]),
        encode_together(encoders, base),
        tile_counters(stream, device),
        Lock(),
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@functools.cache
def _function(variant: Variant, device: int) -> Any:
    make = functools.partial(_compiled, variant)
    function = load("attention_int8_hopper", variant, device, make)
    return allow_shared_memory(function, variant.shared_bytes)


def _compiled(variant: Variant) -> Image:
    from cuda_backend.attention.int8_forward_hopper import SIGNATURE, build  # not needed if it is on disk

    return compiled(build(variant), SIGNATURE, threads=variant.threads)
