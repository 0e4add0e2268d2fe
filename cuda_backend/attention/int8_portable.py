"""Attention in int8 for every CUDA GPU and the simulator: scores from words of codes, P V in float32.

A block owns `ROWS` queries of a head and walks over tiles of `KEYS` keys, as `forward_portable` does; thread
(y, x) owns queries y, y + SIDE, ... and every SIDE-th key of a tile, then every SIDE-th channel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda, kernel, types
from cuda_backend.attention.tiles_portable import INDEX
from cuda_backend.formats import storage_type
from cuda_backend.int8.arithmetic import dot_product, reader, writer

__all__ = ["Variant", "build", "signature", "source"]

_ZERO, _MINUS_INFINITY = np.float32(0), np.float32(-np.inf)


class Variant(NamedTuple):
    """One compiled kernel: format of V and O, words of a head of Q and K, channels of V, causal or not."""

    kind: str
    words: int
    channels: int
    causal: bool

    @property
    def side(self) -> int:
        """Threads along a side, a power of two."""
        return 2 if SIMULATOR else 16

    @property
    def rows(self) -> int:
        """Queries of a tile, and keys of one."""
        return 4 if SIMULATOR else 32

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.side * self.side

    @property
    def own_channels(self) -> int:
        """Channels of a thread."""
        return -(-self.channels // self.side)

    @property
    def places(self) -> tuple[int, ...]:
        """Where K, V, P and the row maxima start behind Q, and where they end, in words of four bytes."""
        k = self.rows * (self.words + 1)
        v = k + self.rows * (self.words + 1)
        p = v + self.rows * self.own_channels * self.side
        maxima = p + self.rows * (self.rows + 1)
        return k, v, p, maxima, maxima + self.rows * self.side

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return 4 * self.places[-1]


def signature(variant: Variant) -> Any:
    """Return the argument types of the kernel; arrays may have any strides."""

    def array(dtype: Any, ndim: int) -> Any:
        return types.Array(dtype, ndim, "A")

    number = storage_type(variant.kind)
    return types.void(
        array(types.uint32, 4), array(types.uint32, 4),    # codes of q and k [B, T, H, words]
        array(types.float32, 3), array(types.float32, 3),  # their scales [B, H, blocks]
        types.int64, types.int64,                          # tokens of a block of queries, of keys
        array(number, 4), array(number, 4),                # v, out
        types.float32, types.int64,                        # scale, offset of the causal diagonal
    )  # fmt: skip


@functools.cache
def build(variant: Variant) -> Any:
    """Return the compiled kernel of `variant`."""
    return kernel(signature(variant))(source(variant))


def source(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant` as a Python function; the constants of its closure shape the code."""
    TILE, SIDE, THREADS, WORDS = variant.rows, variant.side, variant.threads, variant.words
    K_AT, V_AT, P_AT, MAXIMA, _ = variant.places
    OWN, CHANNELS, CAUSAL = TILE // SIDE, variant.own_channels, variant.causal
    QK, VS, PS = WORDS + 1, CHANNELS * SIDE, TILE + 1
    OUTPUTS = OWN * CHANNELS
    load, store = reader(variant.kind), writer(variant.kind)

    def int8_attention(
        q: Any, k: Any, q_scale: Any, k_scale: Any, q_block: Any, k_block: Any, v: Any, out: Any,
        scale: Any, offset: Any,
    ) -> None:  # fmt: skip
        words = cuda.shared.array(0, types.uint32)
        shared = cuda.shared.array(0, types.float32)  # the same memory
        o = cuda.local.array(OUTPUTS, types.float32)
        m = cuda.local.array(OWN, types.float32)
        l = cuda.local.array(OWN, types.float32)  # noqa: E741 (the field's name)
        thread = cuda.threadIdx.x & (THREADS - 1)
        x, y = thread & (SIDE - 1), thread // SIDE
        block = cuda.blockIdx.x & INDEX
        tiles = (q.shape[1] + TILE - 1) // TILE
        head = block // tiles
        first = TILE * (block - head * tiles)
        b, h = head // q.shape[2], head % q.shape[2]
        g = (h // (q.shape[2] // k.shape[2])) & INDEX
        n_q, n_k, Dv = q.shape[1], k.shape[1], v.shape[3]
        end = n_k
        if CAUSAL:
            end = min(end, first + TILE + offset)

        for e in range(thread, TILE * WORDS, THREADS):
            r, w = (e & INDEX) // WORDS, (e & INDEX) % WORDS
            word = np.uint32(0)
            if first + r < n_q:
                word = q[b, first + r, h, w]
            words[r * QK + w] = word
        for a in range(OWN):
            m[a], l[a] = _MINUS_INFINITY, _ZERO
            for n in range(CHANNELS):
                o[a * CHANNELS + n] = _ZERO

        for key in range(0, end, TILE):
            start = key & INDEX
            for e in range(thread, TILE * WORDS, THREADS):
                r, w = (e & INDEX) // WORDS, (e & INDEX) % WORDS
                word = np.uint32(0)
                if start + r < n_k:
                    word = k[b, start + r, g, w]
                words[K_AT + r * QK + w] = word
            for e in range(thread, TILE * VS, THREADS):
                r, d = (e & INDEX) // VS, (e & INDEX) % VS
                value = _ZERO
                if start + r < n_k and d < Dv:
                    value = load(v[b, start + r, g, d])
                shared[V_AT + r * VS + d] = value
            cuda.syncthreads()
            for a in range(OWN):
                row = y + a * SIDE
                i = first + row
                largest = _MINUS_INFINITY
                for c in range(OWN):
                    column = x + c * SIDE
                    j = start + column
                    score = _MINUS_INFINITY
                    allowed = i < n_q and j < n_k
                    if CAUSAL:
                        allowed = allowed and j <= i + offset
                    if allowed:
                        total = np.int32(0)
                        for w in range(WORDS):
                            total = dot_product(words[row * QK + w], words[K_AT + column * QK + w], total)
                        step = q_scale[b, h, (i // q_block) & INDEX] * k_scale[b, g, (j // k_block) & INDEX]
                        score = np.float32(total) * step * scale
                    shared[P_AT + row * PS + column] = score
                    largest = max(largest, score)
                shared[MAXIMA + row * SIDE + x] = largest
            cuda.syncthreads()
            for a in range(OWN):
                row = y + a * SIDE
                largest = m[a]
                for t in range(SIDE):
                    largest = max(largest, shared[MAXIMA + row * SIDE + t])
                base = largest
                if largest == _MINUS_INFINITY:
                    base = _ZERO  # no key yet: exp(-inf - 0) is the 0 that exp(-inf - -inf) is not
                shrink = np.float32(math.exp(m[a] - base))
                m[a] = largest
                total_p = l[a] * shrink
                for c in range(OWN):
                    place = P_AT + row * PS + x + c * SIDE
                    p = np.float32(math.exp(shared[place] - base))
                    total_p += p
                    shared[place] = p
                l[a] = total_p
                for n in range(CHANNELS):
                    o[a * CHANNELS + n] *= shrink
            cuda.syncthreads()
            for e in range(TILE):
                t = e & INDEX
                for a in range(OWN):
                    weight = shared[P_AT + (y + a * SIDE) * PS + t]
                    for n in range(CHANNELS):
                        o[a * CHANNELS + n] += weight * shared[V_AT + t * VS + x + n * SIDE]
            cuda.syncthreads()

        for a in range(OWN):  # each thread summed its own columns
            shared[MAXIMA + (y + a * SIDE) * SIDE + x] = l[a]
        cuda.syncthreads()
        for a in range(OWN):
            row = y + a * SIDE
            total_p = _ZERO
            for t in range(SIDE):
                total_p += shared[MAXIMA + row * SIDE + t]
            for n in range(CHANNELS):
                d = x + n * SIDE
                if first + row < n_q and d < Dv:
                    value = o[a * CHANNELS + n]
                    if total_p > _ZERO:
                        value /= total_p
                    out[b, first + row, h, d] = store(value)

    return int8_attention
