"""Algorithm 1 of FlashAttention to the letter, to count its traffic: keys outside, O, l and m in memory.

The project's kernels have queries outside, as FlashAttention 2 has.  This one is no faster than it must be:
a block works on a head, in float32; l and m are [B, H, N].  What it moves is the algorithm's: neighboring
threads move neighboring numbers, tiles stay in shared memory, and nothing is in local memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, types

__all__ = ["KEYS", "ROWS", "SHARED", "THREADS", "WIDTH", "build", "source"]

KEYS = 64  # of a tile
ROWS = 16  # queries of a tile
WIDTH = 64  # of a head
THREADS = 128  # of a block
KEY_STRIDE, SCORE_STRIDE = WIDTH + 1, KEYS + 1  # so that a column lies in different banks
SHARED = 4 * (KEYS * KEY_STRIDE + KEYS * WIDTH + ROWS * WIDTH + ROWS * SCORE_STRIDE + 2 * ROWS)  # bytes


def source() -> Any:
    """Return the kernel as a function of Python."""

    def algorithm_1(q: Any, k: Any, v: Any, o: Any, l: Any, m: Any, scale: Any) -> None:  # noqa: E741
        keys = cuda.shared.array((KEYS, KEY_STRIDE), types.float32)
        values = cuda.shared.array((KEYS, WIDTH), types.float32)
        queries = cuda.shared.array((ROWS, WIDTH), types.float32)
        weights = cuda.shared.array((ROWS, SCORE_STRIDE), types.float32)
        kept = cuda.shared.array(ROWS, types.float32)
        added = cuda.shared.array(ROWS, types.float32)
        head, thread, N, Tk = cuda.blockIdx.x, cuda.threadIdx.x, q.shape[1], k.shape[1]
        for e in range(thread, N * WIDTH, THREADS):
            o[head, e // WIDTH, e % WIDTH] = 0
        for i in range(thread, N, THREADS):
            l[head, i] = 0
            m[head, i] = -np.inf
        for j in range(0, Tk, KEYS):
            present = min(KEYS, Tk - j)
            cuda.syncthreads()
            for e in range(thread, present * WIDTH, THREADS):
                keys[e // WIDTH, e % WIDTH] = k[head, j + e // WIDTH, e % WIDTH]
                values[e // WIDTH, e % WIDTH] = v[head, j + e // WIDTH, e % WIDTH]
            for i in range(0, N, ROWS):
                rows = min(ROWS, N - i)
                for e in range(thread, rows * WIDTH, THREADS):
                    queries[e // WIDTH, e % WIDTH] = q[head, i + e // WIDTH, e % WIDTH]
                cuda.syncthreads()
                for e in range(thread, rows * KEYS, THREADS):
                    row, key = e // KEYS, e % KEYS
                    score = np.float32(-np.inf)
                    if key < present:
                        score = np.float32(0)
                        for d in range(WIDTH):
                            score += queries[row, d] * keys[key, d]
                        score *= scale
                    weights[row, key] = score
                cuda.syncthreads()
                if thread < rows:
                    largest = np.float32(-np.inf)
                    for key in range(present):
                        largest = max(largest, weights[thread, key])
                    weight = np.float32(0)
                    for key in range(present):
                        p = np.float32(math.exp(weights[thread, key] - largest))
                        weights[thread, key] = p
                        weight += p
                    before = m[head, i + thread]
                    now = max(before, largest)
                    old = np.float32(math.exp(before - now)) * l[head, i + thread]
                    new = np.float32(math.exp(largest - now))
                    both = old + new * weight
                    kept[thread] = old / both
                    added[thread] = new / both
                    l[head, i + thread] = both
                    m[head, i + thread] = now
                cuda.syncthreads()
                for e in range(thread, rows * WIDTH, THREADS):
                    row, d = e // WIDTH, e % WIDTH
                    total = np.float32(0)
                    for key in range(present):
                        total += weights[row, key] * values[key, d]
                    o[head, i + row, d] = kept[row] * o[head, i + row, d] + added[row] * total

    return algorithm_1


def build() -> Any:
    """Return the kernel: ``kernel[heads of all sequences, THREADS](q, k, v, o, l, m, scale)``."""
    return cuda.jit(source())
