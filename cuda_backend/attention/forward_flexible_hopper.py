"""FlashAttention forward for Hopper with functions of the user's, over lists of key tiles.

The block is that of `forward_hopper`: one TMA producer warpgroup, two or three wgmma consumers, persistent.
Where the dense kernel counts down from the last key tile that a causal mask leaves, this one follows a list
of the tiles that a mask leaves, made beforehand.

Source: Dong et al. 2024, arXiv:2412.05496, section 4 (functions in the kernel, full and partial tiles).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda
from cuda_backend.attention.arguments import aux_signature
from cuda_backend.attention.consumer_flexible_hopper import build_flexible_consumer
from cuda_backend.attention.descriptors import DESCRIPTOR_BYTES
from cuda_backend.attention.entry_hopper import build_entry, shared_base
from cuda_backend.attention.producer_flexible_hopper import build_flexible_producer
from cuda_backend.attention.producer_hopper import build_start
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant
from cuda_backend.ptx import parameters, registers
from cuda_backend.ptx.assembly import types

__all__ = ["build", "signature"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32


def signature(variant: FlexibleVariant) -> Any:
    """Return the argument types of the kernel."""
    return types.void(
        parameters.block(3 * DESCRIPTOR_BYTES),  # of Q, K, V
        *[uint64] * 3,  # out; lse, or 0; the counter, two words that are 0 before and after
        *[uint64] * 3,  # the lists: work, steps, words of masks
        *[float32] * 2,  # scale, factor of the softmax
        *[int32] * 6,  # tiles, Hq, Hq / Hkv, Tq, Tk, Dv
        aux_signature(variant.mods),
    )


def build(variant: FlexibleVariant) -> Callable[..., None]:
    """Return the kernel of `variant`, to be compiled with its `signature`.

    It wants to be launched as `forward_hopper.build` says.
    """
    tiles = variant.tiles
    enter = build_entry(build_start(tiles))
    produce, consume = build_flexible_producer(variant), build_flexible_consumer(variant)
    give_registers = registers.give_registers(tiles.producer_registers)
    take_registers = registers.take_registers(tiles.consumer_registers)

    def flexible_forward(
        descriptor_block: Any,
        out: Any,
        lse: Any,
        counter: Any,
        work: Any,
        steps: Any,
        masks: Any,
        scale: Any,
        factor: Any,
        count: Any,
        heads: Any,
        group: Any,
        tq: Any,
        tk: Any,
        columns: Any,
        aux: Any,
    ) -> None:
        descriptors = parameters.block_address(descriptor_block)
        problem = (count, heads, group, tq, tk, columns)
        base, thread = shared_base(), int32(cuda.threadIdx.x)
        enter(base, thread)
        if registers.uniform(thread >> 7) == 0:
            give_registers()
            if thread == 0:
                produce(base, descriptors, counter, work, steps, problem)
        else:
            take_registers()
            # The producer waits for earlier grids; nothing of theirs is touched before it has sent a tile.
            consume(base, thread, out, lse, masks, scale, factor, aux, problem)

    return flexible_forward
