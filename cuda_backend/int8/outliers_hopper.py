"""Outliers of codes that are handed out, on Hopper: marked columns become a list, their codes 0.

Every block makes the list of marked columns for itself, by a scan over the marks, in shared memory; what does
not fit there all blocks write to the same place in global memory, all the same.  Then blocks share the rows
of x, whose codes there become 0.  Asked for N columns of a weight, too, they put the outliers' numbers side
by side for a product, padded with zeros to a multiple of 16; the products here do that themselves now.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3; `refimpl.quant.quantize_rows` is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.epilogue_hopper import build_weight
from cuda_backend.ptx import copy, grid, registers
from cuda_backend.ptx.assembly import types

__all__ = ["MEMBERS", "SIGNATURE", "THREADS", "Variant", "build", "clear_marks"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    uint64,  # marks, a byte for each column, up to a multiple of 16
    *[uint64] * 2,  # indices of outlier columns, their number: int32
    *[uint64] * 5,  # x, its strides by row and feature in bytes; codes of x, bytes from a row to the next
    *[uint64] * 4,  # what outliers meet, its strides by feature and column; absmax of the weight
    *[uint64] * 2,  # outliers of x and of the weight, side by side
    *[int32] * 4,  # T, K, N, numbers in a row of these
)
THREADS, WARPS, WIDTH, MEMBERS = 256, 8, 16, 16  # WIDTH marks a thread and round, MEMBERS threads a row
LISTED = 1024  # indices that a block keeps in shared memory


class Variant(NamedTuple):
    """One compiled kernel: the format of x, and the convention that says what weights outliers meet."""

    kind: str
    outliers: str


@device_function
def clear_marks(marks: Any, K: Any, thread: Any, threads: Any) -> None:
    """Make the marks of K columns 0, by `threads` threads of all blocks."""
    column = int32(WIDTH * thread)
    while column < K:
        copy.store_global_16(marks + uint64(column), 0, 0, 0, 0)
        column = int32(column + WIDTH * threads)


def build(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`; any number of blocks of THREADS."""
    weight = build_weight(variant.kind, variant.outliers)
    pack = registers.pack_pair("bf16" if variant.kind == "bfloat16" else "f16")

    def set_aside(
        marks: Any, indices: Any, number_at: Any,
        x: Any, x_row: Any, x_feature: Any, codes: Any, codes_row: Any,
        w: Any, w_feature: Any, w_column: Any, w_absmax: Any,
        x_aside: Any, w_aside: Any, T: Any, K: Any, N: Any, side_by_side: Any,
    ) -> None:  # fmt: skip
        sums = cuda.shared.array(WARPS, int32)
        listed = cuda.shared.array(LISTED, int32)
        words = cuda.local.array(4, uint32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)

        grid.let_next_grid_start()
        grid.wait_for_earlier_grids()
        number = int32(0)
        start = int32(0)
        while start < K:
            column = int32(start + WIDTH * thread)
            own = int32(0)
            if column < K:
                copy.load_16(words, 0, marks + uint64(column))
                for i in range(4):
                    own += cuda.popc(words[i])
            before = own
            for step in (1, 2, 4, 8, 16):
                lower = registers.word_below(before, step)
                if lane >= step:
                    before += lower
            if lane == 31:
                sums[warp] = before
            cuda.syncthreads()
            place, total = int32(number + before - own), int32(0)
            for i in range(WARPS):
                if i < warp:
                    place += sums[i]
                total += sums[i]
            if own > 0:
                for i in range(WIDTH):
                    if (words[i // 4] >> uint32(8 * (i % 4))) & uint32(1):
                        if place < LISTED:
                            listed[place] = column + i
                        copy.store_global_word(indices + uint64(4) * uint64(place), uint32(column + i))
                        place += int32(1)
            number += total
            cuda.syncthreads()
            start = int32(start + WIDTH * THREADS)
        if thread == 0 and cuda.blockIdx.x == 0:
            copy.store_global_word(number_at, uint32(number))
        cuda.syncthreads()

        padded = int32((number + (MEMBERS - 1)) // MEMBERS * MEMBERS)
        member = int32(thread & (MEMBERS - 1))
        row = int32(cuda.blockIdx.x * (THREADS // MEMBERS) + thread // MEMBERS)
        while number > 0 and row < T + N:
            j = member
            while j < padded:
                feature = uint64(0)
                if j < min(number, LISTED):
                    feature = uint64(listed[j])
                elif j < number:
                    feature = uint64(copy.load_word(indices + uint64(4) * uint64(j)))
                if row < T:
                    bits = uint32(0)
                    if j < number:
                        copy.store_global_byte(codes + uint64(row) * codes_row + feature, uint32(0))
                        if N > 0:
                            bits = copy.load_half(x + uint64(row) * x_row + feature * x_feature)
                    if N > 0 and j < side_by_side:
                        at = uint64(row) * uint64(side_by_side) + uint64(j)
                        copy.store_global_half(x_aside + uint64(2) * at, bits)
                elif j < side_by_side:
                    n = uint64(row - T)
                    met = float32(0.0)
                    if j < number:
                        absmax = copy.load_float(w_absmax + uint64(4) * n)
                        met = weight(w, n * w_column + feature * w_feature, absmax)
                    at = n * uint64(side_by_side) + uint64(j)
                    copy.store_global_half(w_aside + uint64(2) * at, pack(met, float32(0.0)))
                j = int32(j + MEMBERS)
            row = int32(row + cuda.gridDim.x * (THREADS // MEMBERS))

    return set_aside
