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


def build_loader(
    variant: DecodeVariant,
) -> tuple[Callable[..., None], Callable[..., Any], Callable[..., None]]:
    """Return ``ask(stage, lane, turn, asked, keys, number, k, v, steps)``, ``look_up`` and ``hint``.

    ``ask`` starts the copies of a turn to `stage` in shared memory; zeros follow the last of `keys`.  Each 16
    keys lie in one page: lanes hold the numbers of the pages of a warp's next 32 times 16 keys, which
    ``look_up(turn, lane, ...)`` loads from turn `turn` on, and `asked` turns of the warp came before.
    ``hint(lane, turn, end, keys, k, v, steps)`` asks the L2 cache for the first turns of a warp, of a
    cache that lies whole, D and Dv being multiples of 64: it reads nothing, so earlier launches may still
    write there.
    """
    D, DV, PAGED, TURN, WARPS = variant.D, variant.Dv, variant.paged, variant.keys, variant.warps
    HINTED = variant.hinted
    fetched_of_k, fetched_of_v = _place(max(1, D // 32)), _place(max(1, DV // 32))  # 64 bytes a lane
    PITCH_K, PITCH_V = variant.pitches
    TILES, V_AT = TURN // KEYS, TURN * PITCH_K
    place_in_k, place_in_v = _place(D // 8), _place(DV // 8)
    copy_16 = copy_async.copy_16(variant.ahead)

    @device_function
    def look_up(turn: Any, lane: Any, table: Any, step: Any, page: Any, pages: Any) -> Any:
        if PAGED:
            own = int32(turn + WARPS * (lane // TILES))
            wanted = registers.quotient(int32(own * TURN + KEYS * (lane % TILES)), page)
            index = uint64(min(wanted, pages - 1))  # what lies behind the last page is never asked for
            return copy.load_word(table + index * uint64(step))
        return int32(0)

    @device_function
    def ask(
        stage: Any, lane: Any, turn: Any, asked: Any, keys: Any, number: Any, k: Any, v: Any, steps: Any
    ) -> None:
        k_key, v_key, k_page, v_page, page = steps
        for tile in range(TILES):
            first = int32(turn * TURN + KEYS * tile)
            inside, from_k, from_v = first, k, v
            if PAGED:
                found = int32(registers.from_lane(uint32(number), int32((asked * TILES + tile) & 31)))
                lies = uint64(max(int32(0), found))  # -1 where no key does
                inside = int32(first - registers.quotient(first, page) * page)
                from_k += lies * k_page
                from_v += lies * v_page
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

    @device_function
    def hint(lane: Any, turn: Any, end: Any, keys: Any, k: Any, v: Any, steps: Any) -> None:
        k_key, v_key = steps[0], steps[1]
        for i in range(HINTED):
            own = int32(turn + WARPS * i)
            for tile in range(TILES):
                first = int32(own * TURN + KEYS * tile)
                for n in range(D // 64):
                    row, column = fetched_of_k(lane, n)
                    if own < end and first + row < keys:
                        copy.prefetch(k + uint64(first + row) * k_key + uint64(4 * column))
                for n in range(DV // 64):
                    row, column = fetched_of_v(lane, n)
                    if own < end and first + row < keys:
                        copy.prefetch(v + uint64(first + row) * v_key + uint64(4 * column))

    return ask, look_up, hint


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
