"""Functions of the user's in the registers of a Hopper backward consumer: mask, score, its gradient.

Scores are turned: accumulator ``4 n + e`` of a thread is of query ``first + 8 n + e % 2`` and of key
``key + 8 (e // 2)``.  With S' = q·k and s = factor S'::

    P = exp2(log2(e) score_mod(s) + shift)     dS = P (dP - delta) score_mod_vjp(1, s)

A gradient is linear in what it is asked for, so it is asked once, for 1, when s is there, and goes into P: s
would need registers until dP arrives, and there are none.  P itself, rounded for dV, waits where dS will lie.

Source: Dong et al. 2024, arXiv:2412.05496, sections 3 and 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

from cuda_backend._numba import cuda, device_function
from cuda_backend.attention.user_device import mask_on_device, score_on_device
from cuda_backend.attention.variant_backward_hopper import BackwardVariant
from cuda_backend.ptx import copy, registers
from cuda_backend.ptx.assembly import types
from refimpl.attention.user_functions import Mod

__all__ = ["LOG2_E", "build_mods", "is_parked"]

int32, uint32, float32 = types.int32, types.uint32, types.float32

LOG2_E = math.log2(math.e)
MASKED = float("-inf")
TOGETHER = 4  # columns whose mask is asked for at a time


class _Unknown:
    """An argument of which nothing can be known: a function that asks anything of it fails."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("unknown")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse


def is_parked(variant: BackwardVariant) -> bool:
    """Return whether P waits in shared memory: whether there is a gradient that does not just pass.

    >>> from refimpl.attention import mods
    >>> from refimpl.attention.user_functions import as_mod
    >>> passes(as_mod("score_mod_vjp", mods.alibi_vjp, ("gradient", "score")))
    True
    >>> passes(as_mod("score_mod_vjp", mods.softcap_vjp(2.0), ("gradient", "score")))
    False
    """
    return variant.mods is not None and variant.mods.score is not None and not passes(variant.mods.vjp)


def passes(vjp: Mod | None) -> bool:
    """Return whether a gradient is the one that comes in, whatever the other arguments are."""
    if vjp is None:
        return True
    gradient, others = _Unknown(), [_Unknown()] * 5
    try:
        return vjp.function(gradient, *others, *[_Unknown()] * vjp.takes_aux) is gradient
    except Exception:
        return False


