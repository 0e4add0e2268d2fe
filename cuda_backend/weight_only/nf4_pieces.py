"""What the two Hopper kernels for NF4 have in common: arguments, an even division of work, tables of levels.

A block works on whole tiles of 16 output features that lie one after the other in memory, or on groups of
such tiles.  Its warps divide the units of those tiles evenly and in order, so that nobody waits for anybody
before the end: a warp keeps the sums of a tile in registers until it is through with its part of it, and puts
them into shared memory.  Behind one barrier the parts are added, in the order of input features.

Levels are looked up in shared memory, the two of a byte of codes at once.  Each bank has the table to itself,
so 32 lanes look up 32 bytes in a cycle, whichever they are: 256 rows of 32 equal words, 256 bytes apart, so
that byte 0 of an address is the lane's bank and byte 1 is the byte of codes.

Sources: Dettmers et al. 2023, arXiv:2305.14314, eq. 5 and 6; PTX ISA 8.7, "prmt", "griddepcontrol".
"""

from __future__ import annotations

from typing import Any

from cuda_backend._numba import cuda, device_function, types
from cuda_backend.weight_only import machine

__all__ = ["LEVELS_AT", "RESIDENT_BYTES", "SIGNATURE", "filled", "level_of", "share", "widened"]

LEVELS_AT = 1 << 16  # where the levels of absmax codes lie, behind the pairs of levels
RESIDENT_BYTES = LEVELS_AT + 1024  # of both tables

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    uint64,  # codes, in the order of `cuda_backend.weight_only.pack`
    uint64,  # codes of absmax, words of four [tile, chunk, 16]
    *[uint64] * 2,  # scales of the absmax, and their one offset
    *[uint64] * 2,  # pairs of levels by byte, levels of absmax codes
    *[uint64] * 3,  # x; bias, or 0; out [M, N]
    *[int32] * 4,  # M, N, chunks of a row, tiles
    int32,  # bytes from a token of x to the next
    int32,  # parts of tiles that a warp may have
    int32,  # binary logarithm of the absmax that share a scale
)


@device_function
def share(things: Any, units: Any, warps: Any, warp: Any) -> Any:
    """Return what is this block's, and what of it this warp's.

    `things` are tiles or groups of tiles, of so many `units` each: the first thing and the count of this
    block; units of a warp; the warp's first unit, and that behind its last.
    """
    blocks, block = int32(cuda.gridDim.x), int32(cuda.blockIdx.x)
    each = machine.quotient(things, blocks)
    rest = int32(things - each * blocks)
    first = int32(block * each + min(block, rest))
    count = int32(each + (int32(1) if block < rest else int32(0)))
    all_ = int32(count * units)
    per = int32((all_ + (warps - 1)) // warps)
    begin = int32(min(warp * per, all_))
    return first, count, per, begin, int32(min(begin + per, all_))


@device_function
def widened(base: Any, bank: Any, word: Any, half: Any) -> Any:
    """Return the levels of the first or the last four of eight codes as two pairs."""
    first = machine.look_up(base, bank, word, uint32(0x1140 + 0x20 * half))
    second = machine.look_up(base, bank, word, uint32(0x1150 + 0x20 * half))
    return first, second


@device_function
def level_of(base: Any, codes: Any, shift: Any) -> Any:
    """Return the level of one of four codes of absmax."""
    code = (uint32(codes) >> uint32(shift)) & uint32(0xFF)
    return machine.load_shared_float(uint32(base + LEVELS_AT) + (code << uint32(2)))


def filled(threads: int) -> tuple[Any, Any, int, int]:
    """Return ``asked`` and ``kept``, and how many words and floats a thread holds between them.

    ``asked(entries, levels, pairs_at, levels_at, thread)`` loads a few entries for each thread, and
    ``kept(base, entries, levels, thread)`` puts the tables into shared memory: all lanes store what one has
    loaded, so no load waits for another.
    """
    ENTRIES = 256 // (threads // 32)  # that a warp writes
    AT_ONCE = min(32, ENTRIES)
    WORDS, FLOATS = ENTRIES // AT_ONCE, max(1, 256 // threads)

    @device_function
    def asked(entries: Any, levels: Any, pairs_at: Any, levels_at: Any, thread: Any) -> None:
        warp, lane = int32(thread >> 5), int32(thread & 31)
        for i in range(WORDS):
            entry = uint64(ENTRIES * warp + AT_ONCE * i + (lane & (AT_ONCE - 1)))
            entries[i] = machine.load_word(pairs_at + uint64(4) * entry)
        for i in range(FLOATS):
            code = int32(thread + threads * i)
            if code < 256:
                levels[i] = machine.load_float(levels_at + uint64(4) * uint64(code))

    @device_function
    def kept(base: Any, entries: Any, levels: Any, thread: Any) -> None:
        warp, lane = int32(thread >> 5), int32(thread & 31)
        for i in range(WORDS):
            pair = uint32(entries[i])
            for j in range(AT_ONCE):
                at = uint32(256 * (ENTRIES * warp + AT_ONCE * i + j) + 4 * lane)
                machine.store_shared_word(base + at, machine.from_lane(pair, int32(j)))
        for i in range(FLOATS):
            code = int32(thread + threads * i)
            if code < 256:
                machine.store_shared_float(base + uint32(LEVELS_AT + 4 * code), levels[i])

    return asked, kept, WORDS, FLOATS
