"""FlashAttention backward for Hopper, heads wider than 128: a TMA producer and two unlike wgmma consumers.

As `backward_hopper`, with tiles of 64 keys.  What is kept in registers over all queries is shared between the
warpgroups: one keeps dV, the other dK.  The first computes P and hands it to the second through shared memory
in float32, as it lies in registers; the second computes dS, for its dK and, rounded and in shared memory, for
dQ, of which each computes half the columns.  Nothing is computed twice.  One tile of P and one of dS are
enough: the first has multiplied dS before it hands over the next P, and the second had read that P before it
wrote dS.  dQ is added to global memory from registers, four float32 at a time.

Sources: Dao et al. 2022, arXiv:2205.14135, Algorithm 4; Dao 2023, arXiv:2307.08691, section 3.1.2; Shah et
al. 2024, arXiv:2407.08608, section 3.1 and Appendix B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.backward_hopper import SIGNATURE
from cuda_backend.attention.entry_hopper import build_entry, shared_base
from cuda_backend.attention.keys_wide_backward_hopper import build_keys_consumer
from cuda_backend.attention.producer_backward_hopper import build_backward_producer
from cuda_backend.attention.schedule_backward_hopper import build_backward_schedule
from cuda_backend.attention.values_wide_backward_hopper import build_values_consumer
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from cuda_backend.ptx import barrier, parameters, registers
from cuda_backend.ptx.assembly import types

__all__ = ["SIGNATURE", "build_wide_backward", "build_wide_start"]

int32, uint32 = types.int32, types.uint32


def build_wide_backward(variant: WideBackwardVariant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`, launched as `build_backward`'s."""
    schedule = build_backward_schedule(variant)
    enter, produce = build_entry(build_wide_start(variant)), build_backward_producer(variant, schedule)
    consume_values = build_values_consumer(variant, schedule)
    consume_keys = build_keys_consumer(variant, schedule)
    give_registers = registers.give_registers(variant.producer_registers)
    take_registers = registers.take_registers(variant.consumer_registers)

    def wide_backward(
        descriptor_block: Any, dk: Any, dv: Any, sums: Any, words: Any,
        counter: Any, seed: Any, threshold: Any, scale: Any, factor: Any, kept: Any,
        tiles: Any, per_head: Any, section: Any, heads: Any, all_heads: Any, group: Any,
        blocks: Any, tq: Any, tk: Any, offset: Any, k_columns: Any, v_columns: Any,
    ) -> None:  # fmt: skip
        descriptors = parameters.block_address(descriptor_block)
        problem = (
            tiles, per_head, section, heads, all_heads, group, blocks, tq, tk, offset, k_columns, v_columns
        )  # fmt: skip
        base, thread = shared_base(), int32(cuda.threadIdx.x)
        enter(base, thread)
        role = registers.uniform(thread >> 7)
        if role == 0:
            give_registers()
            # The producer waits for earlier grids; nothing of theirs is touched before it has sent a tile.
            if thread == 0:
                produce(base, descriptors, counter, problem)
        else:
            take_registers()
            if role == 1:
                consume_values(base, thread & 127, dv, sums, words, scale, (seed, threshold, kept), problem)
            else:
                consume_keys(base, thread & 127, dk, sums, words, factor, kept, problem)

    return wide_backward


def build_wide_start(variant: WideBackwardVariant) -> Callable[..., None]:
    """Return ``start(base)``, for one thread before all others: barriers, and how many arrive at them."""
    places, stages, one, both = variant.places, variant.stages, 4, 8  # warps of one consumer, and of both
    singles = (
        (places.k_full, 1, 1), (places.v_full, 1, 1), (places.kv_empty, 1, both),
        (places.q_full, stages, 1), (places.q_empty, stages, both),
        (places.do_full, stages, 1), (places.do_empty, stages, both),
        (places.ds_empty, 1, one),
    )  # fmt: skip
    barriers = tuple((at + 8 * i, arrivals) for at, count, arrivals in singles for i in range(count))

    @device_function
    def start(base: Any) -> None:
        for at, arrivals in barriers:
            barrier.initialise(base + at, arrivals)
        barrier.publish_initialisation()

    return start
