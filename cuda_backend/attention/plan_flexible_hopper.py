"""What settles a Hopper launch with functions of the user's: lists of key tiles, kernel, numbers."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import ITEMSIZE, Layout, View, laid_out, view
from cuda_backend.attention.counters import TileCounters, tile_counters
from cuda_backend.attention.descriptors import ALIGNMENT, DESCRIPTOR_BYTES, encode_together, encoder
from cuda_backend.attention.lists_hopper import key_lists, live_tiles
from cuda_backend.attention.mask_words import MOST_BYTES, bytes_of, mask_words
from cuda_backend.attention.plan_hopper import COLUMNS, KINDS, LOG2_E, early_config, section_of
from cuda_backend.attention.traced import folds
from cuda_backend.attention.user_device import Mods, blamed
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant, candidates
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.context import checked, driver
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.launch import allow_shared_memory
from refimpl.numerics import Array

__all__ = ["FlexiblePlan", "Lists", "enqueue", "make_flexible_plan", "make_lists"]

# forward_flexible_hopper.signature: the descriptors, addresses, numbers, then arrays as Numba takes them.
MAPS_BYTES = 3 * DESCRIPTOR_BYTES
ADDRESSES, SETTLED = struct.Struct("6Q"), struct.Struct("2f6i")
ARRAY_WORDS = 5  # of an array, before its shape and strides
FOLDED = 2.0**-16, 2.0**16  # scales by which terms beside a score are divided: what overflows is no score


class Lists(NamedTuple):
    """Lists of key tiles on the GPU.

    Attributes
    ----------
    tiles
        The tiles that they are lists of.
    work_items
        Tiles of query rows.
    work, steps
        As `lists_hopper.KeyLists` has them.
    words : View, optional
        What may be seen of partial tiles, `mask_words`; without it the kernel asks the mask.
    """

    tiles: Variant
    work_items: int
    work: View
    steps: View
    words: View | None = None


class FlexiblePlan(NamedTuple):
    """A launch on one stream but for its addresses and the arrays of the user's functions.

    Attributes are those of `plan_hopper.Plan`.
    """

    function: Any
    config: Any
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    dtype: str
    arguments: Any
    start: int
    pointers: Any
    encode: Callable[[Sequence[int]], None]
    counters: TileCounters
    lock: Any


def make_lists(
    q: Layout,
    v: Layout,
    states: Callable[[int], Array],
    stream: int,
    mods: Mods = Mods(),  # noqa: B008
    arrays: tuple[View, ...] = (),
) -> Lists:
    """Return the lists of a call, for the tiles that take least time, on the GPU.

    Parameters
    ----------
    q, v : Layout
        Of queries and values.
    states : callable
        From the keys of a tile to the states of tiles of 64 rows, as `lists_hopper.key_lists` takes them.
    stream : int
        Where they are copied; they are there when this returns.
    mods, arrays
        Whose mask is asked for what may be seen of partial tiles.
    """
    queries, values = laid_out("q", q), laid_out("v", v)
    B, _, Hq, D = queries.shape
    _, Tk, Hkv, Dv = values.shape
    processors = int(cuda.get_current_device().MULTIPROCESSOR_COUNT)

    def time(candidate: tuple[Variant, float]) -> float:
        """Return about how long the busiest processor works, in tiles of the first candidate."""
        tiles, each = candidate
        live = live_tiles(states(tiles.block_n), tiles.consumers)
        lengths = np.broadcast_to(live.sum(-1), (B, Hq, live.shape[2]))
        return each * max(float(lengths.sum()) / processors, float(lengths.max()))

    tiles, _ = min(candidates(KINDS[queries.dtype], D, Dv), key=time)
    section = section_of(B * Hq, 2 * Tk * (D + Dv) * Hkv // Hq)
    lengths = live_tiles(states(tiles.block_n), tiles.consumers).sum(-1)
    if lengths.max() * processors > float(lengths.mean()) * lengths.shape[2] * section:
        section = B * Hq  # the longest list of the last section would be left over: it comes first of all
    ragged = Tk % tiles.block_n != 0
    found = key_lists(states(tiles.block_n), tiles.consumers, B, Hq, section, ragged=ragged)
    work, steps = view("work", found.work, stream), view("steps", found.steps, stream)
    words = None
    if mods.mask is not None and bytes_of(len(found.partial)) <= MOST_BYTES:
        partial = view("partial", found.partial, stream)
        words = mask_words(mods, arrays, partial, (queries.shape[1], Tk), tiles.block_n, stream)
    checked(driver.cuStreamSynchronize(stream))  # they are kept, and may be used on another stream
    return Lists(tiles, len(found.work), work, steps, words)


def enqueue(
    plan: FlexiblePlan,
    addresses: tuple[int, int, int],
    out: int,
    lse: int,
    lists: Lists,
    arrays: Sequence[View],
) -> None:
    """Queue a launch for q, k and v at `addresses`; `lse` is 0 if it is not wanted.  Nothing waits."""
    words: list[int] = []
    for array in arrays:
        words += [0, 0, math.prod(array.shape), ITEMSIZE[array.dtype], array.address]
        words += [*array.shape, *array.strides]
    with plan.lock:
        plan.encode(addresses)
        at = plan.start + MAPS_BYTES
        words_at = 0 if lists.words is None else lists.words.address
        places = out, lse, plan.counters.address(), lists.work.address, lists.steps.address, words_at
        ADDRESSES.pack_into(plan.arguments, at, *places)
        struct.pack_into(f"{len(words)}q", plan.arguments, at + ADDRESSES.size + SETTLED.size, *words)
        # The driver has copied the arguments when this returns.
        checked(driver.cuLaunchKernelEx(plan.config, plan.function, ctypes.addressof(plan.pointers), 0))


@functools.lru_cache(maxsize=256)
def make_flexible_plan(
    q: Layout,
    k: Layout,
    v: Layout,
    scale: float | None,
    mods: Mods,
    tiles: Variant,
    words: bool,
    count: int,
    stream: int,
    device: int,
) -> FlexiblePlan:
    """Return the plan of a call on the current GPU, `device`; `plan_hopper.reasons` has none against it."""
    views = [laid_out(name, layout) for name, layout in zip("qkv", (q, k, v), strict=True)]
    dtype = views[0].dtype
    batch, tq, heads, width = views[0].shape
    _, tk, kv_heads, value_width = views[2].shape
    sizes = [8 * (ARRAY_WORDS + 2 * ndim) for _, ndim in mods.aux or (("float32", 1),)]
    settled = MAPS_BYTES + ADDRESSES.size
    size = settled + SETTLED.size + sum(sizes)
    arguments = (ctypes.c_char * (size + ALIGNMENT))()
    start = -ctypes.addressof(arguments) % ALIGNMENT
    base = ctypes.addressof(arguments) + start
    columns = -(-value_width // COLUMNS) * COLUMNS
    factor = width**-0.5 if scale is None else scale
    folded = FOLDED[0] <= factor <= FOLDED[1] and folds(mods.score, mods.aux)
    variant = FlexibleVariant(tiles, mods, tk % tiles.block_n != 0, words, folded)
    exponent = LOG2_E if mods.score is not None and not folded else factor * LOG2_E
    numbers = (count, heads, heads // kv_heads, tq, tk, columns)
    SETTLED.pack_into(arguments, start + settled, factor, exponent, *numbers)
    offsets = [0, *range(MAPS_BYTES, settled, 8), *range(settled, settled + SETTLED.size, 4)]
    offsets += range(settled + SETTLED.size, size, 8)
    rows = (tiles.block_m, tiles.block_n, tiles.block_n)
    encoders = [encoder(x.shape, x.strides, dtype, r) for x, r in zip(views, rows, strict=True)]
    processors = int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    return FlexiblePlan(
        function=_function(variant, device),
        config=early_config(min(count, processors), tiles.threads, tiles.shared_bytes, stream),
        out_shape=(batch, tq, heads, columns),
        lse_shape=(batch, heads, tq),
        dtype=dtype,
        arguments=arguments,
        start=start,
        pointers=(ctypes.c_void_p * len(offsets))(*[base + at for at in offsets]),
        encode=encode_together(encoders, base),
        counters=tile_counters(stream, device),
        lock=Lock(),
    )


@functools.cache
def _function(variant: FlexibleVariant, device: int) -> Any:
    """Return the kernel of `variant` on the current GPU, compiled once, and allowed its shared memory."""
    make = functools.partial(_compiled, variant)
    mods = variant.mods
    keys = [None if mod is None else mod.key for mod in (mods.mask, mods.score)]
    with blamed(mods):
        name: tuple[object, ...] = (*variant._replace(mods=Mods()), mods.aux, *keys)
        if " object at 0x" in repr(keys):
            name = *name, uuid4()  # a function reads what has no name that another process would know
        function = load("attention_flexible_hopper", name, device, make)
    return allow_shared_memory(function, variant.tiles.shared_bytes)


def _compiled(variant: FlexibleVariant) -> Image:
    from cuda_backend.attention.forward_flexible_hopper import build, signature  # not needed if it is on disk

    return compiled(build(variant), signature(variant), threads=variant.tiles.threads)
