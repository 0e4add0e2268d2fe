"""What a warp does with the keys of one turn: scores, their softmax, and what they add to the outputs.

Lane l, g = l // 4 and t = l % 4, holds of the scores of 16 keys and 8 queries those of keys g and g + 8 with
queries 2t and 2t + 1, and of the outputs those of columns g and g + 8: what belongs to a query is in the same
lanes for both, so maxima and factors go from one to the other without an exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.decode_variant_ampere import KEYS, DecodeVariant
from cuda_backend.ptx import matrix_load, mma, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_step"]

int32, uint32, float32 = types.int32, types.uint32, types.float32

MINUS_INFINITY = -math.inf


def build_step(variant: DecodeVariant) -> Callable[..., None]:
    """Return ``step(outputs, largest, totals, queries, limits, stage, lane, start, lowest, factor)``.

    It takes the keys of the turn that lies at `stage` and begins at key `start`.  ``outputs`` are those of
    the warp so far, ``largest`` the maxima of its scores and ``totals`` the lane's share of their sums, all
    for queries 2t and 2t + 1 of each eight; ``queries`` are fragments of Q'.  A query sees the keys below its
    limit, all see those below `lowest`.
    """
    D, DV, COLUMNS = variant.D, variant.Dv, variant.rows // 8
    PITCH_K, PITCH_V = variant.pitches
    TURN, TILES, V_AT = variant.keys, variant.keys // KEYS, variant.keys * PITCH_K
    multiply, pack = mma.product(variant.kind), registers.pack_pair(variant.kind)
    SCORES, ROWS_OF_LANE = 4 * COLUMNS * TILES, 2 * COLUMNS

    @device_function
    def products_of_keys(scores: Any, queries: Any, stage: Any, lane: Any) -> None:
        blocks = cuda.local.array(4, uint32)
        # Blocks one to four: keys 0 to 7 and 8 to 15 of the first eight numbers, then of the next eight.
        row = stage + uint32((lane & 15) * PITCH_K + 16 * (lane >> 4))
        for i in range(SCORES):
            scores[i] = float32(0.0)
        for tile in range(TILES):
            for s in range(D // 16):
                matrix_load.load_blocks(blocks, int32(0), row + uint32(KEYS * PITCH_K * tile + 32 * s))
                for c in range(COLUMNS):
                    at = 2 * (COLUMNS * s + c)
                    multiply(
                        scores, int32(4 * (COLUMNS * tile + c)),
                        blocks[0], blocks[1], blocks[2], blocks[3], queries[at], queries[at + 1],
                    )  # fmt: skip

    @device_function
    def softmax(
        scores: Any, factors: Any, largest: Any, totals: Any, limits: Any, key: Any, masked: Any, scale: Any
    ) -> None:
        """Turn scores into weights, of which `key` is the lane's first; `factors` are for what was before."""
        for i in range(SCORES):
            scores[i] *= scale
        if masked:
            for tile in range(TILES):
                for c in range(COLUMNS):
                    for i in range(4):
                        seen = int32(key + KEYS * tile + 8 * (i >> 1)) < limits[2 * c + (i & 1)]
                        at = 4 * (COLUMNS * tile + c) + i
                        scores[at] = registers.select_float(int32(seen), scores[at], float32(MINUS_INFINITY))
        for r in range(ROWS_OF_LANE):
            top = largest[r]
            for tile in range(TILES):
                at = 4 * (COLUMNS * tile + (r >> 1)) + (r & 1)
                top = registers.maximum(top, registers.maximum(scores[at], scores[at + 2]))
            for i in range(3):
                top = registers.maximum(top, registers.exchange_float(top, int32(4 << i)))
            # No key so far: exp2(-inf - 0) is the 0 that exp2(-inf + inf) is not.
            base = registers.select_float(int32(top == float32(MINUS_INFINITY)), float32(0.0), top)
            factors[r] = registers.exp2(largest[r] - base)
            largest[r] = top
            total = totals[r] * factors[r]
            for tile in range(TILES):
                for half in range(2):
                    at = 4 * (COLUMNS * tile + (r >> 1)) + (r & 1) + 2 * half
                    scores[at] = registers.exp2(scores[at] - base)
                    total += scores[at]
            totals[r] = total

    @device_function
    def products_of_values(outputs: Any, scores: Any, stage: Any, lane: Any) -> None:
        blocks = cuda.local.array(4, uint32)
        weights = cuda.local.array(ROWS_OF_LANE, uint32)
        # Blocks one and two: keys 0 to 7 of columns 0 to 7 and 8 to 15, turned; then keys 8 to 15.
        key = (lane & 7) + 8 * (lane >> 4)
        row = stage + uint32(V_AT + key * PITCH_V + 16 * ((lane >> 3) & 1))
        for tile in range(TILES):
            for c in range(COLUMNS):
                at = 4 * (COLUMNS * tile + c)
                for half in range(2):
                    word = pack(scores[at + 2 * half], scores[at + 2 * half + 1])
                    weights[2 * c + half] = matrix_load.turn_block(word)
            for s in range(DV // 16):
                matrix_load.load_blocks_turned(blocks, int32(0), row + uint32(KEYS * PITCH_V * tile + 32 * s))
                for c in range(COLUMNS):
                    multiply(
                        outputs, int32(4 * (COLUMNS * s + c)),
                        blocks[0], blocks[1], blocks[2], blocks[3], weights[2 * c], weights[2 * c + 1],
                    )  # fmt: skip

    @device_function
    def step(
        outputs: Any, largest: Any, totals: Any, queries: Any, limits: Any,
        stage: Any, lane: Any, start: Any, lowest: Any, scale: Any,
    ) -> None:  # fmt: skip
        scores = cuda.local.array(SCORES, float32)
        factors = cuda.local.array(ROWS_OF_LANE, float32)
        products_of_keys(scores, queries, stage, lane)
        masked = start + TURN > lowest
        softmax(scores, factors, largest, totals, limits, int32(start + (lane >> 2)), masked, scale)
        for s in range(DV // 16):
            for c in range(COLUMNS):
                for i in range(4):
                    outputs[4 * (COLUMNS * s + c) + i] *= factors[2 * c + (i & 1)]
        products_of_values(outputs, scores, stage, lane)

    return step
