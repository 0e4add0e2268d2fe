"""Outliers of codes that are handed out, on Hopper: marked columns become a list, their codes 0.

Every block makes the list of marked columns for itself, by a scan over the marks, in shared memory; what does
not fit there all blocks write to the same place in global memory, all the same.  Then blocks share the rows
of x, whose codes there become 0.  A layer needs none of this: its product takes outliers away itself.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3; `refimpl.quant.quantize_rows` is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend._numba import cuda, device_function
from cuda_backend.ptx import copy, grid, registers
from cuda_backend.ptx.assembly import types

__all__ = ["MEMBERS", "SIGNATURE", "THREADS", "Variant", "build", "clear_marks"]

int32, uint32, uint64 = types.int32, types.uint32, types.uint64

SIGNATURE = types.void(
    uint64,  # marks, a byte for each column, up to a multiple of 16
    *[uint64] * 2,  # indices of outlier columns, their number: int32
    *[uint64] * 2,  # codes of x, bytes from a row to the next
    *[int32] * 2,  # T, K
)
THREADS, WARPS, WIDTH, MEMBERS = 256, 8, 16, 16  # WIDTH marks a thread and round, MEMBERS threads a row
LISTED = 1024  # indices that a block keeps in shared memory


class Variant(NamedTuple):
    """The one compiled kernel."""


@device_function
def clear_marks(marks: Any, K: Any, thread: Any, threads: Any) -> None:
    """Make the marks of K columns 0, by `threads` threads of all blocks."""
    column = int32(WIDTH * thread)
    while column < K:
        copy.store_global_16(marks + uint64(column), 0, 0, 0, 0)
        column = int32(column + WIDTH * threads)


def build(_variant: Variant) -> Callable[..., None]:
    """Return the kernel, to be compiled with `SIGNATURE`; any number of blocks of THREADS."""

    def set_aside(
        marks: Any, indices: Any, number_at: Any, codes: Any, codes_row: Any, T: Any, K: Any
    ) -> None:
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

        row = int32(cuda.blockIdx.x * (THREADS // MEMBERS) + thread // MEMBERS)
        while row < T:
            j = int32(thread & (MEMBERS - 1))
            while j < number:
                if j < LISTED:
                    feature = uint64(listed[j])
                else:
                    feature = uint64(copy.load_word(indices + uint64(4) * uint64(j)))
                copy.store_global_byte(codes + uint64(row) * codes_row + feature, uint32(0))
                j = int32(j + MEMBERS)
            row = int32(row + cuda.gridDim.x * (THREADS // MEMBERS))

    return set_aside
