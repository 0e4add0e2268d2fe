"""Split-KV decoding for every CUDA GPU and Numba's simulator: parts of a cache, then their merge.

A block owns one key head of one sequence and one part of the keys, and all rows that read it: the query heads
of the group, packed with the new queries, so that K and V are read once.  Per tile of keys, with a barrier
after each line::

    K to shared memory
    P = Q K', masked
    V in the place of K;  m, l = new maxima and sums of each row, P = exp(P - m), and exp(m_old - m)
    O = exp(m_old - m) O + P V, in shared memory

Parts leave float32 outputs and log-sum-exps; the kernel of the merge weighs them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, kernel, types
from cuda_backend.attention.arguments import array_type
from cuda_backend.attention.tiles_portable import INDEX
from cuda_backend.formats import narrow, storage_type, widen

__all__ = ["MERGE_THREADS", "DecodeVariant", "build", "build_merge", "merge_signature", "merge_source"]
__all__ += ["signature", "source"]

MERGE_THREADS = 128
_MINUS_INFINITY, _ZERO, _ONE = np.float32(-np.inf), np.float32(0), np.float32(1)
_float32 = types.float32


class DecodeVariant(NamedTuple):
    """One compiled kernel: format, widths of a head, rows that share keys, keys of a tile, threads."""

    kind: str
    D: int
    Dv: int
    rows: int
    keys: int
    threads: int
    paged: bool
    table: str = "int64"
    lengths: str = "int64"

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where K or V, P, O, and m, l and the shrinkage of each row start behind Q, and where they end."""
        sizes = (
            self.rows * self.D, self.keys * (max(self.D, self.Dv) | 1), self.rows * self.keys,
            self.rows * self.Dv, self.rows, self.rows, self.rows,
        )  # fmt: skip
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + size)
        return tuple(ends[1:])

    @property
    def floats(self) -> int:
        """Dynamic shared memory in floats."""
        return self.offsets[-1]


def signature(variant: DecodeVariant) -> Any:
    """Return the argument types of the kernel of parts."""
    number = array_type(storage_type(variant.kind), 4)
    return types.void(
        number, number, number,                                    # q, k, v or their pages
        array_type(getattr(types, variant.table), 2),              # page table
        array_type(getattr(types, variant.lengths), 1),            # k_lengths
        array_type(types.float32, 5), array_type(types.float32, 4),  # outputs and log-sum-exps of parts
        types.int64, types.float32,                                # keys of a part, scale
    )  # fmt: skip


@functools.cache
def build(variant: DecodeVariant) -> Any:
    """Return the compiled kernel of parts."""
    return kernel(signature(variant))(source(variant))


