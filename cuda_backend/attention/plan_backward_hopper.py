"""What the layouts of arrays settle of a Hopper backward pass, found once: launches but for addresses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import Layout, View, laid_out
from cuda_backend.attention.counters import TileCounters, tile_counters
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES, encode_together, encoder, row_encoder
from cuda_backend.attention.packed import Packed
from cuda_backend.attention.plan_hopper import (
    COLUMNS,
    KINDS,
    LOG2_E,
    MISALIGNED,
    early_config,
    reasons,
    section_of,
)
from cuda_backend.attention.schedule_backward_hopper import rotates, spacing_of
from cuda_backend.attention.user_device import blamed
from cuda_backend.attention.variant_backward_hopper import (
    CONSUMERS,
    DESCRIPTORS,
    LARGEST_WIDTH,
    BackwardVariant,
    choose_backward,
)
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant, choose_wide_backward
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.launch import allow_shared_memory
from cuda_backend.scratch import workspace
from refimpl.attention.scores import Causal
from refimpl.errors import UnsupportedError
from refimpl.validation import bind_axes

__all__ = [
    "BackwardPlan", "Inputs", "Outputs", "backward_reasons", "enqueue_backward", "make_backward_plan",
    "together",
]  # fmt: skip

AXES = {
    "q": "B Tq Hq D", "k": "B Tk Hkv D", "v": "B Tk Hkv Dv", "o": "B Tq Hq Dv", "do": "B Tq Hq Dv",
    "lse": "B Hq Tq",
}  # fmt: skip
PLACE = 256  # arrays in the workspace begin at multiples of it
LARGEST = (1 << 31) - 1
THREADS = 128 * CONSUMERS  # of the kernel before


class Inputs(NamedTuple):
    """Addresses, or layouts, of what a backward pass reads; the log-sum-exp is contiguous float32."""

    q: Any
    k: Any
    v: Any
    o: Any
    do: Any
    lse: Any


class Outputs(NamedTuple):
    """Addresses, or shapes, of the gradients; rows are of whole 16 bytes, what is beyond D or Dv is 0."""

    dq: Any
    dk: Any
    dv: Any


class BackwardPlan(NamedTuple):
    """The three launches of a call on one stream, and what they need.

    Attributes
    ----------
    shapes, dtype
        Of the gradients.
    prepare, main, finish
        The launches.
    encode
        Writes the descriptors of q, k, v, dO, shifts and deltas among the arguments of `main`.
    strides
        Of o and dO, as `prepare` takes them.
    places
        Where in the workspace shifts, deltas, sums and words begin, and its size.
    counters
        Where the stream's launches draw tiles from.
    stream, lock
        The stream; held while arguments are written and not yet read.
    """

    shapes: Outputs
    dtype: str
    prepare: Packed
    main: Packed
    finish: Packed
    encode: Callable[[Sequence[int]], None]
    strides: tuple[int, ...]
    places: tuple[int, ...]
    counters: TileCounters
    stream: int
    lock: Any


def enqueue_backward(plan: BackwardPlan, at: Inputs, to: Outputs, more: tuple[int, ...] = (0, 0)) -> None:
    """Queue a backward pass of arrays at addresses; nothing waits.

    `more` is seed and threshold of the dropout; with functions of the user's, lists of tiles and arrays.

    Raises
    ------
    UnsupportedError
        If TMA cannot take an address.
    """
    if (at.q | at.k | at.v | at.o | at.do) % 16:
        raise UnsupportedError(f"flash_attention_vjp_hopper: {MISALIGNED}")
    with plan.lock, workspace(plan.places[-1], plan.stream) as room:
        shifts, deltas, sums, words = (room + place for place in plan.places[:-1])
        plan.encode((at.q, at.k, at.v, at.do, shifts, deltas))
        plan.prepare(at.o, at.do, at.lse, shifts, deltas, sums, words, *plan.strides)
        plan.main(to.dk, to.dv, sums, words, plan.counters.address(), *more)
        plan.finish(sums, to.dq)


@functools.lru_cache(maxsize=1024)
def make_backward_plan(
    inputs: tuple[Layout, ...],
    causal: Causal,
    scale: float | None,
    deterministic: bool,
    stream: int,
    device: int,
    variant: BackwardVariant | WideBackwardVariant | None = None,
    dropout_p: float = 0.0,
) -> BackwardPlan:
    """Return the plan of a call on the current GPU, `device`; `variant` is in place of `choose_backward`'s.

    `inputs` are the layouts of `Inputs`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons.
    """
    views = Inputs(*(laid_out(name, layout) for name, layout in zip(Inputs._fields, inputs, strict=True)))
    found = backward_reasons(views, causal=causal, scale=scale)
    if found:
        raise UnsupportedError("flash_attention_vjp_hopper: " + "; ".join(found))
    q, k, v, o, do, _ = views
    (batch, tq, heads, width), (_, tk, kv_heads, value_width) = q.shape, v.shape
    group, kind = heads // kv_heads, KINDS[q.dtype]
    if variant is None:
        how = {"deterministic": deterministic, "dropout": dropout_p > 0}
        choose = choose_backward if max(width, value_width) <= LARGEST_WIDTH else choose_wide_backward
        variant = choose(kind, width, value_width, bool(causal), **how)
    blocks, key_blocks = -(-tq // variant.block_m), -(-tk // variant.block_n)
    lines, tiles, all_heads = batch * heads * blocks, key_blocks * batch * kv_heads, batch * kv_heads
    processors = int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    factor = width**-0.5 if scale is None else scale
    columns, value_columns = (-(-size // COLUMNS) * COLUMNS for size in (width, value_width))
    section = together(variant, all_heads, group * blocks) if variant.causal else 1
    if rotates(variant):
        section = spacing_of(key_blocks, blocks, min(tiles, processors))
    wait_for_later = rotates(variant) and section > 0
    offset = tk - tq if causal == "bottom_right" else 0
    problem = (
        tiles, key_blocks, section, kv_heads, all_heads, group, blocks, tq, tk, offset, columns, value_columns
    )  # fmt: skip
    statistics = 4 * lines * variant.block_m
    sizes = (statistics, statistics, lines * variant.shares * variant.share_bytes, 4 * lines)
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // PLACE) * PLACE)
    rows = (variant.block_m, variant.block_n, variant.block_n, variant.block_m)
    encoders = [encoder(x.shape, x.strides, q.dtype, r) for x, r in zip((q, k, v, do), rows, strict=True)]
    encoders += [row_encoder(lines, variant.block_m)] * 2
    main = Packed(
        _function("main", variant, device),
        early_config(
            min(tiles, processors), variant.threads, variant.shared_bytes, stream, together=wait_for_later
        ),
        DESCRIPTORS * DESCRIPTOR_BYTES,
        f"{variant.addresses}Q3f12i",
        (factor * LOG2_E, factor, 1.0 / (1.0 - dropout_p), *problem),
    )
    turned_bytes = variant.block_m * (2 * variant.d + 16) if variant.swapped else 0
    return BackwardPlan(
        shapes=Outputs(
            (batch, tq, heads, columns), (batch, tk, kv_heads, columns), (batch, tk, kv_heads, value_columns)
        ),
        dtype=q.dtype,
        prepare=Packed(
            _function("prepare", variant._replace(mods=None), device),
            early_config(lines, THREADS, 0, stream),
            0,
            "13Q4i",
            (blocks, heads, tq, value_width),
        ),
        main=main,
        finish=Packed(
            _function("finish", variant._replace(mods=None), device),
            early_config(lines, 128 * variant.shares, turned_bytes, stream),
            0,
            "2Q1f4i",
            (factor, blocks, heads, tq, columns),
        ),
        encode=encode_together(encoders, main.maps),
        strides=(*o.strides[:3], *do.strides[:3]),
        places=tuple(places),
        counters=tile_counters(stream, device),
        stream=stream,
        lock=Lock(),
    )


def together(variant: BackwardVariant | WideBackwardVariant, heads: int, blocks: int) -> int:
    """Return how many of `heads` key heads to work on together, each seen by `blocks` blocks of queries.

    Q and dO are read again for every block of keys, and sums of dQ added to.
    """
    sums_bytes = variant.shares * variant.share_bytes
    return section_of(heads, blocks * (variant.q_bytes + variant.do_bytes + sums_bytes))


def backward_reasons(given: Inputs, *, causal: Causal, scale: float | None) -> list[str]:
    """Return the reasons why the Hopper backward kernels refuse views that the reference takes.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the reference would refuse them too.
    """
    stubs = [np.broadcast_to(np.float32(0), x.shape) for x in given]
    bind_axes({name: (x, AXES[name]) for name, x in zip(Inputs._fields, stubs, strict=True)})
    found = reasons(given.q, given.k, given.v, causal=causal, scale=scale)
    for name, x in (("o", given.o), ("do", given.do)):
        found += _of_the_output(name, x, given.q)
    if given.lse.dtype != "float32" or not _contiguous(given.lse):
        found.append("lse: the kernel takes contiguous float32")
    batch, tq, heads, _ = given.q.shape
    if batch * heads * (tq + 256) > LARGEST:
        found.append(f"B * Hq * Tq exceeds {LARGEST}")
    return found


def _of_the_output(name: str, x: View, q: View) -> list[str]:
    """Return what is wrong with an array that lies as the output does."""
    if x.dtype != q.dtype:
        return [f"{name} is {x.dtype}, q is {q.dtype}"]
    used = [step for step, size in zip(x.strides[:3], x.shape, strict=False) if size > 1]
    if x.strides[3] != 2 or any(step % 16 or not 0 < step < 1 << 40 for step in used):
        return [f"{name} has strides of {x.strides} bytes: the last must be 2, the others multiples of 16"]
    return []


def _contiguous(x: View) -> bool:
    expected = 4
    for size, step in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


@functools.cache
def _function(name: str, variant: BackwardVariant | WideBackwardVariant, device: int) -> Any:
    """Return a kernel of `variant` on the current GPU, compiled once: "prepare", "main" or "finish"."""
    made = functools.partial(_compiled, name, variant)
    key = variant if variant.mods is None else (*variant[:-1], variant.mods.kept_as())
    function = load(f"attention_backward_{name}_hopper", key, device, made)
    return allow_shared_memory(function, variant.shared_bytes) if name == "main" else function


def _compiled(name: str, variant: BackwardVariant | WideBackwardVariant) -> Image:
    from cuda_backend.attention import around_backward_hopper as around  # not needed if the kernel is on disk
    from cuda_backend.attention.backward_hopper import SIGNATURE, build_backward
    from cuda_backend.attention.wide_backward_hopper import build_wide_backward

    if variant.mods is not None:
        from cuda_backend.attention.flexible_backward_hopper import (
            build_flexible_backward,
            flexible_signature,
        )

        with blamed(variant.mods):
            kernel, signature = build_flexible_backward(variant), flexible_signature(variant.mods)
            return compiled(kernel, signature, threads=variant.threads)
    if name == "main":
        if isinstance(variant, WideBackwardVariant):
            kernel = build_wide_backward(variant)
        else:
            kernel = build_backward(variant)
        return compiled(kernel, SIGNATURE, threads=variant.threads)
    if name == "prepare":
        return compiled(around.build_prepare(variant), around.PREPARE_SIGNATURE, threads=THREADS)
    return compiled(around.build_finish(variant), around.FINISH_SIGNATURE, threads=128 * variant.shares)
