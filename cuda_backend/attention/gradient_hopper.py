"""What a consumer thread of the backward kernel does to its registers, and how they leave it.

Scores are turned: rows are keys, columns queries.  Accumulator 4 i + e of a thread is column 8 i + 2 (lane %
4) + e % 2 of its first row (e < 2) or of the row eight below; see `cuda_backend.ptx.wgmma`.  What holds for a
query (log-sum-exp, rowsum(dO O)) is read from shared memory, where all lanes of a column find it at once.

No branch depends on the lane: what only some lanes do is chosen by operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.dropout_hopper import build_words
from cuda_backend.attention.variant_backward_hopper import BackwardVariant
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import copy, matrix_store, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_gradient", "build_stores"]

int32, float32, uint64 = types.int32, types.float32, types.uint64

NO_WEIGHT = float("-inf")


def build_gradient(variant: BackwardVariant | WideBackwardVariant) -> tuple[Callable[..., Any], ...]:
    """Return ``mask``, ``weights``, ``gradient`` and ``pack``, device functions.

    ``mask(s, first_low, first_high)`` makes scores -inf before a thread's own column ``first``, in its two
    rows.  ``weights(s, scale, shifts)`` turns scores into P = exp2(s scale + shift), ``gradient(dp, s,
    deltas, drop)`` dP into dS = P (dP - delta), with dropout dP and then P into what is kept of them;
    `shifts` and `deltas` are where those of the thread's first column lie, `drop` says what `build_words`
    asks for, the threshold and the factor of what is kept.  ``pack(words, s)`` rounds.
    """
    dropout, draw = variant.dropout, build_words()
    count = variant.block_m // 2
    pack_pair = registers.pack_pair(variant.kind)

    @device_function
    def mask(s: Any, first_low: Any, first_high: Any) -> None:
        for i in range(count // 4):
            for e in range(2):
                low, high = int32(8 * i + e < first_low), int32(8 * i + e < first_high)
                s[4 * i + e] = registers.select_float(low, float32(NO_WEIGHT), s[4 * i + e])
                s[4 * i + 2 + e] = registers.select_float(high, float32(NO_WEIGHT), s[4 * i + 2 + e])

    @device_function
    def weights(s: Any, scale: Any, shifts: Any) -> None:
        pair = cuda.local.array(2, float32)
        for i in range(count // 4):
            copy.load_shared_8(pair, int32(0), shifts + 32 * i)
            for e in range(4):
                x = registers.fused_multiply_add(s[4 * i + e], scale, pair[e % 2])
                s[4 * i + e] = registers.exp2(x)

    @device_function
    def drop_one(dp: Any, s: Any, at: Any, delta: Any, word: Any, threshold: Any, factor: Any) -> None:
        kept = registers.select_float(int32(uint64(word) >= threshold), factor, float32(0.0))
        weight = s[at]
        dp[at] = weight * (dp[at] * kept - delta)
        s[at] = weight * kept

    @device_function
    def gradient(dp: Any, s: Any, deltas: Any, drop: Any) -> None:
        pair = cuda.local.array(2, float32)
        for i in range(count // 4):
            copy.load_shared_8(pair, int32(0), deltas + 32 * i)
            if dropout:
                seed, batch, head, query, key, lane, threshold, factor = drop
                w0, w1, w2, w3 = draw(seed, batch, head, query + 8 * i, key, lane)
                drop_one(dp, s, 4 * i, pair[0], w0, threshold, factor)
                drop_one(dp, s, 4 * i + 1, pair[1], w1, threshold, factor)
                drop_one(dp, s, 4 * i + 2, pair[0], w2, threshold, factor)
                drop_one(dp, s, 4 * i + 3, pair[1], w3, threshold, factor)
            else:
                for e in range(4):
                    dp[4 * i + e] = s[4 * i + e] * (dp[4 * i + e] - pair[e % 2])

    @device_function
    def pack(words: Any, s: Any) -> None:
        for i in range(count // 2):
            words[i] = pack_pair(s[2 * i], s[2 * i + 1])

    return mask, weights, gradient, pack


def build_stores(variant: BackwardVariant | WideBackwardVariant) -> tuple[Callable[..., Any], ...]:
    """Return ``store_ds``, ``store_dq`` and ``store_row``, device functions.

    ``store_ds(ds, place)`` writes packed dS to shared memory, a row for each query: `place` is where the
    lane's row of the first two blocks begins.  ``store_dq(dq, place)`` writes the thread's share of dQ as it
    lies in registers, 16 bytes at a time beside those of its neighbours.  ``store_row(x, first, factor,
    address, quad_lane, columns, valid)`` writes one row (``first`` 0 or 2) times ``factor`` to global
    memory: four lanes transpose their words among themselves, so that each stores 16 bytes.
    """
    steps, shares, groups = variant.block_m // 16, variant.dq_columns // 8, variant.d // 32
    pack_pair = registers.pack_pair(variant.kind)

    @device_function
    def store_ds(ds: Any, place: Any) -> None:
        for i in range(steps):
            at = 4 * i
            matrix_store.store_turned(place + 2048 * i, ds[at], ds[at + 1], ds[at + 2], ds[at + 3])

    @device_function
    def store_dq(dq: Any, place: Any) -> None:
        for i in range(shares):
            at = 4 * i
            copy.store_shared_16(place + 2048 * i, dq[at], dq[at + 1], dq[at + 2], dq[at + 3])

    @device_function
    def store_row(
        x: Any, first: Any, factor: Any, address: Any, quad_lane: Any, columns: Any, valid: Any
    ) -> None:
        odd, upper = int32(quad_lane & 1), int32(quad_lane & 2)
        for g in range(groups):
            at = 16 * g + first
            w0 = pack_pair(x[at] * factor, x[at + 1] * factor)
            w1 = pack_pair(x[at + 4] * factor, x[at + 5] * factor)
            w2 = pack_pair(x[at + 8] * factor, x[at + 9] * factor)
            w3 = pack_pair(x[at + 12] * factor, x[at + 13] * factor)
            y = registers.exchange_word(registers.select_word(odd, w0, w1), 1)
            z = registers.exchange_word(registers.select_word(odd, w2, w3), 1)
            w0, w1 = registers.select_word(odd, y, w0), registers.select_word(odd, w1, y)
            w2, w3 = registers.select_word(odd, z, w2), registers.select_word(odd, w3, z)
            y = registers.exchange_word(registers.select_word(upper, w0, w2), 2)
            z = registers.exchange_word(registers.select_word(upper, w1, w3), 2)
            w0, w2 = registers.select_word(upper, y, w0), registers.select_word(upper, w2, y)
            w1, w3 = registers.select_word(upper, z, w1), registers.select_word(upper, w3, z)
            column = 32 * g + 8 * quad_lane
            stored = int32(valid & int32(column < columns))
            copy.store_global_16_where(stored, address + uint64(2 * column), w0, w1, w2, w3)

    return store_ds, store_dq, store_row