def source(variant: DecodeVariant) -> Any:
    """Return the kernel of parts as a Python function; the constants of its closure shape the code."""
    D, Dv, ROWS, KEYS, THREADS, PAGED = (
        variant.D, variant.Dv, variant.rows, variant.keys, variant.threads, variant.paged
    )  # fmt: skip
    KV, P, O, M, L, SHRINK, _ = variant.offsets  # noqa: E741 (the field's name)
    STRIDE, load = max(D, Dv) | 1, widen(variant.kind)

    def split_kv(
        q: Any, k: Any, v: Any, table: Any, lengths: Any, outs: Any, lses: Any, size: Any, scale: Any
    ) -> None:
        shared = cuda.shared.array(0, _float32)
        thread = cuda.threadIdx.x & (THREADS - 1)
        block = cuda.blockIdx.x & INDEX
        heads = k.shape[2]
        part = (block // (q.shape[0] * heads)) & INDEX
        b = ((block // heads) % q.shape[0]) & INDEX
        g = (block % heads) & INDEX
        group, n_q = q.shape[2] // heads, q.shape[1]
        n_k = int(lengths[b])
        page = k.shape[1]
        begin, end = part * size, min(n_k, (part + 1) * size)

        for e in range(thread, ROWS * D, THREADS):
            r = (e & INDEX) // D
            shared[e & INDEX] = load(q[b, r // group, g * group + r % group, (e & INDEX) % D])
        for e in range(thread, ROWS * Dv, THREADS):
            shared[O + (e & INDEX)] = _ZERO
        for e in range(thread, ROWS, THREADS):
            shared[M + (e & INDEX)] = _MINUS_INFINITY
            shared[L + (e & INDEX)] = _ZERO

        for key in range(begin, end, KEYS):
            start = key & INDEX
            for e in range(thread, KEYS * D, THREADS):
                t = (e & INDEX) // D
                d = (e & INDEX) % D
                j = start + t
                value = _ZERO
                if j < end:
                    if PAGED:
                        value = load(k[table[b, j // page], j % page, g, d])
                    else:
                        value = load(k[b, j, g, d])
                shared[KV + t * STRIDE + d] = value
            cuda.syncthreads()

            for e in range(thread, ROWS * KEYS, THREADS):
                r = (e & INDEX) // KEYS
                t = (e & INDEX) % KEYS
                score = _MINUS_INFINITY
                # The newest query sees all n_k keys, the one before it one less.
                if start + t < end and start + t <= n_k - n_q + r // group:
                    total = _ZERO
                    for d in range(D):
                        total += shared[r * D + d] * shared[KV + t * STRIDE + d]
                    score = total * scale
                shared[P + (e & INDEX)] = score
            cuda.syncthreads()

            for e in range(thread, KEYS * Dv, THREADS):
                t = (e & INDEX) // Dv
                d = (e & INDEX) % Dv
                j = start + t
                value = _ZERO
                if j < end:
                    if PAGED:
                        value = load(v[table[b, j // page], j % page, g, d])
                    else:
                        value = load(v[b, j, g, d])
                shared[KV + t * STRIDE + d] = value
            for e in range(thread, ROWS, THREADS):
                r = e & INDEX
                largest = shared[M + r]
                for t in range(KEYS):
                    largest = max(largest, shared[P + r * KEYS + t])
                base = largest
                if largest == _MINUS_INFINITY:
                    base = _ZERO  # no key yet: exp(-inf - 0) is the 0 that exp(-inf - -inf) is not
                shrink = np.float32(math.exp(shared[M + r] - base))
                total = shared[L + r] * shrink
                for t in range(KEYS):
                    p = np.float32(math.exp(shared[P + r * KEYS + t] - base))
                    total += p
                    shared[P + r * KEYS + t] = p
                shared[M + r] = largest
                shared[L + r] = total
                shared[SHRINK + r] = shrink
            cuda.syncthreads()

            for e in range(thread, ROWS * Dv, THREADS):
                r = (e & INDEX) // Dv
                d = (e & INDEX) % Dv
                total = shared[O + (e & INDEX)] * shared[SHRINK + r]
                for t in range(KEYS):
                    total += shared[P + r * KEYS + t] * shared[KV + t * STRIDE + d]
                shared[O + (e & INDEX)] = total
            cuda.syncthreads()

        cuda.syncthreads()  # a part without keys wrote nothing but what stands above the loop
        for e in range(thread, ROWS * Dv, THREADS):
            r = (e & INDEX) // Dv
            total = shared[L + r]
            divisor = _ONE if total == _ZERO else total
            outs[part, b, r // group, g * group + r % group, (e & INDEX) % Dv] = (
                shared[O + (e & INDEX)] / divisor
            )
        for e in range(thread, ROWS, THREADS):
            r = e & INDEX
            lse = _MINUS_INFINITY
            if shared[L + r] != _ZERO:
                lse = shared[M + r] + np.float32(math.log(shared[L + r]))
            lses[part, b, g * group + r % group, r // group] = lse

    return split_kv


def merge_signature(kind: str) -> Any:
    """Return the argument types of the merge."""
    return types.void(
        array_type(types.float32, 5), array_type(types.float32, 4),
        array_type(storage_type(kind), 4), array_type(types.float32, 3),
    )  # fmt: skip


@functools.cache
def build_merge(kind: str) -> Any:
    """Return the compiled kernel of the merge."""
    return kernel(merge_signature(kind))(merge_source(kind))


def merge_source(kind: str) -> Any:
    """Return the kernel that merges the parts: one thread for each number of the output."""
    store = narrow(kind)

    def merge(outs: Any, lses: Any, out: Any, lse: Any) -> None:
        element = cuda.blockIdx.x * MERGE_THREADS + cuda.threadIdx.x
        widths, heads, queries = out.shape[3], out.shape[2], out.shape[1]
        if element >= out.shape[0] * queries * heads * widths:
            return
        d = (element % widths) & INDEX
        h = (element // widths % heads) & INDEX
        i = (element // (widths * heads) % queries) & INDEX
        b = (element // (widths * heads * queries)) & INDEX
        top = _MINUS_INFINITY
        for part in range(outs.shape[0]):
            top = max(top, lses[part, b, h, i])
        base = _ZERO if top == _MINUS_INFINITY else top
        total, value = _ZERO, _ZERO
        for part in range(outs.shape[0]):
            weight = np.float32(math.exp(lses[part, b, h, i] - base))
            total += weight
            value += weight * outs[part, b, i, h, d]
        divisor = _ONE if total == _ZERO else total
        out[b, i, h, d] = store(value / divisor)
        if d == 0:
            lse[b, h, i] = _MINUS_INFINITY if total == _ZERO else base + np.float32(math.log(divisor))

    return merge