def build_mods(variant: BackwardVariant) -> tuple[Any, ...]:
    """Return device functions, and whether two of them are called.

    `where` is the batch, the query head, the thread's first query and first key, how many there are of both,
    and the user's arrays:

    * ``allow(s, where)`` makes scores -inf where the mask says no, and behind the last query and key;
    * ``modify(s, factor, shifts, place, where)`` makes S' into score_mod(s), and keeps -inf;
    * ``weigh(s, factor, shifts, place, where)`` makes S' into P score_mod_vjp(1, s), and lays P at `place`;
    * ``fetch(p, place)`` takes it from there: 16 bytes of the lane's, and more each 2048 bytes;
    * whether there is a score function, and whether `weigh` is called for it in place of `modify`.
    """
    mods = variant.mods
    if mods is None:
        nothing = device_function(lambda *_: None)
        return nothing, nothing, nothing, nothing, False, False
    allows = mask_on_device(mods.mask)
    change, pull = score_on_device(mods.score), score_on_device(mods.vjp, 2)
    count = variant.block_m // 2
    pack_pair = registers.pack_pair(variant.kind)

    @device_function
    def allow(s: Any, where: Any) -> None:
        batch, head, first, key, tq, tk, aux = where
        j_low, j_high = int32(min(key, int32(tk - 1))), int32(min(key + 8, int32(tk - 1)))
        low, high = uint32(0), uint32(0)
        start = int32(0)
        # A loop, not unrolled: the functions of all scores at once would want more registers than there are.
        while start < count // 2:
            for at in range(TOGETHER):
                column = int32(start + at)
                i = int32(first + 8 * (column >> 1) + (column & 1))
                i_inside = int32(min(i, int32(tq - 1)))
                see = int32(i < tq)
                see_low = int32(allows(batch, head, i_inside, j_low, aux)) & int32(key < tk) & see
                see_high = int32(allows(batch, head, i_inside, j_high, aux)) & int32(key + 8 < tk) & see
                low = uint32(low | uint32(uint32(see_low) << uint32(column)))
                high = uint32(high | uint32(uint32(see_high) << uint32(column)))
            start = int32(registers.successor(start) + (TOGETHER - 1))
        for n in range(count // 4):
            for e in range(2):
                at = 4 * n + e
                bit = uint32(1 << (2 * n + e))
                s[at] = registers.select_float(int32(low & bit), s[at], float32(MASKED))
                s[at + 2] = registers.select_float(int32(high & bit), s[at + 2], float32(MASKED))

    @device_function
    def change_one(s: Any, factor: Any, n: Any, e: Any, where: Any) -> Any:
        batch, head, first, key, tq, tk, aux = where
        i, j = int32(first + 8 * n + e % 2), int32(key + 8 * (e // 2))
        i, j = int32(min(i, int32(tq - 1))), int32(min(j, int32(tk - 1)))
        found = change(s * factor, batch, head, i, j, aux)
        return registers.select_float(int32(s == float32(MASKED)), s, found)

    @device_function
    def weigh_one(s: Any, factor: Any, shift: Any, n: Any, e: Any, where: Any) -> Any:
        """Return P, and P times the derivative."""
        batch, head, first, key, tq, tk, aux = where
        i, j = int32(first + 8 * n + e % 2), int32(key + 8 * (e // 2))
        i, j = int32(min(i, int32(tq - 1))), int32(min(j, int32(tk - 1)))
        found = change(s * factor, batch, head, i, j, aux)
        x = registers.select_float(int32(s == float32(MASKED)), s, found)
        p = registers.exp2(registers.fused_multiply_add(x, float32(LOG2_E), shift))
        slope = pull(float32(1.0), s * factor, batch, head, i, j, aux)
        # Where a score is masked its gradient may be no number.
        return p, registers.select_float(int32(p > float32(0.0)), p * slope, float32(0.0))

    def modify_columns(n: int) -> Any:
        @device_function
        def step(s: Any, factor: Any, _shifts: Any, _place: Any, where: Any) -> None:
            for e in range(4):
                s[4 * n + e] = change_one(s[4 * n + e], factor, n, e, where)

        return step

    def weigh_columns(n: int) -> Any:
        """Of two blocks of eight columns, whose words of P lie together."""

        @device_function
        def step(s: Any, factor: Any, shifts: Any, place: Any, where: Any) -> None:
            pair = cuda.local.array(2, float32)
            words = cuda.local.array(4, uint32)
            for half in range(2):
                at = 8 * n + 4 * half
                copy.load_shared_8(pair, int32(0), shifts + 32 * (2 * n + half))
                p0, s[at] = weigh_one(s[at], factor, pair[0], 2 * n + half, 0, where)
                p1, s[at + 1] = weigh_one(s[at + 1], factor, pair[1], 2 * n + half, 1, where)
                words[2 * half] = pack_pair(p0, p1)
                p0, s[at + 2] = weigh_one(s[at + 2], factor, pair[0], 2 * n + half, 2, where)
                p1, s[at + 3] = weigh_one(s[at + 3], factor, pair[1], 2 * n + half, 3, where)
                words[2 * half + 1] = pack_pair(p0, p1)
            copy.store_shared_words(place + 2048 * n, words[0], words[1], words[2], words[3])

        return step

    @device_function
    def fetch(p: Any, place: Any) -> None:
        for n in range(count // 8):
            copy.load_shared_16(p, int32(4 * n), place + 2048 * n)

    modify, weigh = in_turn(modify_columns, count // 4), in_turn(weigh_columns, count // 8)
    modified = mods.score is not None
    return allow, modify, weigh, fetch, modified, modified and is_parked(variant)


def in_turn(make: Callable[[int], Any], count: int, first: int = 0) -> Any:
    """Return the device function that calls ``make(n)`` for all n: a loop that no compiler keeps as one.

    A loop whose body is long stays a loop, and an array that it indexes stays in memory.
    """
    if count == 1:
        return make(first)
    half = count // 2
    one, two = in_turn(make, half, first), in_turn(make, count - half, first + half)

    @device_function
    def both(s: Any, factor: Any, shifts: Any, place: Any, where: Any) -> None:
        one(s, factor, shifts, place, where)
        two(s, factor, shifts, place, where)

    return both
