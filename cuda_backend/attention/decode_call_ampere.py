"""Calling the decoding kernel for tensor cores: what the layouts of a call settle once, and its launch."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda
from cuda_backend.arrays import (
    Layout,
    View,
    contiguous,
    empty,
    empty_tensor,
    is_host,
    laid_out,
    library_of,
    torch_layout,
    view,
)
from cuda_backend.attention.call import prepare
from cuda_backend.attention.counters import tile_counters
from cuda_backend.attention.decode_rule import options_of, rule_of
from cuda_backend.attention.decode_variant_ampere import KEYS, MOST_PARTS, DecodeVariant, choose, parts
from cuda_backend.context import checked, current_device, driver
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.launch import allow_shared_memory, shared_memory_bytes, stream_of, torch_stream, wait_for
from cuda_backend.scratch import workspace
from refimpl.attention import AttentionOutput
from refimpl.attention.scores import AttentionShape
from refimpl.errors import DTypeError, UnsupportedError
from refimpl.validation import whole

__all__ = ["Plan", "attend", "capable", "enqueue", "make_plan"]

KINDS = {"float16": "f16", "bfloat16": "bf16"}
LARGEST_WIDTH = 256
LEAST_COUNTERS = 64  # bytes
MOST_KEYS, MOST_BLOCKS, MOST_STEP = 1 << 30, (1 << 31) - 1, (1 << 31) - 1


class Plan(NamedTuple):
    """A launch but for its addresses.

    Attributes
    ----------
    launch
        Queues the kernel on a stream.
    out_shape, lse_shape, dtype
        Of the results; `dtype` is that of the inputs.
    out_is_like_q
        Whether the output has the shape of q, and q is contiguous.
    work_floats, counter_bytes
        What the parts of a cache need to be merged; 0 if there is one part.
    lock
        Held while arguments are written and not yet read.
    """

    launch: Any
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    dtype: str
    out_is_like_q: bool
    work_floats: int
    counter_bytes: int
    lock: Any


def capable(dtype: str, widths: tuple[int, int], page: int) -> bool:
    """Return whether there is a kernel for this GPU, a format, D and Dv, and pages of `page` keys or 0."""
    fits = all(0 < width <= LARGEST_WIDTH and width % 16 == 0 for width in widths)
    return not SIMULATOR and dtype in KINDS and fits and page % KEYS == 0 and _tensor_cores(current_device())


def attend(
    name: str,
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    k_lengths: Any,
    splits: int | None,
    scale: float | None,
    return_lse: bool,
    stream: Any,
) -> Any:
    """Return what `cuda_backend.split_kv_attention` says, by the kernel for tensor cores.

    Parameters
    ----------
    name : str
        The caller's, for errors.
    q, k, v, table, k_lengths, splits, scale, return_lse, stream
        As for `cuda_backend.paged_attention`; without a table k and v are the cache.

    Returns
    -------
    array or AttentionOutput
        As the reference.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons of `reasons`.
    BackendUnavailableError
        If there is no GPU.
    """
    if SIMULATOR:
        raise UnsupportedError(f"{name}: tier 'ampere' needs tensor cores, which the simulator has not")
    kind = type(q)
    if (
        library_of(q) == "torch"
        and type(k) is type(v) is kind
        and (table is None or type(table) is kind)
        and (k_lengths is None or type(k_lengths) is kind)
    ):  # by far the most calls: no views, and as little Python as can be
        device = current_device()
        on = torch_stream(q) if stream is None else stream_of(q, stream)
        plan = make_plan(
            name,
            (q.shape, q.stride(), q.dtype, q.get_device()),
            (k.shape, k.stride(), k.dtype, k.get_device()),
            (v.shape, v.stride(), v.dtype, v.get_device()),
            None if table is None else torch_layout(table),
            None if k_lengths is None else torch_layout(k_lengths),
            splits, scale, device,
        )  # fmt: skip
        out = empty_tensor(None if plan.out_is_like_q else plan.out_shape, q.dtype, q, on)
        lse = empty_tensor(plan.lse_shape, "float32", q, on) if return_lse else None
        work = empty_tensor((plan.work_floats,), "float32", q, on) if plan.work_floats else None
        addresses = (
            q.data_ptr(), k.data_ptr(), v.data_ptr(),
            0 if table is None else table.data_ptr(), 0 if k_lengths is None else k_lengths.data_ptr(),
            out.data_ptr(), 0 if lse is None else lse.data_ptr(), 0 if work is None else work.data_ptr(),
        )  # fmt: skip
        enqueue(name, plan, addresses, on, device)
        return out if lse is None else AttentionOutput(out, lse)
    call = prepare({"q": q, "k": k, "v": v}, options_of(k_lengths, scale), rule_of(table, k_lengths))
    on, device = stream_of(q, stream), current_device()
    indices = {"page_table": table, "k_lengths": k_lengths}
    seen = [
        *(view(key, array, on) for key, array in call.tensors.items()),
        *(_indices(key, array, on) for key, array in indices.items()),
    ]
    wait_for([x for x in seen if x is not None], on)
    plan = make_plan(name, *(None if x is None else x.layout for x in seen), splits, scale, device)
    like = call.tensors["q"]
    out, out_result = empty(plan.out_shape, plan.dtype, like, on)
    lse, lse_result = empty(plan.lse_shape, "float32", like, on) if return_lse else (None, None)
    with workspace(4 * max(1, plan.work_floats), on) as work:
        given = [0 if x is None else x.address for x in (*seen, out, lse)]
        enqueue(name, plan, (*given, work), on, device)
    return out_result() if lse_result is None else AttentionOutput(out_result(), lse_result())


def enqueue(name: str, plan: Plan, addresses: Sequence[int], stream: int, device: int) -> None:
    """Queue the kernel for q, k, v, table, lengths, outputs, log-sum-exps and work at `addresses`.

    Raises
    ------
    UnsupportedError
        If rows of K or V do not begin at multiples of 16 bytes, or those of q at multiples of 4.
    """
    if (addresses[1] | addresses[2]) % 16 or addresses[0] % 4:
        raise UnsupportedError(f"{name}: k or v does not start at a multiple of 16 bytes, or q of 4")
    counters = tile_counters(stream, device, plan.counter_bytes).address() if plan.counter_bytes else 0
    with plan.lock:
        plan.launch(stream, *addresses, counters)


def _indices(name: str, array: Any, stream: int) -> View | None:
    if array is None:
        return None
    return view(name, np.asarray(array, np.int64) if is_host(array) else array, stream)


@functools.lru_cache(maxsize=1024)
def make_plan(
    name: str, q: Layout, k: Layout, v: Layout, table: Layout | None, k_lengths: Layout | None,
    splits: int | None, scale: float | None, device: int, variant: DecodeVariant | None = None,
) -> Plan:  # fmt: skip
    """Return the plan of a call on the current GPU, `device`; `variant` is in place of `choose`'s.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons.
    """
    from cuda_backend.attention.decode_ampere import ADDRESSES
    from cuda_backend.int8.launches_hopper import Launch

    given = {"q": q, "k": k, "v": v, "page_table": table, "k_lengths": k_lengths}
    views = {key: laid_out(key, layout) for key, layout in given.items() if layout is not None}
    shape = _checked(views, scale)
    found = reasons(views, shape, splits)
    if found:
        raise UnsupportedError(f"{name}: " + "; ".join(found))
    rows = shape.Tq * shape.group
    kind = KINDS[views["q"].dtype]
    if variant is None:
        memory = shared_memory_bytes() or 0
        early = _capability(device) >= (9, 0)
        variant = choose(kind, shape.D, shape.Dv, rows, table is not None, memory, early)
    tiles = -(-rows // variant.rows)
    units = shape.B * shape.Hkv * tiles
    slots = variant.blocks * int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    count = parts(units, shape.Tk, slots) if splits is None else whole("splits", splits)
    numbers = arguments(views, shape, tiles, count, scale)
    launch = Launch(
        _function(variant, device), ADDRESSES, numbers,
        blocks=units * count, threads=variant.threads, shared_bytes=variant.shared_bytes,
        early=variant.early,
    )  # fmt: skip
    out_shape = (shape.B, shape.Tq, shape.Hq, shape.Dv)
    like = views["q"].shape == out_shape and views["q"].strides == contiguous(out_shape, 2)
    several = count > 1
    return Plan(
        launch=launch,
        out_shape=out_shape,
        lse_shape=(shape.B, shape.Hq, shape.Tq),
        dtype=views["q"].dtype,
        out_is_like_q=like,
        work_floats=several * units * count * variant.rows * (shape.Dv + 1),
        counter_bytes=several * max(LEAST_COUNTERS, 4 << (units - 1).bit_length()),
        lock=Lock(),
    )


def arguments(
    views: dict[str, View], shape: AttentionShape, tiles: int, count: int, scale: float | None
) -> list[int]:
    """Return the numbers of `decode_ampere.SIGNATURE` behind the addresses."""
    table, lengths = views.get("page_table"), views.get("k_lengths")
    page, pages = (views["k"].shape[1], table.shape[1]) if table else (0, 0)
    factor = (shape.D**-0.5 if scale is None else scale) * math.log2(math.e)
    return [
        shape.Tq, shape.Tk, shape.Hkv, shape.group, tiles, count, page, pages,
        *(_step(views["q"], axis, 4) for axis in range(3)),
        *(_step(views["k"], axis, 16) for axis in range(3)),
        *(_step(views["v"], axis, 16) for axis in range(3)),
        *((_step(table, 0, 1), _step(table, 1, 1)) if table else (0, 0)),
        _step(lengths, 0, 1) if lengths else 0,
        *struct.unpack("i", struct.pack("f", factor)),
    ]  # fmt: skip


def reasons(views: dict[str, View], shape: AttentionShape, splits: int | None) -> list[str]:
    """Return the reasons why the kernel refuses a valid call."""
    found = []
    q, k = views["q"], views["k"]
    if not _tensor_cores(current_device()):
        found.append("the GPU has no tensor cores of compute capability 8.0 or higher")
    if q.dtype not in KINDS:
        found.append(f"inputs are {q.dtype}; the kernel takes float16 or bfloat16")
    for axis, width in (("D", shape.D), ("Dv", shape.Dv)):
        if not 0 < width <= LARGEST_WIDTH or width % 16:
            found.append(f"{axis} is {width}; the kernel takes multiples of 16 up to {LARGEST_WIDTH}")
    if 0 in (shape.B, shape.Tq, shape.Tk, shape.Hkv, shape.Hq):
        found.append("an axis is empty")
    if "page_table" in views and k.shape[1] % KEYS:
        found.append(f"pages have {k.shape[1]} keys; the kernel takes multiples of {KEYS}")
    for name, unit in (("q", 4), ("k", 16), ("v", 16)):
        x = views[name]
        used = [step for step, size in zip(x.strides, x.shape, strict=True) if size > 1]
        if x.strides[3:] != (2,) or any(
            step % unit or not 0 <= step // unit <= MOST_STEP for step in used[:-1]
        ):
            rule = f"the last must be 2, the others multiples of {unit}"
            found.append(f"{name} has strides of {x.strides} bytes: {rule}")
    for name in ("page_table", "k_lengths"):
        if name in views and views[name].dtype not in ("int32", "int64"):
            found.append(f"{name} is {views[name].dtype}; the kernel takes int32 or int64")
        if name in views and any(not 0 <= step <= MOST_STEP for step in views[name].strides):
            found.append(f"{name} has strides of {views[name].strides} bytes")
    if splits is not None and splits > MOST_PARTS:
        found.append(f"splits is {splits}; the kernel makes up to {MOST_PARTS}")
    if shape.Tk > MOST_KEYS or shape.B * shape.Tq * shape.Hq * MOST_PARTS > MOST_BLOCKS:
        found.append("more keys or queries than the kernel counts")
    return found


def _step(x: View, axis: int, unit: int) -> int:
    """Return a stride in units of bytes; that of an axis of one, which is never taken, may be anything."""
    return x.strides[axis] // unit if x.shape[axis] > 1 else 0


def _checked(views: dict[str, View], scale: float | None) -> AttentionShape:
    """Check a call as the reference does, by shapes and dtypes alone."""
    stubs: dict[str, Any] = {
        key: np.broadcast_to(
            np.zeros((), np.int64 if key in ("page_table", "k_lengths") else np.float32), x.shape
        )
        for key, x in views.items()
    }
    kinds = {views[key].dtype for key in "qkv"}
    if len(kinds) > 1:
        raise DTypeError(f"q, k and v: expected one dtype, got {', '.join(sorted(kinds))}")
    table, lengths = stubs.get("page_table"), stubs.get("k_lengths")
    q, k, v = (stubs[key] for key in "qkv")
    return rule_of(table, lengths)(q, k, v, **options_of(lengths, scale)).shape


@functools.cache
def _tensor_cores(_device: int) -> bool:
    """Return whether the current GPU has compute capability 8.0 or higher."""
    return _capability(_device) >= (8, 0)


@functools.cache
def _capability(_device: int) -> tuple[int, ...]:
    """Return the compute capability of the current GPU."""
    return tuple(cuda.get_current_device().compute_capability)[:2]


@functools.cache
def _function(variant: DecodeVariant, device: int) -> Any:
    """Return the kernel of `variant` on the current GPU, compiled once, and allowed its shared memory."""
    function = load("decode_ampere", variant, device, functools.partial(_compiled, variant))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    checked(driver.cuFuncSetAttribute(function, attribute, 100))  # percent: room for all `variant.blocks`
    return allow_shared_memory(function, variant.shared_bytes)


def _compiled(variant: DecodeVariant) -> Image:
    from cuda_backend.attention.decode_ampere import SIGNATURE, build  # not needed if the kernel is on disk

    return compiled(build(variant), SIGNATURE, threads=variant.threads, blocks=variant.blocks)
