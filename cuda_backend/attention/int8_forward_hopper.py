"""Attention in int8 for Hopper: the schedule of `forward_hopper`, Q Kᵀ of codes by wgmma, P V as there.

A row of codes is 128 bytes, so tiles of Q and K are to the producer those of heads of 64 in 16 bits, half of
what heads of 128 take.  A warpgroup's 64 queries share a scale, and so do the 128 keys of a tile.

Sources: Zhang et al. 2024, arXiv:2410.02367, Algorithm 1; Shah et al. 2024, arXiv:2407.08608, Algorithms 1
and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.entry_hopper import build_entry, shared_base
from cuda_backend.attention.int8_consumer_hopper import build_consumer
from cuda_backend.attention.producer_hopper import build_producer, build_start
from cuda_backend.attention.schedule_hopper import build_schedule
from cuda_backend.attention.variant_hopper import SUBTILE, Variant
from cuda_backend.ptx import parameters, registers
from cuda_backend.ptx.assembly import types

__all__ = ["KEYS", "QUERIES", "SIGNATURE", "WIDEST", "build", "choose"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

QUERIES, KEYS = 64, 128  # that share a scale: rows of a warpgroup, and of a key tile
WIDEST = 128  # head: a row of codes

SIGNATURE = types.void(
    parameters.block(3 * DESCRIPTOR_BYTES),  # of codes of Q and K, of V
    *[uint64] * 4,  # out; scales of Q and of K; the counter, two words that are 0 before and after
    float32,  # scale * log2(e), positive
    *[int32] * 5,  # tiles, tiles of a head, heads of a section, Hq, B * Hq
    *[int32] * 5,  # Hq / Hkv, Tq, Tk, offset of the causal diagonal, Dv
    *[int32] * 2,  # scales of a head of Q, and of K
)


def choose(kind: str, value_width: int, causal: bool) -> Variant:
    """Return the variant for heads of values of up to 128, `kind` "f16" or "bf16".

    >>> variant = choose("f16", 128, True)
    >>> variant.block_m, variant.block_n, variant.k_bytes, variant.shared_bytes
    (128, 128, 16384, 181504)
    """
    d_v = -(-value_width // SUBTILE) * SUBTILE
    return Variant(kind, SUBTILE, d_v, causal, consumers=2, block_n=KEYS, stages=3, q_stages=2)


def build(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE` and launched as `forward_hopper`'s."""
    schedule = build_schedule(variant)
    enter, produce = build_entry(build_start(variant)), build_producer(variant, schedule)
    consume = build_consumer(variant, schedule)
    give_registers = registers.give_registers(variant.producer_registers)
    take_registers = registers.take_registers(variant.consumer_registers)

    def int8_forward(
        descriptor_block: Any,
        out: Any,
        q_scales: Any,
        k_scales: Any,
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
        q_blocks: Any,
        k_blocks: Any,
    ) -> None:
        descriptors = parameters.block_address(descriptor_block)
        problem = (tiles, per_head, section, heads, all_heads, group, tq, tk, offset, columns)
        scales = (q_scales, k_scales, q_blocks, k_blocks)
        base, thread = shared_base(), int32(cuda.threadIdx.x)
        enter(base, thread)
        if registers.uniform(thread >> 7) == 0:
            give_registers()
            if thread == 0:
                produce(base, descriptors, counter, problem)
        else:
            take_registers()
            consume(base, thread, out, scales, scale, problem)

    return int8_forward
