"""What functions of the user's do to the scores in a Hopper consumer's registers.

Which query and key an accumulator belongs to is said in `softmax_hopper`.  Indices that a function gets are
never beyond the arrays: rows and columns of padding get those of the last query and key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import device_function
from cuda_backend.attention.softmax_hopper import NO_KEY
from cuda_backend.attention.user_device import mask_on_device, score_on_device
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant
from cuda_backend.ptx import registers
from cuda_backend.ptx.assembly import types

__all__ = ["build_modifiers"]

int32, uint32, float32 = types.int32, types.uint32, types.float32


def build_modifiers(variant: FlexibleVariant) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return ``modify(s, scale, where)`` and ``mask(s, where)`` for a tile of scores, device functions.

    `where` is batch, head, this thread's two queries, its first key, how many keys there are, and `aux`.
    ``modify`` makes products into scores; ``mask`` makes scores -inf that the mask forbids, or that are those
    of no key.
    """
    count, ragged, masked = variant.tiles.block_n // 2, variant.ragged, variant.mods.mask is not None
    allows, changed = mask_on_device(variant.mods.mask), score_on_device(variant.mods.score)

    @device_function
    def modify(s: Any, scale: Any, where: Any) -> None:
        b, h, i_low, i_high, first, tk, aux = where
        for i in range(count // 4):
            for e in range(2):
                j = int32(first + 8 * i + e)
                if ragged:
                    j = min(j, int32(tk - 1))
                s[4 * i + e] = changed(s[4 * i + e] * scale, b, h, i_low, j, aux)
                s[4 * i + 2 + e] = changed(s[4 * i + 2 + e] * scale, b, h, i_high, j, aux)

    @device_function
    def mask(s: Any, where: Any) -> None:
        b, h, i_low, i_high, first, tk, aux = where
        low, high = uint32(0), uint32(0)
        step = int32(0)
        while step < count // 8:  # not unrolled, whatever the user's function is: a bit for each score
            four_low, four_high = uint32(0), uint32(0)
            for e in range(4):
                j = int32(first + 16 * step + 8 * (e // 2) + e % 2)
                inside = True
                if ragged:
                    inside = j < tk
                    j = min(j, int32(tk - 1))
                see_low, see_high = inside, inside
                if masked:
                    see_low = inside and allows(b, h, i_low, j, aux)
                    see_high = inside and allows(b, h, i_high, j, aux)
                four_low = uint32(four_low | uint32(see_low) << e)
                four_high = uint32(four_high | uint32(see_high) << e)
            low, high = uint32(low | four_low << (4 * step)), uint32(high | four_high << (4 * step))
            step = registers.successor(step)
        for i in range(count // 4):
            for e in range(2):
                bit = uint32(1 << (2 * i + e))
                s[4 * i + e] = s[4 * i + e] if low & bit else float32(NO_KEY)
                s[4 * i + 2 + e] = s[4 * i + 2 + e] if high & bit else float32(NO_KEY)

    return modify, mask
