"""The Hopper backward kernel with functions of the user's: `backward_hopper` that walks lists of tiles.

Roles, tiles and products are those of the kernel without functions.  Its blocks take tiles from a table, and
each tile of keys brings the list of queries that see it (`tile_lists`): the producer reads it and tells the
consumers, beside each tile of Q, which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda
from cuda_backend.attention.arguments import aux_signature
from cuda_backend.attention.consumer_backward_hopper import build_backward_consumer
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.entry_hopper import build_entry, shared_base
from cuda_backend.attention.lists_backward_hopper import build_list_producer, build_list_writer
from cuda_backend.attention.producer_backward_hopper import build_start
from cuda_backend.attention.schedule_backward_hopper import build_backward_schedule
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_backward_hopper import DESCRIPTORS, BackwardVariant
from cuda_backend.ptx import parameters, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_flexible_backward", "flexible_signature"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


def flexible_signature(mods: Mods) -> Any:
    """Return the signature of kernels with `mods`; see `backward_hopper.SIGNATURE`."""
    return types.void(
        parameters.block(DESCRIPTORS * DESCRIPTOR_BYTES),
        *[uint64] * 5,  # dK, dV, sums of dQ, words of the turns, the counter
        *[uint64] * 3,  # records, entries, turns: `TileLists`
        aux_signature(mods),
        *[float32] * 3,
        *[int32] * 12,
    )


def build_flexible_backward(variant: BackwardVariant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be launched as `build_backward` says."""
    schedule = build_backward_schedule(variant)
    enter, produce = build_entry(build_start(variant)), build_list_producer(variant, schedule)
    write, consume = build_list_writer(variant, schedule), build_backward_consumer(variant, schedule)
    give_registers = registers.give_registers(variant.producer_registers)
    take_registers = registers.take_registers(variant.consumer_registers)

    def flexible_backward(
        descriptor_block: Any,
        dk: Any, dv: Any, sums: Any, words: Any, counter: Any,
        records: Any, entries: Any, turns: Any, aux: Any,
        scale: Any, factor: Any, kept: Any,
        tiles: Any, per_head: Any, section: Any, heads: Any, all_heads: Any, group: Any,
        blocks: Any, tq: Any, tk: Any, offset: Any, k_columns: Any, v_columns: Any,
    ) -> None:  # fmt: skip
        descriptors = parameters.block_address(descriptor_block)
        problem = (
            tiles, per_head, section, heads, all_heads, group, blocks, tq, tk, offset, k_columns, v_columns
        )  # fmt: skip
        tables = records, entries, turns
        base, thread = shared_base(), int32(cuda.threadIdx.x)
        enter(base, thread)
        if registers.uniform(thread >> 7) == 0:
            give_registers()
            if thread == 0:
                produce(base, descriptors, counter, problem, tables)
            elif thread == 32:
                write(base, sums, words, problem, tables)
        else:
            take_registers()
            consume(base, thread, dk, dv, scale, factor, (uint64(0), uint64(0), kept), problem, aux)

    return flexible_backward
