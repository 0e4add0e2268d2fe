"""How a warp asks for the keys and values of its turns: rows of a cache that lies whole, or in pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import device_function
from cuda_backend.attention.decode_variant_ampere import KEYS, DecodeVariant
from cuda_backend.ptx import copy, copy_async, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_loader"]

int32, uint32, uint64 = types.int32, types.uint32, types.uint64


def build_loader(variant: DecodeVariant) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return ``look_up(numbers, table, step, turn, page, pages)`` and ``ask(stage, lane, turn, ...)``.

    ``look_up`` loads the numbers of the pages of a turn, if there are pages: each 16 keys lie in one.
    ``ask`` starts the copies of a turn to `stage` in shared memory; behind the last of `keys` there are zeros.
    """
    D, DV, PAGED, TURN = variant.D, variant.Dv, variant.paged, variant.keys
    PITCH_K, PITCH_V = variant.pitches
    TILES, V_AT = TURN // KEYS, TURN * PITCH_K
    place_in_k, place_in_v = _place(D // 8), _place(DV // 8)
    copy_16 = copy_async.copy_16(variant.ahead)

    @device_function
    def look_up(numbers: Any, table: Any, step: Any, turn: Any, page: Any, pages: Any) -> None:
        if PAGED:
            for i in range(TILES):
                wanted = registers.quotient(int32(turn * TURN + KEYS * i), page)
                index = int32(min(wanted, pages - 1))  # a turn behind the last is never asked for
                numbers[i] = copy.load_word(table + uint64(index) * uint64(step))

    @device_function
    def ask(stage: Any, lane: Any, turn: Any, keys: Any, numbers: Any, k: Any, v: Any, steps: Any) -> None:
        k_key, v_key, k_page, v_page, page = steps
        for tile in range(TILES):
            first = int32(turn * TURN + KEYS * tile)
            inside, from_k, from_v = first, k, v
            if PAGED:
                number = uint64(max(int32(0), numbers[tile]))  # -1 where no key lies
                inside = int32(first - registers.quotient(first, page) * page)
                from_k += number * k_page
                from_v += number * v_page
            from_k += uint64(inside) * k_key
            from_v += uint64(inside) * v_key
            there = int32(keys - first)
            for i in range(D // 16):
                row, column = place_in_k(lane, i)
                size = registers.select_int(int32(row < there), int32(16), int32(0))
                target = stage + uint32((KEYS * tile + row) * PITCH_K + column)
                copy_16(target, from_k + uint64(row) * k_key + uint64(column), size)
            for i in range(DV // 16):
                row, column = place_in_v(lane, i)
                size = registers.select_int(int32(row < there), int32(16), int32(0))
                target = stage + uint32(V_AT + (KEYS * tile + row) * PITCH_V + column)
                copy_16(target, from_v + uint64(row) * v_key + uint64(column), size)

    return look_up, ask


def _place(chunks: int) -> Callable[..., Any]:
    """Return the row and the byte in it of copy `i` of a lane, rows having `chunks` of 16 bytes."""
    if 32 % chunks == 0:
        rows, mask, shift = 32 // chunks, chunks - 1, chunks.bit_length() - 1

        @device_function
        def place(lane: Any, i: Any) -> Any:
            return int32((lane >> shift) + rows * i), int32(16 * (lane & mask))

        return place

    @device_function
    def place_by_division(lane: Any, i: Any) -> Any:
        number = int32(lane + 32 * i)
        row = registers.quotient(number, int32(chunks))
        return row, int32(16 * (number - row * chunks))

    return place_by_division
