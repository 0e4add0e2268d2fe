"""What functions of the user's do to the scores in a Hopper consumer's registers.

Which query and key an accumulator belongs to is said in `softmax_hopper`.  Indices that a function gets are
never beyond the arrays: rows and columns of padding get those of the last query and key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.mask_words import WORD_BYTES
from cuda_backend.attention.softmax_hopper import NO_KEY
from cuda_backend.attention.traced import is_short, traced_mask, traced_score
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import instruction, types

__all__ = ["build_modifiers"]

int32, uint32, uint64, float32 = types.int32, types.uint32, types.uint64, types.float32

rolled = instruction(
    "rolled",
    types.void,
    {},
    ".pragma \\22nounroll\\22;",  # quotes as LLVM writes them
    "",
    'At the start of a loop: it stays one.  PTX ISA, "Pragma Strings: nounroll".',
)


def build_modifiers(variant: FlexibleVariant) -> tuple[Callable[..., Any], ...]:
    """Return ``foresee(seen, masks, where)``, ``modify(s, scales, where)`` and ``mask(s, low, high, where)``.

    They are for a tile of scores.  `where` is batch, head, this thread's first query, the last of all, its
    first key, how many keys there are, and `aux`.
    ``foresee`` returns what the mask allows of a partial tile, whose `seen` is 0 or more, as bits `low` and
    `high` of both rows: read at `masks` (`mask_words`), or asked.  It needs no scores, so it runs beside
    their product, and its registers are free again before ``modify`` wants many.
    ``modify`` makes products into scores, or scores over the scale if the variant is `folded`; `scales` are
    the scale and 1 over it.  ``mask`` makes scores -inf that the mask forbids, or that are those of no key,
    by the bits; a short mask has none and is asked here, beside each score.
    """
    count, ragged, masked = variant.tiles.block_n // 2, variant.ragged, variant.mods.mask is not None
    mods = variant.mods
    columns = 2 if variant.tiles.consumers == 3 else 4  # of a row asked at once: where registers are few, 2
    allows = traced_mask(mods.mask, mods.aux)
    changed = traced_score(mods.score, mods.aux, variant.folded)

    @device_function
    def modify_four(i: Any, s: Any, scales: Any, where: Any) -> None:
        b, h, row, last, first, tk, aux = where
        i_low, i_high = min(row, last), min(int32(row + 8), last)
        # Floats go on behind the last query and key, whose scores are nobody's.
        x, y, low, high = float32(row), float32(first), float32(0.0), float32(8.0)
        for e in range(2):
            j = int32(first + 8 * i + e)
            c = float32(8 * i + e)
            if ragged:
                j = min(j, int32(tk - 1))
            s[4 * i + e] = changed(s[4 * i + e], scales, b, h, i_low, j, x, y, low, c, aux)
            s[4 * i + 2 + e] = changed(s[4 * i + 2 + e], scales, b, h, i_high, j, x, y, high, c, aux)

    modify_all = _repeated(modify_four, count // 4)

    @device_function
    def modify(s: Any, scales: Any, where: Any) -> None:
        modify_all(int32(0), s, scales, where)

    @device_function
    def pick(s: Any, low: Any, high: Any, _where: Any) -> None:
        for i in range(count // 4):
            for e in range(2):
                bit, none = uint32(1 << (2 * i + e)), float32(NO_KEY)
                s[4 * i + e] = registers.select_float(int32(low & bit), s[4 * i + e], none)
                s[4 * i + 2 + e] = registers.select_float(int32(high & bit), s[4 * i + 2 + e], none)

    @device_function
    def read(seen: Any, masks: Any, _where: Any) -> Any:
        bits = cuda.local.array(2, uint32)
        copy.load_8(bits, int32(0), masks + uint64(128 * WORD_BYTES) * uint64(max(seen, int32(0))))
        return bits[0], bits[1]

    @device_function
    def ask(seen: Any, _masks: Any, where: Any) -> Any:
        low, high = uint32(0), uint32(0)
        if seen < 0:
            return low, high
        b, h, row, last, first, tk, aux = where
        # What the user's function makes of these is not kept from one tile to the next.
        b, h, row = registers.fresh(b), registers.fresh(h), registers.fresh(row)
        i_low, i_high = min(row, last), min(int32(row + 8), last)
        step = int32(0)
        while step < count // (
            2 * columns
        ):  # whatever the user's function is, it stands here few times: bits for scores
            rolled()
            some_low, some_high = uint32(0), uint32(0)
            for e in range(columns):
                j = int32(first + 8 * (columns // 2 * step + e // 2) + e % 2)
                inside = True
                if ragged:
                    inside = j < tk
                    j = min(j, int32(tk - 1))
                see_low, see_high = inside, inside
                if masked:
                    see_low = inside & allows(b, h, i_low, j, aux)
                    see_high = inside & allows(b, h, i_high, j, aux)
                some_low = uint32(some_low | uint32(see_low) << e)
                some_high = uint32(some_high | uint32(see_high) << e)
            at = columns * step
            low, high = uint32(low | some_low << at), uint32(high | some_high << at)
            step = registers.successor(step)
        return low, high

    @device_function
    def foresee_nothing(_seen: Any, _masks: Any, _where: Any) -> Any:
        return uint32(0), uint32(0)

    @device_function
    def mask_four(i: Any, s: Any, _scale: Any, where: Any) -> None:
        b, h, row, last, first, tk, aux = where
        i_low, i_high, none = min(row, last), min(int32(row + 8), last), float32(NO_KEY)
        for e in range(2):
            j = int32(first + 8 * i + e)
            inside = True
            if ragged:
                inside = j < tk
                j = min(j, int32(tk - 1))
            low, high = (
                int32(inside & allows(b, h, i_low, j, aux)),
                int32(inside & allows(b, h, i_high, j, aux)),
            )
            s[4 * i + e] = registers.select_float(low, s[4 * i + e], none)
            s[4 * i + 2 + e] = registers.select_float(high, s[4 * i + 2 + e], none)

    mask_all = _repeated(mask_four, count // 4)

    @device_function
    def mask_at_once(s: Any, _low: Any, _high: Any, where: Any) -> None:
        mask_all(int32(0), s, float32(0.0), where)

    if variant.words:
        return read, modify, pick
    if masked and not is_short(mods.mask, mods.aux):
        return ask, modify, pick
    return foresee_nothing, modify, mask_at_once


def _repeated(function: Callable[..., None], count: int) -> Callable[..., None]:
    """Return what calls a device function for ``i``, ``i + 1`` and so on, `count` times, without a loop.

    A loop over the user's function may be too long for the compiler to unroll, and then scores, whose place
    depends on ``i``, are not in registers.
    """
    if count == 1:
        return function
    middle, odd = count // 2, count % 2 == 1
    half = _repeated(function, middle)

    @device_function
    def both(i: Any, s: Any, scale: Any, where: Any) -> None:
        half(i, s, scale, where)
        half(int32(i + middle), s, scale, where)
        if odd:
            function(int32(i + 2 * middle), s, scale, where)

    return both
