"""FlashAttention forward for every CUDA GPU and Numba's simulator: shared-memory tiles, no warp operations.

A block owns `Br` queries of one head and walks over tiles of `Bc` keys.  Per tile, with a barrier after each
line::

    K to shared memory
    S = Q K', summed in registers, then in shared memory; each thread's maxima of its rows beside it
    V in the place of K;  m = new maxima;  P = exp(S - m) in the place of S;  O = exp(m_old - m) O
    O = O + P V in registers

That is Algorithm 1 of Dao et al. 2022 with the loops exchanged and the division left to the end, as in Dao
2023.  Everything is float32 between reading and writing; P is never rounded.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, kernel, types
from cuda_backend.attention.arguments import array_type, option_types
from cuda_backend.attention.tiles_portable import INDEX
from cuda_backend.attention.user_device import blamed, mask_on_device, score_on_device
from cuda_backend.attention.variant_portable import Variant
from cuda_backend.formats import narrow, storage_type, widen
from cuda_backend.random import dropout_keeps
from refimpl.attention.block_mask import DEAD, FULL

__all__ = ["build", "signature"]

_MINUS_INFINITY, _ZERO, _ONE = np.float32(-np.inf), np.float32(0), np.float32(1)
_float32 = types.float32


def signature(variant: Variant) -> Any:
    """Return the argument types of the kernel; arrays may have any strides, absent ones are never read."""
    return types.void(
        *[array_type(storage_type(variant.kind), 4)] * 4,  # q, k, v, out
        array_type(types.float32, 3),  # lse
        *option_types(variant.features),
    )


@functools.cache
def build(variant: Variant) -> Any:
    """Return the compiled kernel of `variant`."""
    with blamed(variant.features.mods):
        return kernel(signature(variant))(source(variant))


def source(variant: Variant) -> Any:
    """Return the kernel of `variant` as a Python function; the constants of its closure shape the code."""
    D, Dv, Br, Bc = variant.D, variant.Dv, variant.Br, variant.Bc
    ROWS, COLUMNS, THREADS = variant.rows, variant.columns, variant.threads
    MR, MC, MV = variant.own_rows, variant.own_keys, variant.own_channels
    QUERIES, KEYS, CHANNELS = MR * ROWS, MC * COLUMNS, MV * COLUMNS
    SCORES, OUTPUTS = MR * MC, MR * MV
    QK, VS, PS = variant.qk_stride, variant.v_stride, variant.p_stride
    KV, P, MAXIMA, _ = variant.offsets
    features = variant.features
    CAUSAL, BOTTOM_RIGHT = features.causal != "", features.causal == "bottom_right"
    MASK, BIAS, ALIBI, SOFTCAP, LSE = (
        features.mask, features.bias != "", features.alibi, features.softcap, features.lse
    )  # fmt: skip
    Q_LENGTHS, K_LENGTHS = features.q_lengths != "", features.k_lengths != ""
    PHILOX, KEPT = features.dropout == "philox", features.dropout == "mask"
    MASK_MOD, SCORE_MOD = features.mods.mask is not None, features.mods.score is not None
    allows, modify = mask_on_device(features.mods.mask), score_on_device(features.mods.score)
    load, store, load_bias = widen(variant.kind), narrow(variant.kind), widen(features.bias or "float32")

    def flash_forward(
        q: Any, k: Any, v: Any, out: Any, lse: Any, mask: Any, bias: Any, slopes: Any,
        q_lengths: Any, k_lengths: Any, kept: Any, tiles: Any, aux: Any,
        scale: Any, softcap: Any, seed: Any, threshold: Any, kept_scale: Any,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, _float32)
        s = cuda.local.array(SCORES, _float32)
        o = cuda.local.array(OUTPUTS, _float32)
        m = cuda.local.array(MR, _float32)
        l = cuda.local.array(MR, _float32)  # noqa: E741 (the field's name)

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
        end = n_k
        if CAUSAL:
            end = min(end, first + Br + offset)
        if first >= n_q:
            end = 0

        for e in range(thread, QUERIES * D, THREADS):
            r = (e & INDEX) // D
            d = (e & INDEX) % D
            value = _ZERO
            if first + r < n_q:
                value = load(q[b, first + r, h, d])
            shared[r * QK + d] = value
        for a in range(MR):
            m[a] = _MINUS_INFINITY
            l[a] = _ZERO
            for n in range(MV):
                o[a * MV + n] = _ZERO

        for key in range(0, end, Bc):
            start = key & INDEX
            if MASK_MOD and tiles[b, h, first // Br, start // Bc] == DEAD:
                continue
            for e in range(thread, KEYS * D, THREADS):
                r = (e & INDEX) // D
                d = (e & INDEX) % D
                value = _ZERO
                if start + r < n_k:
                    value = load(k[b, start + r, g, d])
                shared[KV + r * QK + d] = value
            cuda.syncthreads()

            for z in range(SCORES):
                s[z] = _ZERO
            for e in range(D):
                d = e & INDEX
                for a in range(MR):
                    left = shared[(y + a * ROWS) * QK + d]
                    for c in range(MC):
                        s[a * MC + c] += left * shared[KV + (x + c * COLUMNS) * QK + d]
            for a in range(MR):
                for c in range(MC):
                    shared[P + (y + a * ROWS) * PS + x + c * COLUMNS] = s[a * MC + c]
            for e in range(SCORES):  # what follows is long: no array in registers, so it need not unroll
                row = y + (e & INDEX) // MC * ROWS
                column = x + (e & INDEX) % MC * COLUMNS
                i, j = first + row, start + column
                # Masks select, they never multiply: 0 * inf would be NaN.
                allowed = column < Bc and j < n_k and i < n_q
                if CAUSAL:
                    allowed = allowed and j <= i + offset
                if MASK:
                    allowed = allowed and mask[b, h, i, j]
                if MASK_MOD and allowed and tiles[b, h, first // Br, start // Bc] != FULL:
                    allowed = allows(b, h, i, j, aux)
                score = _MINUS_INFINITY
                if allowed:
                    score = shared[P + row * PS + column] * scale
                    if SOFTCAP:
                        score = softcap * np.float32(math.tanh(score / softcap))
                    if BIAS:
                        score += load_bias(bias[b, h, i, j])
                    if ALIBI:
                        score -= slopes[h] * np.float32(abs(i + offset - j))
                    if SCORE_MOD:
                        score = modify(score, b, h, i, j, aux)
                shared[P + row * PS + column] = score
            for a in range(MR):
                row = y + a * ROWS
                largest = _MINUS_INFINITY
                for c in range(MC):
                    if shared[P + row * PS + x + c * COLUMNS] > largest:
                        largest = shared[P + row * PS + x + c * COLUMNS]
                shared[MAXIMA + row * COLUMNS + x] = largest
            cuda.syncthreads()

            for e in range(thread, KEYS * CHANNELS, THREADS):
                r = (e & INDEX) // CHANNELS
                d = (e & INDEX) % CHANNELS
                value = _ZERO
                if start + r < n_k and d < Dv:
                    value = load(v[b, start + r, g, d])
                shared[KV + r * VS + d] = value
            for a in range(MR):
                row = y + a * ROWS
                largest = m[a]
                for t in range(COLUMNS):
                    if shared[MAXIMA + row * COLUMNS + t] > largest:
                        largest = shared[MAXIMA + row * COLUMNS + t]
                base = largest
                if largest == _MINUS_INFINITY:
                    base = _ZERO  # no key yet: exp(-inf - 0) is the 0 that exp(-inf - -inf) is not
                shrink = np.float32(math.exp(m[a] - base))
                m[a] = largest
                total = l[a] * shrink
                for c in range(MC):
                    p = np.float32(math.exp(shared[P + row * PS + x + c * COLUMNS] - base))
                    total += p
                    shared[P + row * PS + x + c * COLUMNS] = p
                l[a] = total
                for n in range(MV):
                    o[a * MV + n] *= shrink
            if PHILOX or KEPT:  # after the sums: the log-sum-exp is over the weights before dropout
                for e in range(SCORES):
                    row = y + (e & INDEX) // MC * ROWS
                    column = x + (e & INDEX) % MC * COLUMNS
                    i, j = first + row, start + column
                    keep = i < n_q and j < n_k
                    if PHILOX:
                        keep = keep and dropout_keeps(seed, threshold, b, h, i, j)
                    if KEPT:
                        keep = keep and kept[b, h, i, j]
                    if keep:
                        shared[P + row * PS + column] *= kept_scale
                    else:
                        shared[P + row * PS + column] = _ZERO
            cuda.syncthreads()

            for e in range(KEYS):
                t = e & INDEX
                for a in range(MR):
                    weight = shared[P + (y + a * ROWS) * PS + t]
                    for n in range(MV):
                        o[a * MV + n] += weight * shared[KV + t * VS + x + n * COLUMNS]
            cuda.syncthreads()

        # Each thread summed its own columns; the place of the maxima holds the parts of the sums, that of Q,
        # K and P the output, from where it is written row by row.
        for a in range(MR):
            shared[MAXIMA + (y + a * ROWS) * COLUMNS + x] = l[a]
        cuda.syncthreads()
        for a in range(MR):
            row = y + a * ROWS
            total = _ZERO
            for t in range(COLUMNS):
                total += shared[MAXIMA + row * COLUMNS + t]
            empty = total == _ZERO
            divisor = _ONE if empty else total
            for n in range(MV):
                shared[row * VS + x + n * COLUMNS] = o[a * MV + n] / divisor
            if LSE and x == 0 and row < Br and first + row < q.shape[1]:
                lse[b, h, first + row] = _MINUS_INFINITY if empty else m[a] + np.float32(math.log(divisor))
        cuda.syncthreads()
        for e in range(thread, Br * Dv, THREADS):
            r = (e & INDEX) // Dv
            d = (e & INDEX) % Dv
            if first + r < q.shape[1]:
                out[b, first + r, h, d] = store(shared[r * VS + d])

    return flash_forward
