"""Ready-made masks and scores: the patterns of this family as functions of one score.

Each is a function, or makes one, for `flexible_attention`: ``mask_mod(b, h, i, j)`` or
``score_mod(score, b, h, i, j, aux)``, with its ``_vjp``.  They are written as a user would write them; those
with arrays take them from `aux`, from index `slot` on, so that new arrays need no new kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from refimpl.errors import OptionError
from refimpl.validation import positive, whole

__all__ = [
    "Mask",
    "Score",
    "alibi",
    "alibi_vjp",
    "bigbird",
    "both",
    "causal",
    "dilated",
    "documents",
    "either",
    "given",
    "global_tokens",
    "prefix_lm",
    "ranges",
    "shifted_groups",
    "sliding",
    "softcap",
    "softcap_vjp",
]

Mask: TypeAlias = Callable[..., Any]
Score: TypeAlias = Callable[..., Any]


def causal(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Keys up to the query's own place."""
    return j <= i


def documents(slot: int = 0) -> Mask:
    """Keys of the query's own document; ``aux[slot]`` [B, T] numbers the document of each token."""

    def mask(b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
        return aux[slot][b, i] == aux[slot][b, j]

    return mask


def sliding(radius: int) -> Mask:
    """Keys at most `radius` places away, as `sliding_window_attention`.

    Parameters
    ----------
    radius : int
        Places on each side.

    Raises
    ------
    DTypeError, OptionError
        If it is no whole number, or negative.

    Examples
    --------
    >>> sliding(1)(0, 0, 2, 3), sliding(1)(0, 0, 2, 4)
    (True, False)
    """
    whole("radius", radius, 0)

    def mask(_b: Any, _h: Any, i: Any, j: Any) -> Any:
        return abs(i - j) <= radius

    return mask


def dilated(radius: int, dilation: int) -> Mask:
    """Every `dilation`-th key, `radius` of them on each side, as `dilated_window_attention`.

    Parameters
    ----------
    radius : int
        Keys on each side.
    dilation : int
        Places from one to the next.

    Raises
    ------
    DTypeError, OptionError
        If `radius` is no whole number from 0 on, or `dilation` none from 1 on.

    Examples
    --------
    >>> [j for j in range(9) if dilated(1, 3)(0, 0, 4, j)]
    [1, 4, 7]
    """
    whole("radius", radius, 0)
    whole("dilation", dilation)
    reach = radius * dilation

    def mask(_b: Any, _h: Any, i: Any, j: Any) -> Any:
        return (abs(i - j) <= reach) & (abs(i - j) % dilation == 0)

    return mask


def global_tokens(count: int) -> Mask:
    """The first `count` tokens see all and are seen by all; `either` joins it to a window.

    Parameters
    ----------
    count : int
        How many tokens.

    Raises
    ------
    DTypeError, OptionError
        If it is no whole number, or negative.

    Examples
    --------
    >>> [global_tokens(1)(0, 0, i, j) for i, j in ((0, 5), (5, 0), (5, 4))]
    [True, True, False]
    """
    whole("count", count, 0)

    def mask(_b: Any, _h: Any, i: Any, j: Any) -> Any:
        return (i < count) | (j < count)

    return mask


def bigbird(block_size: int, slot: int = 0) -> Mask:
    """Blocks of `block_size` tokens see the blocks that ``aux[slot]`` [Hq, blocks, blocks] says, bool.

    `refimpl.attention.bigbird_plan.bigbird_block_mask` makes it of a plan: window, global and random blocks.

    Parameters
    ----------
    block_size : int
        Tokens of a block.
    slot : int
        Where in `aux` the array is.

    Raises
    ------
    DTypeError, OptionError
        If `block_size` is no whole number from 1 on.
    """
    whole("block_size", block_size)

    def mask(_b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        return aux[slot][h, i // block_size, j // block_size]

    return mask


def shifted_groups(group_size: int, heads: int, length: int) -> Mask:
    """Groups of tokens, rolled by half a group for the second half of `heads`: `shifted_groups_attention`.

    Parameters
    ----------
    group_size : int
        Tokens of a group: even, a divisor of `length`.
    heads : int
        Hq, the heads of the query.
    length : int
        T, the tokens of a sequence.

    Raises
    ------
    DTypeError, OptionError
        If one is no whole number in its range, or groups do not fit.

    Examples
    --------
    >>> [shifted_groups(4, 2, 8)(0, h, 3, 4) for h in (0, 1)]
    [False, True]
    """
    if whole("group_size", group_size) % 2 or whole("length", length, 0) % group_size:
        raise OptionError(f"group_size: expected an even divisor of {length}, got {group_size}")
    middle, half = whole("heads", heads) // 2, group_size // 2

    def mask(_b: Any, h: Any, i: Any, j: Any) -> Any:
        shift = half * (h >= middle)
        return (i + shift) % length // group_size == (j + shift) % length // group_size

    return mask


def prefix_lm(prefix: int) -> Mask:
    """The first `prefix` keys are seen by all, the others causally.

    Parameters
    ----------
    prefix : int
        How many keys.

    Raises
    ------
    DTypeError, OptionError
        If it is no whole number, or negative.

    Examples
    --------
    >>> [prefix_lm(2)(0, 0, 0, j) for j in range(3)]
    [True, True, False]
    """
    whole("prefix", prefix, 0)

    def mask(_b: Any, _h: Any, i: Any, j: Any) -> Any:
        return (j < prefix) | (j <= i)

    return mask


def ranges(slot: int = 0) -> Mask:
    """Keys from ``aux[slot][i]`` up to, and without, ``aux[slot + 1][i]``, as `varlen_attention` packs them.

    >>> [ranges()(0, 0, 0, j, ([1], [3])) for j in range(4)]
    [False, True, True, False]
    """

    def mask(_b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
        return (aux[slot][i] <= j) & (j < aux[slot + 1][i])

    return mask


def given(by_sequence: bool = True, by_head: bool = True, slot: int = 0) -> Mask:
    """What an array of truth values allows, ``aux[slot]`` [B or 1, Hq or 1, Tq, Tk].

    Parameters
    ----------
    by_sequence, by_head : bool
        Whether the array differs between sequences, and between heads.  Its first entry is for all else.
    slot : int
        Where in `aux` the array is.

    Examples
    --------
    >>> import numpy as np
    >>> [given(False, False)(3, 5, 1, j, (np.eye(2, dtype=bool)[None, None],)) for j in range(2)]
    [np.False_, np.True_]
    """

    def everywhere(b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        return aux[slot][b, h, i, j]

    def of_heads(_b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        return aux[slot][0, h, i, j]

    def of_sequences(b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
        return aux[slot][b, 0, i, j]

    def of_all(_b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
        return aux[slot][0, 0, i, j]

    if by_sequence:
        return everywhere if by_head else of_sequences
    return of_heads if by_head else of_all


def both(first: Mask, second: Mask) -> Mask:
    """What two masks allow together; those with arrays get the same `aux`.

    >>> [both(causal, sliding(1))(0, 0, 2, j) for j in range(4)]
    [False, True, True, False]
    """
    if not (_takes_aux(first) or _takes_aux(second)):

        def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
            return first(b, h, i, j) & second(b, h, i, j)

        return _made_of(mask, first, second)
    one, other = _with_aux(first), _with_aux(second)

    def mask_of_arrays(b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        return one(b, h, i, j, aux) & other(b, h, i, j, aux)

    return _made_of(mask_of_arrays, first, second)


def either(first: Mask, second: Mask) -> Mask:
    """What one of two masks allows; those with arrays get the same `aux`.

    >>> [either(sliding(0), global_tokens(1))(0, 0, 3, j) for j in range(4)]
    [True, False, False, True]
    """
    if not (_takes_aux(first) or _takes_aux(second)):

        def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
            return first(b, h, i, j) | second(b, h, i, j)

        return _made_of(mask, first, second)
    one, other = _with_aux(first), _with_aux(second)

    def mask_of_arrays(b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        return one(b, h, i, j, aux) | other(b, h, i, j, aux)

    return _made_of(mask_of_arrays, first, second)


def _takes_aux(mask: Any) -> bool:
    return int(mask.__code__.co_argcount) == 5


def _with_aux(mask: Mask) -> Mask:
    """Return the same mask with an argument for arrays."""
    if _takes_aux(mask):
        return mask

    def ignoring(b: Any, h: Any, i: Any, j: Any, _aux: Any) -> Any:
        return mask(b, h, i, j)

    return ignoring


def _made_of(mask: Any, *parts: Mask) -> Mask:
    """Return `mask`, which reads what its parts read: alike for all heads, if they are."""
    mask.parts = parts
    return mask  # type: ignore[no-any-return]


def alibi(slot: int = 0) -> Score:
    """Less by the slope of the head, ``aux[slot]`` [Hq], for each place between query and key.

    >>> import numpy as np
    >>> float(alibi()(1.0, 0, 0, 5, 3, (np.array([0.25]),)))
    0.5
    """

    def score_mod(score: Any, _b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        return score - aux[slot][h] * abs(i - j)

    return score_mod


def alibi_vjp(gradient: Any, _score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
    """A term beside the score lets its gradient pass."""
    return gradient


def softcap(cap: float) -> Score:
    """``cap tanh(score / cap)``.

    Parameters
    ----------
    cap : float
        Above 0: no score leaves its size.

    Raises
    ------
    DTypeError, OptionError
        If it is no number above 0.

    Examples
    --------
    >>> round(softcap(2.0)(2.0, 0, 0, 0, 0), 4)
    1.5232
    """
    number = positive("cap", cap)

    def score_mod(score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
        return number * math.tanh(score / number)

    return score_mod


def softcap_vjp(cap: float) -> Score:
    """Return the gradient of `softcap`: ``1 - tanh²`` of it, `cap` as there.

    >>> float(softcap_vjp(2.0)(1.0, 0.0, 0, 0, 0, 0))
    1.0
    """
    number = positive("cap", cap)

    def score_mod_vjp(gradient: Any, score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
        bent = math.tanh(score / number)
        return gradient * (1 - bent * bent)

    return score_mod_vjp
