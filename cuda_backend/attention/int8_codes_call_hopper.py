"""Queueing what makes codes for attention in int8 on Hopper: two or three launches, looked up by layout."""

from __future__ import annotations

import functools
from threading import Lock
from typing import Any

from cuda_backend.arrays import View
from cuda_backend.attention import int8_codes_hopper
from cuda_backend.attention.int8_call import Codes, portable_codes
from cuda_backend.attention.int8_codes_hopper import PART, THREADS, WIDTH
from cuda_backend.attention.plan_hopper import KINDS
from cuda_backend.context import current_device
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.int8.launches_hopper import Launch
from cuda_backend.int8.memory import allocated

__all__ = ["coded"]

VECTOR = 16  # bytes that a thread loads at once


def coded(
    q: View, k: View, smooth: bool, block_sizes: tuple[int, int], dtype: str, like: Any, on: int
) -> tuple[Codes, Codes]:
    """Queue what makes codes of queries and keys, rows padded to `WIDTH`.

    Arrays that vectors of 16 bytes do not fit are left to the portable kernels.
    """
    if not (_fits(q, dtype) and _fits(k, dtype)):
        return portable_codes(q, k, smooth, block_sizes, dtype, like, on, WIDTH)
    parts = -(-k.shape[1] // PART)
    sums = 0
    if smooth:
        found, _ = allocated((k.shape[0], k.shape[2], parts, WIDTH), "float32", like, on)
        sums = found.address
        _enqueue(_sums_plan(KINDS[dtype], k.shape, k.strides, current_device()), on, k.address, sums)
    return (
        _coded(q, 0, block_sizes[0], smooth=False, dtype=dtype, like=like, on=on),
        _coded(k, sums, block_sizes[1], smooth=smooth, dtype=dtype, like=like, on=on),
    )


def _fits(x: View, dtype: str) -> bool:
    steps = x.strides[:3]
    return (
        dtype in KINDS
        and 0 not in x.shape
        and x.strides[3] == 2
        and x.shape[3] % (VECTOR // 2) == 0
        and not any(step % VECTOR or not 0 <= step < VECTOR << 31 for step in steps)
        and x.address % VECTOR == 0
    )


def _coded(x: View, sums: int, tokens: int, *, smooth: bool, dtype: str, like: Any, on: int) -> Codes:
    B, T, H, _ = x.shape
    words, _ = allocated((B, T, H, WIDTH // 4), "uint32", like, on)
    scale, _ = allocated((B, H, -(-T // tokens)), "float32", like, on)
    plan = _codes_plan(
        int8_codes_hopper.Codes(KINDS[dtype], tokens, smooth), x.shape, x.strides, current_device()
    )
    _enqueue(plan, on, x.address, sums, words.address, scale.address)
    return Codes(words, scale, tokens)


def _enqueue(plan: tuple[Launch, Any], on: int, *addresses: int) -> None:
    launch, lock = plan
    with lock:
        launch(on, *addresses)


@functools.lru_cache(maxsize=256)
def _sums_plan(
    kind: str, shape: tuple[int, ...], strides: tuple[int, ...], device: int
) -> tuple[Launch, Any]:
    B, T, H, D = shape
    parts = -(-T // PART)
    numbers = [H, T, parts, 2 * D // VECTOR, *(step // VECTOR for step in strides[:3])]
    function = _function("sums", kind, device)
    return Launch(function, 2, numbers, blocks=B * H * parts, threads=THREADS, early=True), Lock()


@functools.lru_cache(maxsize=256)
def _codes_plan(
    variant: int8_codes_hopper.Codes, shape: tuple[int, ...], strides: tuple[int, ...], device: int
) -> tuple[Launch, Any]:
    B, T, H, D = shape
    blocks = -(-T // variant.tokens)
    numbers = [H, T, -(-T // PART), 2 * D // VECTOR, blocks, *(step // VECTOR for step in strides[:3])]
    function = _function("codes", variant, device)
    return Launch(function, 4, numbers, blocks=B * H * blocks, threads=THREADS, early=True), Lock()


@functools.cache
def _function(name: str, variant: Any, device: int) -> Any:
    return load(
        f"attention_int8_{name}_hopper", (variant,), device, functools.partial(_compiled, name, variant)
    )


def _compiled(name: str, variant: Any) -> Image:
    if name == "sums":
        function, signature = int8_codes_hopper.build_sums(variant), int8_codes_hopper.SUMS_SIGNATURE
    else:
        function, signature = int8_codes_hopper.build_codes(variant), int8_codes_hopper.CODES_SIGNATURE
    return compiled(function, signature, threads=THREADS)
