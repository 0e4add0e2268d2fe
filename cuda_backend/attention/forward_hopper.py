"""FlashAttention forward for Hopper: one TMA producer warpgroup, two or three wgmma consumers.

The algorithm is refimpl's `flash_attention` with keys visited from the last needed tile to the first.  A
block is persistent: its producer thread finds tiles of query rows and streams Q, K and V through shared
memory; each consumer warpgroup owns 64 rows, keeps S, P and O in registers, and runs the softmax of one key
tile beside P V of the tile before it.

Scores stay unscaled: ``exp2((s - max) * scale * log2 e)`` is one FMA and one MUFU for each.  Which block
computes a tile may change from run to run, the order of arithmetic within a tile never: results repeat bit
for bit.

Sources: Shah et al. 2024, arXiv:2407.08608, Algorithms 1 and 2 (producer and consumers, overlap within a
warpgroup); Dao 2023, arXiv:2307.08691, Section 3 (unscaled O, log-sum-exp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda
from cuda_backend.attention.consumer_hopper import build_consumer
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.entry_hopper import build_entry, shared_base
from cuda_backend.attention.producer_hopper import build_producer, build_start
from cuda_backend.attention.schedule_hopper import build_schedule
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.ptx import parameters, registers
from cuda_backend.ptx.assembly import types

__all__ = ["SIGNATURE", "build"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    parameters.block(3 * DESCRIPTOR_BYTES),  # of Q, K, V
    *[uint64] * 3,  # out; lse, or 0; the counter, two words that are 0 before and after
    float32,  # scale * log2(e), positive
    *[int32] * 5,  # tiles, tiles of a head, heads of a section, Hq, B * Hq
    *[int32] * 5,  # Hq / Hkv, Tq, Tk, offset of the causal diagonal, Dv
)


def build(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, declared as launch bound with one block, ``variant.shared_bytes`` of
    dynamic shared memory, and at most as many blocks as run at once, none without a tile.
    """
    schedule = build_schedule(variant)
    enter, produce = build_entry(build_start(variant)), build_producer(variant, schedule)
    consume = build_consumer(variant, schedule)
    give_registers = registers.give_registers(variant.producer_registers)
    take_registers = registers.take_registers(variant.consumer_registers)

    def forward(
        descriptor_block: Any,
        out: Any,
        lse: Any,
        counter: Any,
        scale: Any,
        tiles: Any,
        per_head: Any,
        section: Any,
        heads: Any,
        all_heads: Any,
        group: Any,
        tq: Any,
        tk: Any,
        offset: Any,
        columns: Any,
    ) -> None:
        descriptors = parameters.block_address(descriptor_block)
        problem = (tiles, per_head, section, heads, all_heads, group, tq, tk, offset, columns)
        base, thread = shared_base(), int32(cuda.threadIdx.x)
        enter(base, thread)
        if registers.uniform(thread >> 7) == 0:
            give_registers()
            if thread == 0:
                produce(base, descriptors, counter, problem)
        else:
            take_registers()
            # The producer waits for earlier grids; nothing of theirs is touched before it has sent a tile.
            nothing = uint64(0), uint64(0), float32(1.0)
            consume(base, thread, out, lse, scale, nothing, problem)

    return forward
