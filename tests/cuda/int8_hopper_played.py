"""The Hopper int8 kernels played by NumPy: each launch is done to memory of the host, as its arguments say.

So everything around the kernels can be tested without a GPU: addresses, strides, layouts, orders of launches.
What a kernel leaves undefined is filled with something wrong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuda_backend import capture
from cuda_backend.arrays import View
from cuda_backend.int8 import (
    call_hopper,
    few_hopper,
    linear_hopper,
    memory,
    memory_hopper,
    plan_hopper,
    product_hopper,
    rows_hopper,
)
from refimpl import quant
from refimpl.numerics import round_to
from refimpl.quant.absmax import LIMIT
from tests.cuda.int8_hopper_driver import forget_plans, remembered

KINDS: dict[str, Any] = {
    "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "int32": np.dtype(np.int32)
}  # fmt: skip
ROOM = 1 << 22
GARBAGE = 99


def at(address: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Any:
    """Return the memory at an address as an array."""
    kind = np.dtype(dtype)
    if 0 in shape:
        return np.empty(shape, kind)
    steps = strides or tuple(int(kind.itemsize * np.prod(shape[i + 1 :])) for i in range(len(shape)))
    size = sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + kind.itemsize
    return np.ndarray(shape, kind, (ctypes.c_char * size).from_address(address), strides=steps)


def aligned(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array of garbage that begins at a multiple of 256 bytes."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    memory_ = np.full(size + 256, 0xFF, np.uint8)
    start = -memory_.ctypes.data % 256
    return memory_[start : start + size].view(kind).reshape(shape)


def viewed(_name: str, value: Any, _stream: int) -> View:
    """Return an array of the host as a kernel sees it, copied to a place as `cudaMalloc` gives it."""
    array = np.asarray(value)
    owner = aligned(array.shape, array.dtype)
    owner[...] = array
    return View(owner.shape, owner.strides, owner.dtype.name, owner.ctypes.data, owner)


def played(
    monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, Callable[[list[int]], list[int]]]
) -> list[SimpleNamespace]:
    """Let NumPy do what is launched, with the arguments of a kernel changed; return the list of launches."""
    launched = remembered(monkeypatch)
    areas = {"zeros": aligned((ROOM,), np.uint8), "scratch": aligned((ROOM,), np.uint8)}
    areas["zeros"][:] = 0
    matrices: list[Any] = []

    def area(name: str, size: int) -> int:
        assert size <= ROOM
        return int(areas[name].ctypes.data)

    def place(_number: int, addresses: tuple[int, ...], encoders: Any) -> int:
        matrices[:] = [encoder(address) for encoder, address in zip(encoders, addresses, strict=True)]
        return 1 << 30

    shared = SimpleNamespace(
        descriptors=SimpleNamespace(place=place),
        lock=memory_hopper.Lock(),
        zeros=lambda size: area("zeros", size),
        scratch=lambda size: area("scratch", size),
    )

    def encoder(rows: int, row_bytes: int, pitch: int, box_rows: int, box_bytes: int) -> Any:
        assert pitch % 16 == 0
        assert box_rows <= 256
        assert box_bytes in (32, 128)
        return lambda address: (address, rows, row_bytes, pitch)

    def allocated(shape: tuple[int, ...], dtype: str, _like: Any, _stream: int) -> Any:
        array = aligned(shape, KINDS.get(dtype, dtype))
        return View(shape, array.strides, dtype, array.ctypes.data, array), lambda: array

    def columns(weight: Any, _dtype: str, _stream: int) -> Any:
        codes, absmax = quant.quantize_columns(weight)
        turned = viewed("codes", np.ascontiguousarray(codes.T), 0)
        scales = viewed("absmax", absmax, 0)
        return SimpleNamespace(
            codes=turned, absmax=scales, codes_result=lambda: turned.owner, absmax_result=lambda: scales.owner
        )

    real_call = product_hopper.Launch.__call__

    def call(self: Any, stream: int, *addresses: int) -> None:
        real_call(self, stream, *addresses)
        item = launched[-1]
        if item.name in changes:
            item.values = changes[item.name](item.values)
        KERNELS[item.name](item, matrices)

    monkeypatch.setattr(product_hopper.Launch, "__call__", call)
    for module in (product_hopper, few_hopper):
        monkeypatch.setattr(module, "encoder", encoder)
    monkeypatch.setattr(plan_hopper, "shared_by", lambda *_: shared)
    monkeypatch.setattr(capture, "capturing", lambda _: False)
    monkeypatch.setattr(linear_hopper, "quantized_columns", columns)

    def memset(where: int, value: int, size: int, _stream: int) -> tuple[int]:
        at(where, (size,), np.uint8).fill(value)
        return (0,)

    def to_host(given: View, _stream: int) -> Any:
        return at(given.address, given.shape, given.dtype).copy()

    monkeypatch.setattr(rows_hopper, "driver", SimpleNamespace(cuMemsetD8Async=memset))
    monkeypatch.setattr(call_hopper, "to_host", to_host)
    for module in (call_hopper, linear_hopper, memory):
        monkeypatch.setattr(module, "view", viewed)
    for module in (call_hopper, linear_hopper):
        monkeypatch.setattr(module, "allocated", allocated)
    for module in (call_hopper, linear_hopper, product_hopper):
        monkeypatch.setattr(module, "current_device", lambda: 0)
    forget_plans()
    return launched


def quantize(item: SimpleNamespace, _matrices: Any) -> None:
    x_at, x_row, codes_at, pitch, absmax_at, marks_at, K, limit = item.values
    T, variant = item.blocks, item.variant
    x = at(x_at, (T, K), KINDS[variant.kind], (x_row, 2))
    assert not variant.aligned or (x_at % 16 == 0 and K % 8 == 0)
    bits = x.view(np.uint16) & 0x7FFF
    skipped = np.zeros((T, K), bool)
    if variant.aside in ("mark", "cells"):
        skipped = bits >= limit
        at(marks_at, (K,), np.uint8)[skipped.any(axis=0)] = 1
    if variant.aside == "columns":
        skipped[:, at(marks_at, (K,), np.uint8) != 0] = True
    if variant.aside == "mark":
        return
    with np.errstate(all="ignore"):
        wide = x.astype(np.float32)
        absmax = np.where(skipped, 0, bits).max(axis=1, initial=0).astype(np.uint16).view(x.dtype)
        steps = np.rint(wide * (np.float32(LIMIT) / absmax.astype(np.float32))[:, None])
        codes = np.where(np.abs(steps) <= LIMIT, steps, 0).astype(np.int8)
    at(absmax_at, (T,), np.float32)[...] = absmax.astype(np.float32)
    at(codes_at, (T, K), np.int8, (pitch, 1))[...] = np.where(
        skipped, 0 if variant.aside == "columns" else GARBAGE, codes
    )


def outliers(item: SimpleNamespace, _matrices: Any) -> None:
    marks, indices, number, codes_at, pitch, T, K = item.values
    found = np.flatnonzero(at(marks, (K,), np.uint8))
    at(number, (1,), np.int32)[0] = found.size
    at(indices, (found.size,), np.int32)[...] = found
    at(codes_at, (T, K), np.int8, (pitch, 1))[:, found] = 0


def met(variant: Any, w: int, w_feature: int, w_column: int, absmax_at: int, K: int, N: int) -> Any:
    """Return what outliers meet, [N, K]."""
    kind = KINDS[variant.kind]
    if variant.outliers == "paper":
        return at(w, (N, K), kind, (w_column, w_feature))
    codes, absmax = at(w, (N, K), np.int8, (w_column, w_feature)), at(absmax_at, (N,), np.float32)
    return round_to(codes.astype(np.float32) * (absmax / np.float32(LIMIT))[:, None], kind)


def product(item: SimpleNamespace, matrices: Any) -> None:
    out, a_absmax, b_absmax, bias, _, marks = item.values[4:10]
    codes, _, x_aside, w_aside, counters = item.values[16:21]
    M, N, room, K = item.values[25:]
    rows, columns = -(-M // 128), -(-N // item.variant.block_n)
    assert item.values[21:25] == [rows * columns, rows, columns, max(item.variant.last, -(-K // 128))]
    beside = item.variant.beside and marks
    if beside:
        assert matrices[0][0] == codes
        assert [(address, row, pitch) for address, _, row, pitch in matrices[2:]] == [
            (x_aside, 3 * room, 3 * room), (w_aside, 3 * room, 3 * room)
        ]  # fmt: skip
        assert at(counters, (3,), np.int32).tolist() == [0, 0, 0]
        for address, count in ((x_aside, M), (w_aside, N)):  # all of it can be written
            at(address, (count, 3 * room), np.uint8)[...] = GARBAGE
    after = out, a_absmax, b_absmax, bias, marks
    finish(item, matrices[:2], (M, N, K), after, item.values[10:16], beside)


def narrow(item: SimpleNamespace, matrices: Any) -> None:
    out, a_absmax, b_absmax, bias, _, marks, counters, codes, _ = item.values[2:11]
    tiles, own, steps, M, N, K = item.values[17:]
    assert item.blocks == tiles * -(-N // 128) * item.variant.blocks
    assert own * item.variant.blocks >= steps == -(-K // 128)
    assert tiles * item.variant.tokens >= M
    if item.variant.beside:
        assert matrices[1][0] == codes
        assert at(counters, (3,), np.int32).tolist() == [0, 0, 0]
    after = out, a_absmax, b_absmax, bias, marks
    finish(item, matrices[::-1], (M, N, K), after, item.values[11:17], item.variant.beside)


def finish(
    item: SimpleNamespace,
    codes: Any,
    sizes: Any,
    after: Any,
    met_by: Any,
    beside: bool,
) -> None:
    M, N, K = sizes
    out, a_absmax, b_absmax, bias, marks = after
    a, b = (at(address, (rows, K), np.int8, (pitch, 1)) for address, rows, _, pitch in codes)
    assert (a.shape, b.shape) == ((M, K), (N, K))
    x, x_row, x_feature, w, w_feature, w_column = met_by
    found = np.flatnonzero(at(marks, (K,), np.uint8)) if beside else None
    if found is not None and item.variant.outliers == "released":  # codes of outliers are taken away
        gone = a[:, found].astype(np.int64) @ at(w, (N, K), np.int8, (w_column, w_feature))[:, found].T
    else:
        gone = 0
    total = (a.astype(np.int64) @ b.astype(np.int64).T - gone).astype(np.int32)
    kind = KINDS[item.variant.kind]
    if item.variant.kind == "int32":
        at(out, (M, N), kind)[...] = total
        return
    scales = at(a_absmax, (M,), np.float32), at(b_absmax, (N,), np.float32)
    with np.errstate(all="ignore"):
        y = total.astype(np.float32) * scales[0][:, None] * scales[1] * np.float32(1 / LIMIT**2)
        if bias:
            y = y + at(bias, (N,), kind).astype(np.float32)
        if found is not None:
            far = met(item.variant, w, w_feature, w_column, b_absmax, K, N)[:, found].astype(np.float32)
            y = y + at(x, (M, K), kind, (x_row, x_feature))[:, found].astype(np.float32) @ far.T
            at(marks, (K,), np.uint8)[...] = 0
        at(out, (M, N), kind)[...] = round_to(y, kind)


def pack(item: SimpleNamespace, _matrices: Any) -> None:
    codes, by_row, by_k, target, rows, K, words = item.values
    room = at(target, (rows, 16 * words), np.int8)
    room[...] = GARBAGE
    room[:, :K] = at(codes, (rows, K), np.int8, (by_row, by_k))


def layer_few(item: SimpleNamespace, matrices: Any) -> None:
    x_at, x_row, out, absmax_at, bias, w, w_feature, w_column = item.values[1:9]
    own, steps, M, N, K, limit = item.values[9:]
    ((codes_at, rows, row_bytes, pitch),) = matrices
    variant = item.variant
    assert (rows, row_bytes) == (N, K)
    assert x_at % 16 == 0
    assert M == 1 or x_row % 16 == 0
    assert own * variant.blocks >= steps == -(-K // 128)
    assert own <= variant.room
    assert variant.rows >= M
    assert item.blocks == -(-N // 128) * item.cluster
    kind = KINDS[variant.kind]
    x = at(x_at, (M, K), kind, (x_row, 2))
    bits = x.view(np.uint16) & 0x7FFF
    outlier = bits >= limit
    found = np.flatnonzero(outlier.any(axis=0))
    b = at(codes_at, (N, K), np.int8, (pitch, 1))
    scale = at(absmax_at, (N,), np.float32)
    with np.errstate(all="ignore"):
        absmax = np.where(outlier, 0, bits).max(axis=1, initial=0).astype(np.uint16).view(kind)
        absmax = absmax.astype(np.float32)
        steps_ = np.rint(x.astype(np.float32) * (np.float32(LIMIT) / absmax)[:, None])
        a = np.where(np.abs(steps_) <= LIMIT, steps_, 0).astype(np.int64)
        a[:, found] = 0
        y = (a @ b.astype(np.int64).T).astype(np.float32) * absmax[:, None] * scale * np.float32(1 / LIMIT**2)
        if bias:
            y = y + at(bias, (N,), kind).astype(np.float32)
        if found.size:
            told = SimpleNamespace(kind=variant.kind, outliers="released")
            far = met(told, w, w_feature, w_column, absmax_at, K, N)[:, found].astype(np.float32)
            y = y + x[:, found].astype(np.float32) @ far.T
        at(out, (M, N), kind)[...] = round_to(y, kind)


KERNELS = {
    "layer_few": layer_few, "quantize": quantize, "outliers": outliers, "product": product, "narrow": narrow,
    "pack": pack,
}  # fmt: skip
