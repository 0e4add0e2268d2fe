"""Algorithm 1 of FlashAttention to the letter, to count its traffic: keys outside, O, l and m in memory.

The project's kernels have queries outside, as FlashAttention 2 has.  This one is no faster than it must be:
a block works on a head, a thread on a query of the tile, in float32; l and m are [B, H, N].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, types

__all__ = ["ROWS", "WIDTH", "build"]

ROWS = 64  # queries and keys of a tile: threads of a block
WIDTH = 64  # of a head


def build() -> Any:
    """Return the kernel: ``kernel[heads of all sequences, ROWS](q, k, v, o, l, m, scale)``."""

    def algorithm_1(q: Any, k: Any, v: Any, o: Any, l: Any, m: Any, scale: Any) -> None:  # noqa: E741
        keys = cuda.shared.array((ROWS, WIDTH), types.float32)
        values = cuda.shared.array((ROWS, WIDTH), types.float32)
        row = cuda.local.array(WIDTH, types.float32)
        total = cuda.local.array(WIDTH, types.float32)
        scores = cuda.local.array(ROWS, types.float32)
        head, thread, N, Tk = cuda.blockIdx.x, cuda.threadIdx.x, q.shape[1], k.shape[1]
        for i in range(thread, N, ROWS):
            for d in range(WIDTH):
                o[head, i, d] = 0
            l[head, i] = 0
            m[head, i] = -np.inf
        for j in range(0, Tk, ROWS):
            present = min(ROWS, Tk - j)
            cuda.syncthreads()
            for e in range(thread, present * WIDTH, ROWS):
                keys[e // WIDTH, e % WIDTH] = k[head, j + e // WIDTH, e % WIDTH]
                values[e // WIDTH, e % WIDTH] = v[head, j + e // WIDTH, e % WIDTH]
            cuda.syncthreads()
            for i in range(thread, N, ROWS):
                largest = np.float32(-np.inf)
                for d in range(WIDTH):
                    row[d] = q[head, i, d]
                    total[d] = 0
                for key in range(present):
                    score = np.float32(0)
                    for d in range(WIDTH):
                        score += row[d] * keys[key, d]
                    scores[key] = score * scale
                    largest = max(largest, scores[key])
                weight = np.float32(0)
                for key in range(present):
                    p = np.float32(math.exp(scores[key] - largest))
                    weight += p
                    for d in range(WIDTH):
                        total[d] += p * values[key, d]
                before, sum_before = m[head, i], l[head, i]
                now = max(before, largest)
                kept = np.float32(math.exp(before - now)) * sum_before
                new = np.float32(math.exp(largest - now))
                both = kept + new * weight
                for d in range(WIDTH):
                    o[head, i, d] = (kept * o[head, i, d] + new * total[d]) / both
                l[head, i] = both
                m[head, i] = now

    return cuda.jit(algorithm_1)
