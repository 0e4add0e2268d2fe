"""Calling the Hopper forward kernel with dropout: a launch of its own, arrays of any library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import Layout, View, empty, laid_out, view
from cuda_backend.attention.counters import TileCounters, tile_counters
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES, encode_together, encoder
from cuda_backend.attention.packed import Packed
from cuda_backend.attention.padding import aligned_rows
from cuda_backend.attention.plan_hopper import (
    COLUMNS,
    KINDS,
    LOG2_E,
    MISALIGNED,
    early_config,
    reasons,
    section_of,
)
from cuda_backend.attention.variant_hopper import Variant, choose_dropout
from cuda_backend.context import current_device
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.launch import allow_shared_memory, wait_for
from refimpl.attention import AttentionOutput
from refimpl.attention.scores import Causal, score_rule
from refimpl.errors import UnsupportedError
from refimpl.random import drop_threshold

__all__ = ["attention_with_dropout"]


class Plan(NamedTuple):
    """A launch on one stream but for addresses and the dropout's seed.

    Attributes
    ----------
    out_shape, lse_shape, dtype
        Of the results; rows of the output are a multiple of 16 bytes.
    main
        The launch.
    encode
        Writes the descriptors of q, k and v among its arguments.
    counters
        Where the stream's launches draw tiles from.
    lock
        Held while arguments are written and not yet read.
    """

    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    dtype: str
    main: Packed
    encode: Callable[[Sequence[int]], None]
    counters: TileCounters
    lock: Any


def attention_with_dropout(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Causal,
    scale: float | None,
    dropout_p: float,
    rng: Any,
    return_lse: bool,
    stream: int,
) -> Any:
    """Return what `flash_attention_hopper` does, with dropout; see there.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons.
    """
    nothing = np.zeros((1, 1, 1, 1), np.float32)
    rule = score_rule(nothing, nothing, nothing, dropout_p=dropout_p, rng=rng)
    views = [view(name, array, stream) for name, array in zip("qkv", (q, k, v), strict=True)]
    wait_for(views, stream)
    with ExitStack() as copies:
        aligned = [copies.enter_context(aligned_rows(given, stream)) for given in views]
        layouts = tuple(given.layout for given in aligned)
        plan = make_dropout_plan(layouts, causal, scale, rule.dropout_p, stream, current_device())
        out, out_result = empty(plan.out_shape, plan.dtype, q, stream)
        lse, lse_result = empty(plan.lse_shape, "float32", q, stream) if return_lse else (None, None)
        enqueue(plan, aligned, out.address, 0 if lse is None else lse.address, rule.seed, rule.dropout_p)
    columns = views[2].shape[3]
    result = out_result() if columns == plan.out_shape[3] else out_result()[..., :columns]
    return result if lse_result is None else AttentionOutput(result, lse_result())


def enqueue(plan: Plan, arrays: Sequence[View], out: int, lse: int, seed: int, dropout_p: float) -> None:
    """Queue a launch for q, k and v; `lse` is 0 if it is not wanted.  Nothing waits.

    Raises
    ------
    UnsupportedError
        If TMA cannot take an address.
    """
    addresses = [x.address for x in arrays]
    if any(address % 16 for address in addresses):
        raise UnsupportedError(f"flash_attention_hopper: {MISALIGNED}")
    with plan.lock:
        plan.encode(addresses)
        plan.main(out, lse, plan.counters.address(), seed, drop_threshold(dropout_p))


@functools.lru_cache(maxsize=1024)
def make_dropout_plan(
    layouts: tuple[Layout, ...],
    causal: Causal,
    scale: float | None,
    dropout_p: float,
    stream: int,
    device: int,
) -> Plan:
    """Return the plan of a call on the current GPU, `device`; `layouts` are those of q, k and v.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons.
    """
    views = [laid_out(name, layout) for name, layout in zip("qkv", layouts, strict=True)]
    found = reasons(*views, causal=causal, scale=scale)
    if found:
        raise UnsupportedError("flash_attention_hopper: " + "; ".join(found))
    dtype = views[0].dtype
    (batch, tq, heads, width), (_, tk, kv_heads, value_width) = views[0].shape, views[2].shape
    variant = choose_dropout(KINDS[dtype], width, value_width, bool(causal))
    all_heads, per_head = batch * heads, -(-tq // variant.block_m)
    tiles, processors = per_head * all_heads, int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    head_bytes = 2 * tk * (width + value_width) * kv_heads // heads
    section = section_of(all_heads, head_bytes) if variant.causal else 1
    offset = tk - tq if causal == "bottom_right" else 0
    columns = -(-value_width // COLUMNS) * COLUMNS
    numbers = (tiles, per_head, section, heads, all_heads, heads // kv_heads, tq, tk, offset, columns)
    main = Packed(
        _function(variant, device),
        early_config(min(tiles, processors), variant.threads, variant.shared_bytes, stream),
        3 * DESCRIPTOR_BYTES,
        "5Q2f10i",
        ((width**-0.5 if scale is None else scale) * LOG2_E, 1.0 / (1.0 - dropout_p), *numbers),
    )
    rows = (variant.block_m, variant.block_n, variant.block_n)
    encoders = [encoder(x.shape, x.strides, dtype, r) for x, r in zip(views, rows, strict=True)]
    return Plan(
        out_shape=(batch, tq, heads, columns),
        lse_shape=(batch, heads, tq),
        dtype=dtype,
        main=main,
        encode=encode_together(encoders, main.maps),
        counters=tile_counters(stream, device),
        lock=Lock(),
    )


@functools.cache
def _function(variant: Variant, device: int) -> Any:
    """Return the kernel of `variant` on the current GPU, compiled once, and allowed its shared memory."""
    made = functools.partial(_compiled, variant)
    return allow_shared_memory(
        load("attention_forward_dropout_hopper", variant, device, made), variant.shared_bytes
    )


def _compiled(variant: Variant) -> Image:
    from cuda_backend.attention.forward_dropout_hopper import SIGNATURE, build_dropout  # see `load`

    return compiled(build_dropout(variant), SIGNATURE, threads=variant.threads)
