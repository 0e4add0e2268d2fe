"""Outliers of few rows of x, for Hopper: what a block needs of them lies in its shared memory.

While codes are multiplied a warp that does nothing else lists the marked columns and brings what the first
`NEAR` outliers meet in the columns of the tile: four codes of a column side by side, or four numbers.  Then
the consumers bring what x and its codes hold there, of the tokens whose outputs the block writes.  A thread
adds four outliers at a time to sums of several tokens, which it leaves in shared memory, and one dp4a finds
what their codes have added to the product, which it takes away from the block's own part, exactly.  Further
outliers go through the same memory, `NEAR` at a time.

All of it is over before the blocks of a cluster wait for each other.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.arithmetic import dot_product
from cuda_backend.int8.aside_hopper import LEFT, build_list
from cuda_backend.int8.epilogue_hopper import NO_BIAS, build_value, kind_of
from cuda_backend.int8.outliers_hopper import clear_marks
from cuda_backend.int8.variant_hopper import CONSUMERS, NEAR, Narrow
from cuda_backend.ptx import barrier, copy, registers
from cuda_backend.ptx.assembly import types

__all__ = ["Outliers", "build_outliers"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

WARPS = 4 * CONSUMERS  # of consumers: each brings what one token holds, a lane for each outlier
COLUMNS = 64 * CONSUMERS
VECTORS = 8  # of 16 marks, that a lane of the warp that lists reads at once
ITEMS = COLUMNS // 32  # columns of a lane


class Outliers(NamedTuple):
    """Device functions of a block.

    Attributes
    ----------
    begin
        ``(base)``: one thread initialises barriers.
    listing
        ``(base, lane, marks, indices, counters, weight, start, N, K, grid)``: a warp lists marked columns,
        brings what the first outliers meet in the columns from `start` on, and lets the consumers know;
        returns, to lane 0, how many of `grid` blocks had read the marks before, if there are any.
    clear
        ``(lane, left, marks, K, grid)``: with what `listing` has returned, the same warp of the block that
        was the last to read the marks clears them, when nobody waits for it.
    add
        ``(base, thread, tokens, x, codes, weight, factor, indices, start, N)``: consumers add up, token by
        token, what outliers add to a column, and take away what their codes had added; return whether there
        are any.  `tokens` is the tile's first, that of the block among them, and how many there are; `x`,
        `codes` and `weight` are addresses and strides, `factor` the absmax of the thread's column.
    added
        ``(base, row, feature)``: what they add to the block's own token number `row`.
    """

    begin: Callable[..., Any]
    listing: Callable[..., Any]
    clear: Callable[..., Any]
    add: Callable[..., Any]
    added: Callable[..., Any]


def build_outliers(variant: Narrow, at: int, token_bytes: int) -> Outliers:
    """Return what a block of `variant` does about outliers, with shared memory from ``base + at`` on.

    The sums of a token begin ``token_bytes`` behind those of the one before, from ``base`` on.
    """
    own_rows, step, together = variant.own_rows, variant.token_step, variant.together
    turns, rounds = variant.own_tokens // together, max(1, own_rows // WARPS)
    released = variant.outliers == "released"
    added_at = variant.tokens * token_bytes  # behind the sums, where the stages were
    listed_there, all_there, number_at, listed = at, at + 8, at + 16, at + 32
    x_at = listed + 4 * NEAR
    met_at = x_at + 4 * own_rows * NEAR
    codes_at = met_at + variant.met_bytes
    groups = 2 if variant.alone else 1  # of four outliers, that a lane asks for at once in all its columns
    asked = 4 * ITEMS * groups
    make_list = build_list(NEAR, VECTORS)
    unpack, value_of = registers.unpack_low(kind_of(variant.kind)), build_value(variant.kind)
    meet = barrier.named(1, 32 * WARPS)

    @device_function
    def begin(base: Any) -> None:
        barrier.initialise(base + listed_there, 1)
        barrier.initialise(base + all_there, 1)

    @device_function
    def bring_met(
        base: Any, lane: Any, warp: Any, warps: Any, near: Any, weight: Any, start: Any, N: Any
    ) -> None:
        """Bring what `near` outliers meet in the columns of the tile, as a lane of one of `warps` warps.

        What lies where there is no outlier or no column is never used, and no branch waits for it.
        """
        w, w_feature, w_column = weight
        found = cuda.local.array(asked, uint32)
        offsets = cuda.local.array(4, uint64)
        j = int32(4 * warp)
        while j < near:
            for g in range(groups):
                if j + 4 * warps * g < near:
                    for e in range(4):
                        place = int32(min(j + 4 * warps * g + e, near - 1))
                        feature = uint64(copy.load_shared_word(uint32(base + listed + 4 * place)))
                        offsets[e] = feature * w_feature
                    for i in range(ITEMS):
                        column = w + uint64(min(start + lane + 32 * i, N - 1)) * w_column
                        for e in range(4):
                            if released:
                                found[16 * g + 4 * i + e] = uint32(copy.load_byte(column + offsets[e]))
                            else:
                                found[16 * g + 4 * i + e] = copy.load_half(column + offsets[e])
            for g in range(groups):
                if j + 4 * warps * g < near:
                    for i in range(ITEMS):
                        k = 16 * g + 4 * i
                        item = int32((j // 4 + warps * g) * COLUMNS + lane + 32 * i)
                        a, b, c, d = found[k], found[k + 1], found[k + 2], found[k + 3]
                        if released:
                            word = int32(registers.low_bytes(a, b, c, d))
                            copy.store_shared_word(uint32(base + met_at + 4 * item), word)
                        else:
                            low, high = a | uint32(b << uint32(16)), c | uint32(d << uint32(16))
                            copy.store_shared_8(uint32(base + met_at + 8 * item), uint32(low), uint32(high))
            j = int32(j + 4 * warps * groups)

    @device_function
    def listing(
        base: Any, lane: Any, marks: Any, indices: Any, counters: Any, weight: Any, start: Any, N: Any,
        K: Any, grid: Any,
    ) -> Any:  # fmt: skip
        number = make_list(marks, int32(0), K, int32(0), lane, uint32(base + listed), indices, True)
        if lane == 0:
            copy.store_shared_word(uint32(base + number_at), number)
        barrier.warp()
        if lane == 0:
            barrier.arrive(base + listed_there)
        left = int32(-1)
        if number > 0:
            if lane == 0:
                left = copy.fetch_increment(counters + uint64(LEFT), int32(grid - 1))
            bring_met(base, lane, 0, 1, int32(min(number, NEAR)), weight, start, N)
        barrier.warp()
        if lane == 0:
            barrier.arrive(base + all_there)
        return left

    @device_function
    def clear(lane: Any, left: Any, marks: Any, K: Any, grid: Any) -> None:
        if registers.uniform(left) == grid - 1:
            clear_marks(marks, K, lane, 32)

    @device_function
    def bring_x(base: Any, thread: Any, near: Any, tokens: Any, x: Any, codes: Any) -> None:
        """Bring what x and its codes hold at `near` outliers, and zeros behind."""
        first, own, count = tokens
        x_base, x_row, x_feature = x
        codes_base, codes_row = codes
        found = cuda.local.array(rounds, uint32)
        own_codes = cuda.local.array(rounds, int32)
        j, warp = int32(thread & 31), int32(thread >> 5)
        feature = uint64(0)
        if j < near:
            feature = uint64(copy.load_shared_word(uint32(base + listed + 4 * j)))
        for i in range(rounds):
            found[i], own_codes[i] = uint32(0), int32(0)
            row = int32(warp + WARPS * i)
            token = int32(own + (row & 1) + step * (row >> 1))
            if j < near and token < count and row < own_rows:
                at_row = uint64(first + token)
                found[i] = copy.load_half(x_base + at_row * x_row + feature * x_feature)
                if released:
                    own_codes[i] = copy.load_byte(codes_base + at_row * codes_row + feature)
        for i in range(rounds):
            row = int32(warp + WARPS * i)
            if row < own_rows:
                place = int32(row * NEAR + j)
                copy.store_shared_float(uint32(base + x_at + 4 * place), unpack(found[i]))
                if released:
                    copy.store_shared_byte(uint32(base + codes_at + place), uint32(own_codes[i]))

    @device_function
    def load_met(met: Any, base: Any, item: Any, factor: Any) -> Any:
        """Load what four outliers meet in a column, and return their codes."""
        if released:
            word = int32(copy.load_shared_word(uint32(base + met_at + 4 * item)))
            for e in range(4):
                met[e] = value_of(int32(int32(word << (24 - 8 * e)) >> 24), factor)
            return word
        halves = cuda.local.array(2, uint32)
        copy.load_shared_8(halves, 0, uint32(base + met_at + 8 * item))
        for i in range(2):
            met[2 * i], met[2 * i + 1] = unpack(halves[i]), unpack(uint32(halves[i] >> uint32(16)))
        return int32(0)

    @device_function
    def added(base: Any, row: Any, feature: Any) -> Any:
        return copy.load_shared_float(uint32(base + added_at + row * token_bytes + 4 * feature))

    @device_function
    def add_near(base: Any, thread: Any, near: Any, earlier: Any, own: Any, factor: Any) -> None:
        """Add what lies in shared memory to all tokens of a thread, four outliers to several at a time."""
        removed = cuda.local.array(together, int32)
        far = cuda.local.array(together, float32)
        met = cuda.local.array(4, float32)
        values = cuda.local.array(4, float32)
        feature, row, turn = int32(thread & (COLUMNS - 1)), int32(thread // COLUMNS), int32(0)
        while turn < turns:
            for i in range(together):
                removed[i], far[i] = int32(0), float32(NO_BIAS)
                if earlier > 0:
                    far[i] = added(base, int32(row + 2 * i), feature)
            j = int32(0)
            while j < near:
                packed = load_met(met, base, int32((j // 4) * COLUMNS + feature), factor)
                for e in range(4):
                    if j + e >= near:
                        met[e] = float32(0.0)  # as x is there; 0 times infinity would not be 0
                for i in range(together):
                    place = int32((row + 2 * i) * NEAR + j)
                    copy.load_shared_16(values, 0, uint32(base + x_at + 4 * place))
                    for e in range(4):
                        far[i] += values[e] * met[e]
                    if released:
                        four = copy.load_shared_word(uint32(base + codes_at + place))
                        removed[i] = dot_product(uint32(four), uint32(packed), removed[i])
                j = int32(j + 4)
            for i in range(together):
                copy.store_shared_float(
                    uint32(base + added_at + (row + 2 * i) * token_bytes + 4 * feature), far[i]
                )
                if released:  # of tokens that are not there 0, and there is room for them
                    token = int32(own + (row & 1) + step * ((row >> 1) + i))
                    at_sum = uint32(base + token * token_bytes + 4 * feature)
                    copy.store_shared_word(at_sum, int32(copy.load_shared_word(at_sum) - removed[i]))
            row, turn = int32(row + 2 * together), int32(turn + 1)

    @device_function
    def add(
        base: Any, thread: Any, tokens: Any, x: Any, codes: Any, weight: Any, factor: Any, indices: Any,
        start: Any, N: Any,
    ) -> Any:  # fmt: skip
        barrier.wait(base + listed_there, 0)
        number = copy.load_shared_word(uint32(base + number_at))
        earlier = int32(0)
        while earlier < number:
            near = int32(min(number - earlier, NEAR))
            if earlier == 0:
                bring_x(base, thread, near, tokens, x, codes)
                barrier.wait(base + all_there, 0)
            else:
                meet()  # all have used what was there
                if thread < near:
                    feature = copy.load_word(indices + uint64(4) * uint64(earlier + thread))
                    copy.store_shared_word(uint32(base + listed + 4 * thread), feature)
                meet()
                bring_x(base, thread, near, tokens, x, codes)
                bring_met(base, int32(thread & 31), int32(thread >> 5), WARPS, near, weight, start, N)
            meet()
            add_near(base, thread, near, earlier, tokens[1], factor)
            earlier = int32(earlier + NEAR)
        return number

    return Outliers(begin, listing, clear, add, added)
