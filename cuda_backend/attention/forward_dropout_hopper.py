"""FlashAttention forward for Hopper with dropout: the kernel of `forward_hopper`, and three arguments more.

Weights are dropped behind the sums of the softmax, so that the log-sum-exp is that of all weights; the
output is multiplied by the factor of what is kept.  The words are those of `refimpl.random.dropout_keep`: the
backward kernels and the reference drop the same weights.

Source: Dao et al. 2022, arXiv:2205.14135, appendix B.4, Algorithm 2, lines 14 and 15.
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

__all__ = ["SIGNATURE", "build_dropout"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    parameters.block(3 * DESCRIPTOR_BYTES),  # of Q, K, V
    *[uint64] * 3,  # out; lse, or 0; the counter, two words that are 0 before and after
    *[uint64] * 2,  # seed of the dropout; what its words are at least where a weight is kept
    *[float32] * 2,  # scale * log2(e), positive; factor of what dropout keeps
    *[int32] * 5,  # tiles, tiles of a head, heads of a section, Hq, B * Hq
    *[int32] * 5,  # Hq / Hkv, Tq, Tk, offset of the causal diagonal, Dv
)


def build_dropout(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`, launched as `forward_hopper`'s."""
    schedule = build_schedule(variant)
    enter, produce = build_entry(build_start(variant)), build_producer(variant, schedule)
    consume = build_consumer(variant, schedule)
    give_registers = registers.give_registers(variant.producer_registers)
    take_registers = registers.take_registers(variant.consumer_registers)

    def forward_dropout(
        descriptor_block: Any, out: Any, lse: Any, counter: Any, seed: Any, threshold: Any,
        scale: Any, kept: Any, tiles: Any, per_head: Any, section: Any, heads: Any, all_heads: Any,
        group: Any, tq: Any, tk: Any, offset: Any, columns: Any,
    ) -> None:  # fmt: skip
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
            consume(base, thread, out, lse, scale, (seed, threshold, kept), problem)

    return forward_dropout
