"""FlashAttention backward for every CUDA GPU and Numba's simulator: no atomics, no warp operations.

Two kernels recompute P from Q, K and the log-sum-exp, and sum in an order that only the shapes decide, so
gradients repeat bit for bit.  The kernel of the queries owns `Br` rows of dQ, writes D = rowsum(dO ∘ O) and
walks over tiles of keys; the kernel of the keys owns `Bc` rows of dK and dV of one key head and walks over
tiles of queries, for each query head of its group.  Per tile, with a barrier after each line::

    the passing tiles to shared memory
    P and dS, recomputed in registers, to shared memory
    dQ = dQ + dS K,  or  dV = dV + P' dO and dK = dK + dS' Q,  in registers

That is Algorithm 4 of Dao et al. 2022, its two results taken apart.  All is float32 between reading and
writing; P and dS are never rounded.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, kernel, types
from cuda_backend.attention.arguments import array_type, option_types
from cuda_backend.attention.scores_portable import score_gradient
from cuda_backend.attention.tiles_portable import INDEX, accumulation, products, reader, writer
from cuda_backend.attention.user_device import blamed
from cuda_backend.attention.variant_backward import BackwardVariant
from cuda_backend.formats import storage_type, widen
from refimpl.attention.block_mask import DEAD, FULL

__all__ = ["Kernels", "build", "keys_signature", "keys_source", "queries_signature", "queries_source"]

_ZERO = np.float32(0)
_float32 = types.float32


class Kernels(NamedTuple):
    """The kernel of dQ and D, and that of dK and dV, which runs after it."""

    queries: Any
    keys: Any


@functools.cache
def build(variant: BackwardVariant) -> Kernels:
    """Return the compiled kernels of `variant`."""
    with blamed(variant.features.mods):
        return Kernels(
            kernel(queries_signature(variant))(queries_source(variant)),
            kernel(keys_signature(variant))(keys_source(variant)),
        )


def queries_signature(variant: BackwardVariant) -> Any:
    """Return the argument types of `queries_source`; arrays have any strides, absent ones are not read."""
    tensor, statistic, score = (
        array_type(storage_type(variant.kind), 4), array_type(types.float32, 3), array_type(types.float32, 4)
    )  # fmt: skip
    return types.void(
        tensor, tensor, tensor, tensor, statistic, tensor,  # q, k, v, o, lse, do
        tensor, statistic, score,                           # dq, delta, dscores
        *option_types(variant.features),
    )  # fmt: skip


def keys_signature(variant: BackwardVariant) -> Any:
    """Return the argument types of `keys_source`."""
    tensor, statistic = array_type(storage_type(variant.kind), 4), array_type(types.float32, 3)
    return types.void(
        tensor, tensor, tensor, statistic, tensor, statistic,  # q, k, v, lse, do, delta
        tensor, tensor,                                        # dk, dv
        *option_types(variant.features),
    )  # fmt: skip


def queries_source(variant: BackwardVariant) -> Any:
    """Return the kernel of dQ and D as a Python function; the constants of its closure shape the code."""
    D, Dv, Br, Bc = variant.D, variant.Dv, variant.Br, variant.Bc
    ROWS, COLUMNS, THREADS = variant.rows, variant.columns, variant.threads
    QUERIES, KEYS = variant.padded("queries"), variant.padded("keys")
    MR, MC = QUERIES // ROWS, KEYS // COLUMNS
    SCORES, SHARE = MR * MC, MR * variant.channels(D)
    VS, PS = variant.stride(Dv), KEYS | 1
    Q, DO, K, V, P, DS, L, DELTA, _ = variant.offsets
    features = variant.features
    CAUSAL, BOTTOM_RIGHT, BIAS = features.causal != "", features.causal == "bottom_right", features.bias != ""
    MASK_MOD = features.mods.mask is not None
    Q_LENGTHS, K_LENGTHS = features.q_lengths != "", features.k_lengths != ""
    load, gradient = widen(variant.kind), score_gradient(features)
    read_q, read_do = reader(variant, "queries", D), reader(variant, "queries", Dv)
    read_k, read_v = reader(variant, "keys", D), reader(variant, "keys", Dv)
    multiply, multiply_values = products(variant, "queries", D), products(variant, "queries", Dv)
    accumulate, write = accumulation(variant, "queries", D), writer(variant, "queries", D)

    def flash_backward_queries(
        q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dq: Any, delta: Any, dscores: Any,
        mask: Any, bias: Any, slopes: Any, q_lengths: Any, k_lengths: Any, kept: Any, tiles: Any, aux: Any,
        scale: Any, softcap: Any, seed: Any, threshold: Any, kept_scale: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, _float32)
        share = cuda.local.array(SHARE, _float32)
        thread = cuda.threadIdx.x & (THREADS - 1)
        x = thread & (COLUMNS - 1)
        y = thread // COLUMNS
        block = cuda.blockIdx.x & INDEX
        blocks = (q.shape[1] + Br - 1) // Br
        head = block // blocks
        first = Br * ((blocks - 1 - (block - head * blocks)) & INDEX)  # the longest causal rows come first
        b = (head // q.shape[2]) & INDEX
        h = (head - b * q.shape[2]) & INDEX
        g = (h // (q.shape[2] // k.shape[2])) & INDEX

        n_q, n_k = q.shape[1], k.shape[1]
        if Q_LENGTHS:
            n_q = min(n_q, int(q_lengths[b]))
        if K_LENGTHS:
            n_k = min(n_k, int(k_lengths[b]))
        offset = 0
        if BOTTOM_RIGHT:
            offset = n_k - n_q
        q_end = min(n_q, first + Br)  # bounds rows of padding too: they are the next tile's
        end = n_k
        if CAUSAL:
            end = min(end, first + Br + offset)
        if first >= n_q:
            end = 0

        read_q(q, b, first, q_end, h, shared, Q, thread)
        read_do(do, b, first, q_end, h, shared, DO, thread)
        for z in range(SHARE):
            share[z] = _ZERO
        cuda.syncthreads()
        # rowsum(dO ∘ O) is rowsum(P ∘ dP), because O is the dropped output (appendix B.2, observation 2).
        for a in range(MR):
            row = y + a * ROWS
            total = _ZERO
            if first + row < q_end:
                for d in range(x, Dv, COLUMNS):
                    total += shared[DO + row * VS + (d & INDEX)] * load(o[b, first + row, h, d & INDEX])
            shared[P + row * PS + x] = total
        cuda.syncthreads()
        for e in range(thread, QUERIES, THREADS):
            r = e & INDEX
            total = _ZERO
            for t in range(COLUMNS):
                total += shared[P + r * PS + t]
            shared[DELTA + r] = total
            if first + r < q_end:
                delta[b, h, first + r] = total
                shared[L + r] = lse[b, h, first + r]
        cuda.syncthreads()

        for key in range(0, end, Bc):
            start = key & INDEX
            whole = False
            if MASK_MOD:
                state = tiles[b, h, first // Br, start // Bc]
                if state == DEAD:
                    continue
                whole = state == FULL
            k_end = min(n_k, start + Bc)
            read_k(k, b, start, k_end, g, shared, K, thread)
            read_v(v, b, start, k_end, g, shared, V, thread)
            cuda.syncthreads()

            multiply(shared, Q, K, P, y, x)
            multiply_values(shared, DO, V, DS, y, x)
            for e in range(SCORES):  # what follows is long: no array in registers, so it need not unroll
                row = y + (e & INDEX) // MC * ROWS
                column = x + (e & INDEX) % MC * COLUMNS
                i, j, at = first + row, start + column, row * PS + column
                _, ds, dproduct = gradient(
                    shared[P + at], shared[DS + at], shared[L + row], shared[DELTA + row],
                    b, h, i, j, q_end, k_end, offset, mask, bias, slopes, kept, whole, aux,
                    scale, softcap, seed, threshold, kept_scale,
                )  # fmt: skip
                shared[DS + at] = dproduct
                if BIAS and i < q_end and j < k_end:
                    dscores[b, h, i, j] = ds
            cuda.syncthreads()

            accumulate(share, shared, DS, K, y, x)
            cuda.syncthreads()
        write(share, dq, b, first, q.shape[1], h, shared, Q, y, x)

    return flash_backward_queries


def keys_source(variant: BackwardVariant) -> Any:
    """Return the kernel of dK and dV as a Python function; the constants of its closure shape the code."""
    D, Dv, Br, Bc = variant.D, variant.Dv, variant.Br, variant.Bc
    ROWS, COLUMNS, THREADS = variant.rows, variant.columns, variant.threads
    QUERIES, KEYS = variant.padded("queries"), variant.padded("keys")
    MR, MC = KEYS // ROWS, QUERIES // COLUMNS
    SCORES, SHARE, VALUE_SHARE = MR * MC, MR * variant.channels(D), MR * variant.channels(Dv)
    PS = QUERIES | 1
    Q, DO, K, V, P, DS, L, DELTA, _ = variant.offsets
    features = variant.features
    CAUSAL, BOTTOM_RIGHT = features.causal != "", features.causal == "bottom_right"
    MASK_MOD = features.mods.mask is not None
    Q_LENGTHS, K_LENGTHS = features.q_lengths != "", features.k_lengths != ""
    gradient = score_gradient(features)
    read_q, read_do = reader(variant, "queries", D), reader(variant, "queries", Dv)
    read_k, read_v = reader(variant, "keys", D), reader(variant, "keys", Dv)
    multiply, multiply_values = products(variant, "keys", D), products(variant, "keys", Dv)
    accumulate, accumulate_values = accumulation(variant, "keys", D), accumulation(variant, "keys", Dv)
    write, write_values = writer(variant, "keys", D), writer(variant, "keys", Dv)

    def flash_backward_keys(
        q: Any, k: Any, v: Any, lse: Any, do: Any, delta: Any, dk: Any, dv: Any,
        mask: Any, bias: Any, slopes: Any, q_lengths: Any, k_lengths: Any, kept: Any, tiles: Any, aux: Any,
        scale: Any, softcap: Any, seed: Any, threshold: Any, kept_scale: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, _float32)
        share = cuda.local.array(SHARE, _float32)
        value_share = cuda.local.array(VALUE_SHARE, _float32)
        thread = cuda.threadIdx.x & (THREADS - 1)
        x = thread & (COLUMNS - 1)
        y = thread // COLUMNS
        block = cuda.blockIdx.x & INDEX
        blocks = (k.shape[1] + Bc - 1) // Bc
        head = block // blocks
        first = Bc * ((block - head * blocks) & INDEX)
        b = (head // k.shape[2]) & INDEX
        g = (head - b * k.shape[2]) & INDEX
        group = q.shape[2] // k.shape[2]

        n_q, n_k = q.shape[1], k.shape[1]
        if Q_LENGTHS:
            n_q = min(n_q, int(q_lengths[b]))
        if K_LENGTHS:
            n_k = min(n_k, int(k_lengths[b]))
        offset = 0
        if BOTTOM_RIGHT:
            offset = n_k - n_q
        k_end = min(n_k, first + Bc)
        begin, end = 0, n_q
        if CAUSAL:
            begin = max(0, first - offset) // Br * Br
        if first >= n_k:
            end = 0

        read_k(k, b, first, k_end, g, shared, K, thread)
        read_v(v, b, first, k_end, g, shared, V, thread)
        for z in range(SHARE):
            share[z] = _ZERO
        for z in range(VALUE_SHARE):
            value_share[z] = _ZERO
        cuda.syncthreads()  # where no query sees this tile, dK is written to where K was read to

        for member in range(group):  # the query heads that share this key head: summed here, in order
            h = (g * group + member) & INDEX
            for query in range(begin, end, Br):
                start = query & INDEX
                whole = False
                if MASK_MOD:
                    state = tiles[b, h, start // Br, first // Bc]
                    if state == DEAD:
                        continue
                    whole = state == FULL
                q_end = min(n_q, start + Br)
                read_q(q, b, start, q_end, h, shared, Q, thread)
                read_do(do, b, start, q_end, h, shared, DO, thread)
                for e in range(thread, QUERIES, THREADS):
                    r = e & INDEX
                    if start + r < q_end:
                        shared[L + r] = lse[b, h, start + r]
                        shared[DELTA + r] = delta[b, h, start + r]
                cuda.syncthreads()

                multiply(shared, K, Q, P, y, x)
                multiply_values(shared, V, DO, DS, y, x)
                for e in range(SCORES):
                    row = y + (e & INDEX) // MC * ROWS
                    column = x + (e & INDEX) % MC * COLUMNS
                    i, j, at = start + column, first + row, row * PS + column
                    p, _, dproduct = gradient(
                        shared[P + at], shared[DS + at], shared[L + column], shared[DELTA + column],
                        b, h, i, j, q_end, k_end, offset, mask, bias, slopes, kept, whole, aux,
                        scale, softcap, seed, threshold, kept_scale,
                    )  # fmt: skip
                    shared[P + at] = p
                    shared[DS + at] = dproduct
                cuda.syncthreads()

                accumulate_values(value_share, shared, P, DO, y, x)
                accumulate(share, shared, DS, Q, y, x)
                cuda.syncthreads()
        write(share, dk, b, first, k.shape[1], g, shared, K, y, x)
        write_values(value_share, dv, b, first, k.shape[1], g, shared, V, y, x)

    return flash_backward_keys
