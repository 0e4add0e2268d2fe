"""FlashAttention backward for Hopper: a TMA producer, a thread that adds dQ, two wgmma consumers.

The algorithm is refimpl's `flash_attention_vjp` with keys in the outer loop.  A block is persistent: its
producer finds tiles of 128 keys of a key head, and streams Q and dO of all query heads that share it through
shared memory; each consumer owns 64 keys, keeps P, dS, dK and dV in registers, and computes its part of dQ
from dS in shared memory.  dQ is summed in float32 in global memory by the copy engine, in any order or, with
the
deterministic option, in turn.  `around_backward_hopper` has the kernels before and after this one.

Sources: Dao et al. 2022, arXiv:2205.14135, Algorithm 4; Dao 2023, arXiv:2307.08691, section 3.1.2 (the
log-sum-exp alone is enough); Shah et al. 2024, arXiv:2407.08608, section 3.1 and Appendix B (producer and
consumers, and for the backward pass a warp that adds dQ).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda
from cuda_backend.attention.consumer_backward_hopper import build_backward_consumer
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.entry_hopper import build_entry, shared_base
from cuda_backend.attention.producer_backward_hopper import build_backward_producer, build_start, build_writer
from cuda_backend.attention.schedule_backward_hopper import build_backward_schedule
from cuda_backend.attention.variant_backward_hopper import DESCRIPTORS, BackwardVariant
from cuda_backend.ptx import parameters, registers
from cuda_backend.ptx.assembly import types

__all__ = ["SIGNATURE", "build_backward"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

SIGNATURE = types.void(
    parameters.block(DESCRIPTORS * DESCRIPTOR_BYTES),  # of Q, K, V, dO, shifts, deltas
    *[uint64] * 2,  # dK, dV
    *[uint64] * 2,  # sums of dQ, words of the turns: see `around_backward_hopper`
    uint64,  # the counter, two words that are 0 before and after
    *[uint64] * 2,  # seed of the dropout; what its words are at least where a weight is kept
    *[float32] * 3,  # scale * log2(e), positive; scale; factor of what dropout keeps
    *[int32] * 6,  # tiles, key blocks of a head, heads of a section or spacing, Hkv, B * Hkv, Hq / Hkv
    *[int32] * 6,  # query blocks of a head, Tq, Tk, offset of the causal diagonal, D, Dv: of 8 at least
)  # fmt: skip


def build_backward(variant: BackwardVariant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with `SIGNATURE`.

    It wants ``variant.threads`` threads, declared as launch bound with one block, ``variant.shared_bytes`` of
    dynamic shared memory, and at most as many blocks as run at once, none without a tile.
    """
    schedule = build_backward_schedule(variant)
    enter, produce = build_entry(build_start(variant)), build_backward_producer(variant, schedule)
    write, consume = build_writer(variant, schedule), build_backward_consumer(variant, schedule)
    give_registers = registers.give_registers(variant.producer_registers)
    take_registers = registers.take_registers(variant.consumer_registers)

    def backward(
        descriptor_block: Any,
        dk: Any,
        dv: Any,
        sums: Any,
        words: Any,
        counter: Any,
        seed: Any,
        threshold: Any,
        scale: Any,
        factor: Any,
        kept: Any,
        tiles: Any,
        per_head: Any,
        section: Any,
        heads: Any,
        all_heads: Any,
        group: Any,
        blocks: Any,
        tq: Any,
        tk: Any,
        offset: Any,
        k_columns: Any,
        v_columns: Any,
    ) -> None:
        descriptors = parameters.block_address(descriptor_block)
        problem = (
            tiles, per_head, section, heads, all_heads, group, blocks, tq, tk, offset, k_columns, v_columns
        )  # fmt: skip
        base, thread = shared_base(), int32(cuda.threadIdx.x)
        enter(base, thread)
        if registers.uniform(thread >> 7) == 0:
            give_registers()
            # The producer waits for earlier grids; nothing of theirs is touched before it has sent a tile.
            if thread == 0:
                produce(base, descriptors, counter, problem)
            elif thread == 32:
                write(base, sums, words, problem)
        else:
            take_registers()
            consume(base, thread, dk, dv, scale, factor, (seed, threshold, kept), problem, ())

    return backward
