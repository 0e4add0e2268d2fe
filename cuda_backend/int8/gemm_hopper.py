"""Products of int8 codes for Hopper: one TMA producer, two wgmma consumers, persistent blocks.

A block works on one tile of 128 rows after the other (`gemm_consumer_hopper`).  While consumers end a tile,
the producer fills stages for the next one (`gemm_producer_hopper`), and another warp brings the scales of its
columns.  The weight's part of the first stages is under way before the grid ahead, which makes the codes of
A, has ended.

What follows the product happens in registers, in the reference's order::

    y = ((int32 * c_x) * c_w) / 127² + bias       each rounded to float32
    y += X[:, outliers] W[outliers]               tensor cores in float32, onto the same registers

While the first tiles are multiplied, two warps of each block list the outliers and put those of X and of the
weight side by side, padded with zeros to whole steps of 16 (`aside_hopper`); they arrive as further stages,
and so do their codes, whose product is taken from the sums.  How many there are only the device knows.

Sources: PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Instructions", "Tensor copy"; Dettmers et al. 2022,
arXiv:2208.07339, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.int8.aside_hopper import build_set_aside
from cuda_backend.int8.epilogue_hopper import build_columns
from cuda_backend.int8.gemm_consumer_hopper import build_consumer
from cuda_backend.int8.gemm_layout_hopper import GROUP, layout_of, placing
from cuda_backend.int8.gemm_producer_hopper import build_producer
from cuda_backend.int8.variant_hopper import Wide
from cuda_backend.ptx import barrier, copy, grid, registers
from cuda_backend.ptx.assembly import types

__all__ = ["SIGNATURE", "build"]

int32, uint32, uint64 = types.int32, types.uint32, types.uint64

SIGNATURE = types.void(
    *[uint64] * 4,  # descriptors of A, B and of their outliers
    *[uint64] * 4,  # out; absmax of the rows of A and of B; bias, or 0
    *[uint64] * 2,  # indices of outliers; the marks to be cleared, or 0 if there are none
    *[uint64] * 6,  # x, its strides by row and feature; what outliers meet, by feature and column: bytes
    *[uint64] * 5,  # codes of x, bytes from a row to the next; what is set aside, of x and w; counters
    *[int32] * 8,  # tiles, rows of tiles, columns of tiles, steps along K, M, N, outliers side by side, K
)
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


def build(variant: Wide) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, declared as launch bound with one block, ``variant.shared_bytes`` of
    dynamic shared memory, and at most as many blocks as run at once.
    """
    block_n, stages, at = variant.block_n, variant.stages, layout_of(variant)
    consumer_warps, scaled, beside = 8, variant.kind != "int32", variant.beside

    place = placing(GROUP)
    give_registers = registers.give_registers(PRODUCER_REGISTERS)
    take_registers = registers.take_registers(CONSUMER_REGISTERS)
    write_columns = build_columns(variant)
    begin, produce = build_producer(variant)
    consume = build_consumer(variant)
    set_aside = build_set_aside(variant.kind, variant.outliers)

    @device_function
    def describe(base: Any, lane: Any, absmax: Any, bias: Any, first: Any, blocks: Any, problem: Any) -> None:
        """Write scale and bias of the columns of each tile, for the consumers."""
        tiles, rows, columns, _, _, N, _ = problem
        parity = int32(1)
        tile = first
        while tile < tiles:
            _, column = place(tile, rows, columns)
            barrier.wait(base + at.columns_empty, parity)
            write_columns(base + at.columns, lane, absmax, bias, int32(column * block_n), N)
            barrier.arrive(base + at.columns_full)
            parity = int32(parity ^ 1)
            tile = int32(tile + blocks)

    def product(
        a_map: Any, b_map: Any, x_map: Any, w_map: Any, out: Any, a_absmax: Any, b_absmax: Any, bias: Any,
        indices: Any, marks: Any,
        x: Any, x_row: Any, x_feature: Any, w: Any, w_feature: Any, w_column: Any,
        codes: Any, codes_row: Any, x_aside: Any, w_aside: Any, counters: Any,
        tiles: Any, rows: Any, columns: Any, steps: Any, M: Any, N: Any, side_by_side: Any, K: Any,
    ) -> None:  # fmt: skip
        problem = (tiles, rows, columns, steps, M, N, side_by_side)
        shared = cuda.shared.array(0, types.uint8)
        base = uint32((copy.shared_address(shared) + uint32(1023)) & uint32(0xFFFFFC00))
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            for i in range(stages):
                barrier.initialise(base + at.full + 8 * i, 1)
                barrier.initialise(base + at.empty + 8 * i, consumer_warps)
            barrier.initialise(base + at.columns_full, 32)
            barrier.initialise(base + at.columns_empty, consumer_warps)
            barrier.initialise(base + at.ready, 1)
            barrier.publish_initialisation()
        cuda.syncthreads()
        first, blocks = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        if thread == 0:
            begin(base, a_map, b_map, first, problem)
        grid.wait_for_earlier_grids()
        role = registers.uniform(int32(thread >> 5))
        if role < 4:
            give_registers()
            if thread == 0:
                produce(base, (a_map, b_map, x_map, w_map), marks, first, blocks, problem)
            elif scaled and role == 1:
                describe(base, int32(thread & 31), b_absmax, bias, first, blocks, problem)
            elif beside and role >= 2 and marks != uint64(0):
                given = (x, x_row, x_feature, codes, codes_row, w, w_feature, w_column, b_absmax)
                set_aside(
                    int32(thread - 64), marks, counters, indices, base + at.listed, base + at.number,
                    base + at.counted, base + at.ready, given, (x_aside, w_aside), (M, N, side_by_side),
                    K, blocks,
                )  # fmt: skip
        else:
            take_registers()
            surplus = (x, x_row, x_feature, w, w_feature, w_column, b_absmax)
            taken = (codes, codes_row, w, w_feature, w_column)
            consume(base, thread, out, a_absmax, indices, marks, surplus, taken, first, blocks, problem)

    return product
