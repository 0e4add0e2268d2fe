"""Setting outliers aside beside a product on Hopper: by warps that have nothing else to do, as it goes on.

The product of all codes needs no list of outliers.  While its first tile is multiplied, two warps of every
block make the list from the marks, a half each.  Then warps of all blocks share the rows of x and the
columns of the weight: of each, the numbers that are outliers' are put side by side, and behind them their
codes, those of the weight with the other sign.  The product adds ``codes of x @ -codes of the weight``, which
takes away what the outliers' codes had added, exactly: they are integers.  So no code has to be 0 beforehand.

Shares are claimed, not dealt: who waits for a share waits for a warp that runs, whatever else the GPU does.
The last block that needs no mark any more clears all of them.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3; setting aside beside the product is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.arithmetic import product
from cuda_backend.int8.epilogue_hopper import kind_of
from cuda_backend.int8.outliers_hopper import clear_marks
from cuda_backend.int8.variant_hopper import LISTED, TAKEN_CHUNK
from cuda_backend.ptx import barrier, copy, registers, turns
from cuda_backend.ptx.assembly import types
from refimpl.quant.absmax import LIMIT

__all__ = ["WARPS", "build_list", "build_set_aside"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

WARPS = 2  # of a block, that set aside
VECTORS = 4  # of 16 marks, that a lane reads at once
GROUP = 8  # outliers of a row that a lane moves at once
TAKEN, DONE, LEFT = 0, 4, 8  # counters: shares claimed and finished, blocks that need no marks


def build_list(room: int, vectors: int = VECTORS) -> Callable[..., Any]:
    """Return what a warp does to list marked columns, in order.

    ``listing(marks, start, end, before, lane, listed, indices, written)`` returns ``before`` and how many of
    ``start`` to ``end`` are marked.  If they are to be ``written``, the first has place ``before``; the first
    `room` places lie in shared memory at ``listed``, all further ones where they belong at ``indices``.  A
    lane reads so many `vectors` of 16 marks at once.
    """
    words_at_once = 4 * vectors

    @device_function
    def listing(
        marks: Any, start: Any, end: Any, before: Any, lane: Any, listed: Any, indices: Any, written: Any
    ) -> Any:
        words = cuda.local.array(words_at_once, uint32)
        number, start = int32(before), int32(start)
        while start < end:
            first = int32(start + 16 * vectors * lane)
            for v in range(vectors):
                for i in range(4):
                    words[4 * v + i] = uint32(0)
                if first + 16 * v < end:
                    copy.load_16(words, 4 * v, marks + uint64(first + 16 * v))
            own = int32(0)
            for i in range(words_at_once):
                own += cuda.popc(words[i])
            if registers.largest_word(uint32(own)) > uint32(0):
                upto = own
                for step in (1, 2, 4, 8, 16):
                    lower = registers.word_below(upto, step)
                    if lane >= step:
                        upto += lower
                place = int32(number + upto - own)
                for i in range(words_at_once):
                    word = words[i] if written else uint32(0)
                    while word != uint32(0):
                        column = int32(first + 4 * i + (int32(cuda.ffs(word)) - 1) // 8)
                        if place < room:
                            copy.store_shared_word(uint32(listed + 4 * place), column)
                        else:
                            copy.store_global_word(indices + uint64(4) * uint64(place), uint32(column))
                        place += int32(1)
                        word = uint32(word & uint32(word - uint32(1)))
                number += int32(registers.from_lane(uint32(upto), 31))
            start = int32(start + 32 * 16 * vectors)
        return number

    return listing


def build_set_aside(kind: str, outliers: str) -> Callable[..., Any]:
    """Return what `WARPS` warps of each block do: list, set aside, tell the block, and leave all cleared.

    A row of what is set aside has room for ``side_by_side`` numbers of 16 bits and as many codes, and is
    filled with zeros up to whole chunks.
    """
    pack = registers.pack_pair(kind_of(kind))
    listing = build_list(LISTED)
    together = barrier.named(1, 32 * WARPS)
    removed = outliers == "released"

    @device_function
    def write(target: Any, j: Any, side_by_side: Any, numbers: Any, codes: Any) -> None:
        at = target + uint64(2 * j)
        copy.store_global_16(
            at,
            uint32(numbers[0] | uint32(numbers[1] << uint32(16))),
            uint32(numbers[2] | uint32(numbers[3] << uint32(16))),
            uint32(numbers[4] | uint32(numbers[5] << uint32(16))),
            uint32(numbers[6] | uint32(numbers[7] << uint32(16))),
        )
        if removed:
            copy.store_global_8(
                target + uint64(2 * side_by_side + j),
                registers.low_bytes(codes[0], codes[1], codes[2], codes[3]),
                registers.low_bytes(codes[4], codes[5], codes[6], codes[7]),
            )

    @device_function
    def row_of_x(
        x: Any, x_feature: Any, codes: Any, target: Any, listed: Any, near: Any, end: Any, side_by_side: Any
    ) -> None:
        found = cuda.local.array(GROUP, uint32)
        own = cuda.local.array(GROUP, uint32)
        j = int32(0)
        while j < end:
            for i in range(GROUP):
                found[i], own[i] = uint32(0), uint32(0)
                if j + i < near:
                    feature = uint64(copy.load_shared_word(uint32(listed + 4 * (j + i))))
                    found[i] = copy.load_half(x + feature * x_feature)
                    if removed:
                        own[i] = uint32(copy.load_byte(codes + feature))
            write(target, j, side_by_side, found, own)
            j = int32(j + GROUP)

    @device_function
    def row_of_weight(
        w: Any, w_feature: Any, absmax: Any, target: Any, listed: Any, near: Any, end: Any, side_by_side: Any
    ) -> None:
        found = cuda.local.array(GROUP, uint32)
        own = cuda.local.array(GROUP, uint32)
        factor = copy.load_float(absmax) / float32(LIMIT)
        j = int32(0)
        while j < end:
            for i in range(GROUP):
                found[i], own[i] = uint32(0), uint32(0)
                if j + i < near:
                    feature = uint64(copy.load_shared_word(uint32(listed + 4 * (j + i))))
                    if removed:
                        own[i] = uint32(copy.load_byte(w + feature * w_feature))
                    else:
                        found[i] = copy.load_half(w + feature * w_feature)
            if removed:
                for i in range(GROUP):
                    found[i] = pack(product(float32(int32(own[i])), factor), float32(0.0))
                    own[i] = uint32(-int32(own[i]))
            write(target, j, side_by_side, found, own)
            j = int32(j + GROUP)

    @device_function
    def share_out(
        share: Any, lane: Any, listed: Any, number: Any, given: Any, room: Any, problem: Any
    ) -> None:
        """Set aside 32 rows of x, or 32 columns of the weight."""
        x, x_row, x_feature, codes, codes_row, w, w_feature, w_column, absmax = given
        x_aside, w_aside = room
        M, N, side_by_side = problem
        near = int32(min(number, side_by_side))
        end = int32(min(side_by_side, (near + (TAKEN_CHUNK - 1)) & -TAKEN_CHUNK))
        row, pitch = int32(32 * share + lane), uint64(3 * side_by_side)
        of_x = int32((M + 31) & -32)
        if 32 * share < of_x:
            if row < M:
                at = uint64(row)
                row_of_x(
                    x + at * x_row, x_feature, codes + at * codes_row, x_aside + at * pitch,
                    listed, near, end, side_by_side,
                )  # fmt: skip
        elif row - of_x < N:
            at = uint64(row - of_x)
            row_of_weight(
                w + at * w_column, w_feature, absmax + uint64(4) * at, w_aside + at * pitch,
                listed, near, end, side_by_side,
            )  # fmt: skip

    @device_function
    def claimed(counters: Any, lane: Any) -> Any:
        share = int32(0)
        if lane == 0:
            share = copy.fetch_add(counters + uint64(TAKEN), 1)
        return registers.uniform(share)

    @device_function
    def set_aside(
        thread: Any, marks: Any, counters: Any, indices: Any, listed: Any, number_at: Any, counted: Any,
        ready: Any, given: Any, room: Any, problem: Any, K: Any, blocks: Any,
    ) -> None:  # fmt: skip
        lane, warp = int32(thread & 31), registers.uniform(int32(thread >> 5))
        M, N, _ = problem
        # Each warp counts the marks of a half, then both know where in the list theirs go.
        half = int32(16 * ((K + 31) >> 5))
        start, end = int32(half * warp), int32(half if warp == 0 else K)
        own = listing(marks, start, end, int32(0), lane, listed, indices, False)
        if lane == 0:
            copy.store_shared_word(uint32(counted + 16 * warp), own)
        together()
        before = copy.load_shared_word(counted)
        number = int32(before + copy.load_shared_word(uint32(counted + 16)))
        if own > 0:
            listing(marks, start, end, int32(before * warp), lane, listed, indices, True)
        together()
        if number > 0:
            shares, done = int32(((M + 31) >> 5) + ((N + 31) >> 5)), int32(0)
            share = claimed(counters, lane)
            while share < shares:
                share_out(share, lane, listed, number, given, room, problem)
                done += int32(1)
                share = claimed(counters, lane)
            turns.to_the_copy_engine()
            barrier.warp()
            if lane == 0:
                turns.pass_turns(counters + uint64(DONE), done)
                # A fence of the copy engine at each look would hold up the copies of the product.
                while copy.load_word_fresh(counters + uint64(DONE)) < shares:
                    turns.rest()
                turns.word_seen(counters + uint64(DONE))
            together()
        if warp == 0:
            if lane == 0:
                copy.store_shared_word(number_at, number)
                barrier.arrive(ready)
            last = int32(0)
            if number > 0 and lane == 0:
                last = int32(copy.fetch_increment(counters + uint64(LEFT), int32(blocks - 1)) == blocks - 1)
            if registers.uniform(last) != 0:
                clear_marks(marks, K, lane, 32)
                if lane == 0:
                    copy.store_global_word(counters + uint64(TAKEN), uint32(0))
                    copy.store_global_word(counters + uint64(DONE), uint32(0))

    return set_aside
