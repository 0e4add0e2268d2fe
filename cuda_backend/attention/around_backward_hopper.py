"""The kernels before and after the Hopper backward kernel: rowsum(dO O), empty sums; dQ put together.

For each tile of `block_m` queries of a head (line of a tile: head of all batches, then tile) lie in float32

* shifts: minus the log-sum-exp times log2(e), -inf where there is no query or it has no key: its P is 0;
* deltas: rowsum(dO O), 0 where there is no query;
* sums of dQ: the consumers' shares one behind the other, each four accumulators of a thread at a time, those
  of its 128 threads side by side;

and a word that says how many blocks of keys have added to the tile.

Sources: Dao et al. 2022, arXiv:2205.14135, appendix B.4, observation 2; Dao 2023, arXiv:2307.08691, Algorithm
2, line 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.gradient_hopper import build_stores
from cuda_backend.attention.variant_backward_hopper import CONSUMERS, BackwardVariant
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import copy, grid, registers
from cuda_backend.ptx.assembly import types

__all__ = ["FINISH_SIGNATURE", "PREPARE_SIGNATURE", "THREADS", "build_finish", "build_prepare"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

THREADS = 128 * CONSUMERS
LOG2_E = 1.4426950408889634

PREPARE_SIGNATURE = types.void(
    *[uint64] * 7,  # O, dO, log-sum-exp; shifts, deltas, sums of dQ, words of the turns
    *[uint64] * 6,  # bytes from a batch, a token, a head of O to the next; the same of dO
    *[int32] * 4,  # tiles of a head, Hq, Tq, Dv
)
FINISH_SIGNATURE = types.void(
    *[uint64] * 2,  # sums of dQ, dQ
    float32,  # scale
    *[int32] * 4,  # tiles of a head, Hq, Tq, columns of a row of dQ
)


def build_prepare(variant: BackwardVariant | WideBackwardVariant) -> Callable[..., None]:
    """Return the kernel before, for a block of `THREADS` threads for each tile; see `PREPARE_SIGNATURE`.

    Eight numbers are a thread's share of a row; as many neighbouring threads as that takes, filled up to a
    power of two, share a row.
    """
    block_m = variant.block_m
    lanes = 1 << (variant.d_v // 8 - 1).bit_length()
    rows_at_once, tile_bytes = THREADS // lanes, variant.shares * variant.share_bytes
    low, high = registers.unpack_low(variant.kind), registers.unpack_high(variant.kind)

    @device_function
    def share(o_row: Any, do_row: Any, column: Any, width: Any) -> Any:
        """Return the sum over the thread's columns: two loads if all are there, else one by one."""
        total = float32(0.0)
        if column + 8 <= width:
            o = cuda.local.array(4, uint32)
            do = cuda.local.array(4, uint32)
            copy.load_16(o, int32(0), o_row + uint64(2 * column))
            copy.load_16(do, int32(0), do_row + uint64(2 * column))
            for i in range(4):
                total += low(o[i]) * low(do[i])
                total += high(o[i]) * high(do[i])
        else:
            while column < width:
                at = uint64(2 * column)
                total += low(copy.load_half(o_row + at)) * low(copy.load_half(do_row + at))
                column = int32(column + 1)
        return total

    def prepare(
        o: Any, do: Any, lse: Any, shifts: Any, deltas: Any, sums: Any, words: Any,
        o_batch: Any, o_token: Any, o_head: Any, do_batch: Any, do_token: Any, do_head: Any,
        blocks: Any, heads: Any, tq: Any, width: Any,
    ) -> None:  # fmt: skip
        thread = int32(cuda.threadIdx.x)
        tile = int32(cuda.blockIdx.x)
        if thread == 0:
            grid.let_next_grid_start()
        # What lies before is read, and what it reads is overwritten.
        grid.wait_for_earlier_grids()
        line = registers.quotient(tile, blocks)
        first = int32((tile - line * blocks) * block_m)
        batch = registers.quotient(line, heads)
        head = int32(line - batch * heads)
        o += uint64(batch) * o_batch + uint64(head) * o_head
        do += uint64(batch) * do_batch + uint64(head) * do_head
        lane = int32(thread & (lanes - 1))
        statistics = uint64(tile) * uint64(4 * block_m)
        for step in range(block_m // rows_at_once):
            row = int32(step * rows_at_once + thread // lanes)
            query = int32(first + row)
            total = float32(0.0)
            if query < tq:
                total = share(o + uint64(query) * o_token, do + uint64(query) * do_token, 8 * lane, width)
            for i in range(5):
                if lanes > 1 << i:
                    total += registers.exchange_float(total, 1 << i)
            if lane == 0:
                shift = float32(float("-inf"))
                if query < tq:
                    found = copy.load_float(lse + uint64(4) * (uint64(line) * uint64(tq) + uint64(query)))
                    if found > shift:
                        shift = found * float32(-LOG2_E)
                    else:
                        total = float32(0.0)  # a row without keys, whatever its output is
                place = statistics + uint64(4 * row)
                copy.store_global_float(shifts + place, shift)
                copy.store_global_float(deltas + place, total)
        own = sums + uint64(tile) * uint64(tile_bytes) + uint64(16 * thread)
        for i in range(tile_bytes // (16 * THREADS)):
            zero = uint32(0)
            copy.store_global_16(own + uint64(16 * THREADS * i), zero, zero, zero, zero)
        if thread == 0:
            copy.store_global_word(words + uint64(4 * tile), uint32(0))

    return prepare


def build_finish(variant: BackwardVariant | WideBackwardVariant) -> Callable[..., None]:
    """Return the kernel after, for a block of 128 threads for each share of a tile.

    See `FINISH_SIGNATURE`.
    """
    block_m, d, row_split, swapped = variant.block_m, variant.d, variant.row_split, variant.swapped
    count, shares, share_bytes = variant.dq_columns // 2, variant.shares, variant.share_bytes
    store_row = build_stores(variant._replace(d=variant.dq_columns))[2]
    pack = registers.pack_pair(variant.kind)
    pitch = 2 * d + 16  # bytes from a row of the turned tile to the next, so that columns meet all banks

    def finish(sums: Any, dq: Any, scale: Any, blocks: Any, heads: Any, tq: Any, columns: Any) -> None:
        values = cuda.local.array(count, float32)
        thread = int32(cuda.threadIdx.x)
        tile = int32(cuda.blockIdx.x)
        if thread == 0:
            grid.let_next_grid_start()
        grid.wait_for_earlier_grids()
        line = registers.quotient(tile, blocks)
        first = int32((tile - line * blocks) * block_m)
        batch = registers.quotient(line, heads)
        head = int32(line - batch * heads)
        w, lane = int32(thread >> 7), int32(thread & 31)
        own = sums + uint64(shares * tile + w) * uint64(share_bytes) + uint64(16 * (thread & 127))
        for i in range(count // 4):
            copy.load_16(values, int32(4 * i), own + uint64(2048 * i))
        row = int32(16 * ((thread >> 5) & 3) + (lane >> 2))
        head_rows = uint64(batch) * uint64(tq) * uint64(heads) + uint64(head)
        if swapped:
            # Rows are channels: turned in shared memory, then written as rows of queries.
            shared = cuda.shared.array(0, types.uint8)
            base = copy.shared_address(shared)
            for i in range(count // 2):
                column = int32(8 * (i // 2) + 2 * (lane & 3))
                word = pack(values[2 * i] * scale, values[2 * i + 1] * scale)
                place = base + uint32(column * pitch + 2 * (64 * w + row + 8 * (i % 2)))
                copy.store_shared_half(place, word)
                copy.store_shared_half(place + uint32(pitch), word >> 16)
            cuda.syncthreads()
            words = cuda.local.array(4, uint32)
            for i in range(block_m * d // (8 * THREADS)):
                item = int32(i * THREADS + thread)
                query, column = int32(item // (d // 8)), int32(8 * (item % (d // 8)))
                copy.load_shared_16(words, int32(0), base + uint32(query * pitch + 2 * column))
                if first + query < tq and column < columns:
                    at = (head_rows + uint64(first + query) * uint64(heads)) * uint64(2 * columns)
                    address = dq + at + uint64(2 * column)
                    copy.store_global_16(address, words[0], words[1], words[2], words[3])
        else:
            start = int32(0)
            if row_split:
                row = int32(row + 64 * w)
            else:
                start = int32(64 * w)
            for half in range(2):
                query = int32(first + row + 8 * half)
                at = (head_rows + uint64(query) * uint64(heads)) * uint64(2 * columns)
                valid = int32(query < tq)
                address = dq + at + uint64(2 * start)
                store_row(values, int32(2 * half), scale, address, lane & 3, columns - start, valid)

    return finish
