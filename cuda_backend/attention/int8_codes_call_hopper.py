"""Queueing what makes codes for attention in int8 on Hopper: one launch, looked up by layout."""

from __future__ import annotations

import functools
from threading import Lock
from typing import Any

from cuda_backend.arrays import View
from cuda_backend.attention import int8_codes_hopper
from cuda_backend.attention.counters import tile_counters
from cuda_backend.attention.int8_call import Codes, portable_codes
from cuda_backend.attention.int8_codes_hopper import HALF, PART, RESIDENT, THREADS, WIDTH, Variant
from cuda_backend.attention.plan_hopper import KINDS
from cuda_backend.context import current_device
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.int8.launches_hopper import Launch
from cuda_backend.int8.memory import allocated

__all__ = ["coded", "phases"]

VECTOR = 16  # bytes that a thread loads at once
LARGEST_STEP = 1 << 25  # bytes from a token to the next: those of a block are told by 32 bits
# Keys of a phase in bytes.  Three phases, with the queries and codes of two, are to fit into the L2 cache.
PHASE_BYTES = 8 << 20
LEAST_COUNTERS = 1024  # bytes: calls of few heads share them

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


def coded(
    q: View, k: View, smooth: bool, block_sizes: tuple[int, int], dtype: str, like: Any, on: int
) -> tuple[Codes, Codes]:
    """Queue what makes codes of queries and keys, rows padded to `WIDTH`.

    Arrays that vectors of 16 bytes do not fit are left to the portable kernels.
    """
    if tuple(block_sizes) != (HALF, PART) or not (_fits(q, dtype) and _fits(k, dtype)):
        return portable_codes(q, k, smooth, block_sizes, dtype, like, on, WIDTH)
    device, lines = current_device(), k.shape[0] * k.shape[2]
    sums, counters = 0, 0
    if smooth:
        found, _ = allocated((lines, -(-k.shape[1] // PART) + 1, WIDTH), "float32", like, on)
        size = max(LEAST_COUNTERS, 1 << (4 * lines - 1).bit_length())
        sums, counters = found.address, tile_counters(on, device, size).address()
    codes = [_allocated(x, tokens, like, on) for x, tokens in ((q, HALF), (k, PART))]
    addresses = [address for each in codes for address in (each.words.address, each.scale.address)]
    launch, lock = _plan(Variant(KINDS[dtype], smooth), (q.shape, q.strides), (k.shape, k.strides), device)
    with lock:
        launch(on, q.address, k.address, sums, counters, *addresses)
    return codes[0], codes[1]


def phases(lines: int, blocks: int, tokens: int, q_items: int, smooth: bool) -> tuple[int, list[int]]:
    """Return how many blocks to launch, and what `int8_codes_hopper.SIGNATURE` wants to know of phases.

    Of `lines` heads of keys, each of `blocks` blocks and `tokens` tokens, and `q_items` blocks of queries.

    >>> phases(16, 64, 8192, 1024, True)  # four heads at once, in 4 phases and one that only codes
    (3585, [717, 4, 256, 205])
    """
    most = min(lines, max(1, PHASE_BYTES // (2 * WIDTH * tokens)))
    number = -(-lines // most)
    group = -(-lines // number)
    share = -(-q_items // (number + 1))
    of_keys = group * blocks
    phase = (2 if smooth else 1) * of_keys + share
    return (number + 1) * phase, [phase, group, of_keys, share]


def _fits(x: View, dtype: str) -> bool:
    steps = x.strides[:3]
    return (
        dtype in KINDS
        and 0 not in x.shape
        and x.strides[3] == 2
        and x.shape[3] % (VECTOR // 2) == 0
        and not any(step % VECTOR or not 0 <= step < VECTOR << 31 for step in steps)
        and steps[1] < LARGEST_STEP
        and x.address % VECTOR == 0
    )


def _allocated(x: View, tokens: int, like: Any, on: int) -> Codes:
    B, T, H, _ = x.shape
    words, _ = allocated((B, T, H, WIDTH // 4), "uint32", like, on)
    scale, _ = allocated((B, H, -(-T // tokens)), "float32", like, on)
    return Codes(words, scale, tokens)


@functools.lru_cache(maxsize=256)
def _plan(variant: Variant, q: Layout, k: Layout, device: int) -> tuple[Launch, Any]:
    numbers = []
    for (B, T, H, _), strides in (q, k):
        parts = -(-T // PART)
        numbers.append([H, T, parts, B * H * parts, *(step // VECTOR for step in strides[:3])])
    _, tokens, parts, k_items, *_ = numbers[1]
    lines = numbers[1][3] = k_items // parts
    blocks, numbers_of_phases = phases(lines, parts, tokens, numbers[0][3], variant.smooth)
    all_numbers = [*numbers_of_phases, 2 * q[0][3] // VECTOR, *numbers[0], *numbers[1]]
    function = _function(variant, device)
    return Launch(function, 8, all_numbers, blocks=blocks, threads=THREADS, early=True), Lock()


@functools.cache
def _function(variant: Variant, device: int) -> Any:
    return load("attention_int8_codes_hopper", variant, device, functools.partial(_compiled, variant))


def _compiled(variant: Variant) -> Image:
    return compiled(
        int8_codes_hopper.build(variant), int8_codes_hopper.SIGNATURE, threads=THREADS, blocks=RESIDENT
    )
