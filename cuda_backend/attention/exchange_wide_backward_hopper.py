"""What the consumers of a wide Hopper backward block give each other, and dQ: P in float32, dS, sums of dQ.

P goes as it lies in registers: thread t of one warpgroup stores what thread t of the other loads, 16 bytes
beside those of its neighbours.  With dropout the sign of a weight says that it is dropped, so that one of
them draws for both; a weight of 0 has either sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.dropout_hopper import build_words
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import copy, registers, turns, wgmma
from cuda_backend.ptx.assembly import types

__all__ = ["DS_TURN", "MEET", "P_TURN", "build_queries", "build_receiver", "build_sender"]

int32, uint64, float32 = types.int32, types.uint64, types.float32

WARPS = 8  # that add to a tile of dQ
# Named barriers: the first consumer gives P, and so has it back when the second gives dS; warps of the second
# wait for each other's dS.  Named, not mbarriers at which one lane of a warp arrives for all: the same order,
# but one that racecheck knows.
P_TURN, DS_TURN, MEET = 1, 2, 3


def build_sender(variant: WideBackwardVariant) -> tuple[Callable[..., None], ...]:
    """Return ``send``, ``mark`` and ``keep``, device functions.

    ``send(s, place)`` stores weights, `place` being the thread's first 16 bytes.  ``mark(s, drop)`` negates
    what is dropped, `drop` being what `build_words` asks for, and the threshold; ``keep(s, factor)`` makes
    them 0, and multiplies others by `factor`.
    """
    steps, draw = variant.block_m // 8, build_words()

    @device_function
    def send(s: Any, place: Any) -> None:
        for i in range(steps):
            copy.store_shared_16(place + 2048 * i, s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3])

    @device_function
    def signed(weight: Any, word: Any, threshold: Any) -> Any:
        return registers.select_float(int32(uint64(word) >= threshold), weight, -weight)

    @device_function
    def mark(s: Any, drop: Any) -> None:
        seed, batch, head, query, key, lane, threshold = drop
        for i in range(steps):
            w0, w1, w2, w3 = draw(seed, batch, head, query + 8 * i, key, lane)
            s[4 * i] = signed(s[4 * i], w0, threshold)
            s[4 * i + 1] = signed(s[4 * i + 1], w1, threshold)
            s[4 * i + 2] = signed(s[4 * i + 2], w2, threshold)
            s[4 * i + 3] = signed(s[4 * i + 3], w3, threshold)

    @device_function
    def keep(s: Any, factor: Any) -> None:
        for i in range(4 * steps):
            s[i] = registers.select_float(int32(s[i] < float32(0.0)), float32(0.0), s[i] * factor)

    return send, mark, keep


def build_receiver(variant: WideBackwardVariant) -> Callable[..., None]:
    """Return ``receive(dp, place, deltas, factor)``, a device function that makes dP into P (dP - delta).

    `place` is where the weights of the thread lie, `deltas` where those of its first column do; with dropout
    dP is multiplied by `factor`, or dropped, before.
    """
    steps, dropout = variant.block_m // 8, variant.dropout

    @device_function
    def receive(dp: Any, place: Any, deltas: Any, factor: Any) -> None:
        weights = cuda.local.array(4, float32)
        pair = cuda.local.array(2, float32)
        for i in range(steps):
            copy.load_shared_16(weights, int32(0), place + 2048 * i)
            copy.load_shared_8(pair, int32(0), deltas + 32 * i)
            for e in range(4):
                at, weight = 4 * i + e, weights[e]
                if dropout:
                    dropped = int32(weight < float32(0.0))
                    kept = registers.select_float(dropped, float32(0.0), dp[at] * factor)
                    dp[at] = registers.select_float(dropped, -weight, weight) * (kept - pair[e % 2])
                else:
                    dp[at] = weight * (dp[at] - pair[e % 2])

    return receive


def build_queries(variant: WideBackwardVariant, consumer: int) -> tuple[Callable[..., None], ...]:
    """Return ``multiply``, ``look``, ``add`` and ``let``, device functions for a consumer's columns of dQ.

    ``multiply(dq, base)`` issues dS K; ``add(dq, sums, line, thread)`` adds the result to the sums of a
    tile, `line`.  With the deterministic option, ``look(words, line, turn)`` waits before that until `turn`
    blocks of keys have added, and ``let(words, line, lane)`` after it lets the next one add; a `line` of -1
    is none.  Products run meanwhile: neither the word's way from the L2 cache nor the fence, which waits
    until all is added there, keeps the tensor cores waiting.  Nobody waits for ever for a turn that is passed
    late: the tile of queries that comes first needs no later turn.
    """
    first, count = variant.dq_shares(consumer)
    k_columns = variant.places.k_tile + first * 128 * variant.block_n
    ds_tile, share_bytes = variant.places.ds_tile, variant.share_bytes
    tile_bytes, deterministic = variant.shares * share_bytes, variant.deterministic
    along, across = wgmma.descriptor_k_major, wgmma.descriptor_mn_major(128 * variant.block_n)
    ds_steps, k_steps = wgmma.k_major_steps(64, 64), [128 * k for k in range(variant.block_n // 16)]
    columns = count * variant.dq_columns
    product = wgmma.product_shared(columns, variant.kind, ds_steps, k_steps, b_turned=True)

    @device_function
    def multiply(dq: Any, base: Any) -> None:
        wgmma.fence()
        product(dq, along(base + ds_tile), across(base + k_columns))
        wgmma.commit()

    @device_function
    def look(words: Any, line: Any, turn: Any) -> None:
        if deterministic:
            turns.wait_for_turn(words + uint64(line) * uint64(4), int32(WARPS * turn))

    @device_function
    def add(dq: Any, sums: Any, line: Any, thread: Any) -> None:
        own = sums + uint64(line) * uint64(tile_bytes) + uint64(first * share_bytes) + uint64(16 * thread)
        for i in range(columns // 8):
            at = 4 * i
            copy.add_global_16(own + uint64(2048 * i), dq[at], dq[at + 1], dq[at + 2], dq[at + 3])

    @device_function
    def let(words: Any, line: Any, lane: Any) -> None:
        if deterministic and line >= 0:
            turns.pass_turn_of_warp(words + uint64(line) * uint64(4), lane)

    return multiply, look, add, let
