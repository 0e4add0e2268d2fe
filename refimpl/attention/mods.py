"""Ready-made masks and scores: the patterns of this family as functions of one score.

Each is a function, or makes one, for `flexible_attention`: ``mask_mod(b, h, i, j)`` or
``score_mod(score, b, h, i, j, aux)``, with its ``_vjp``.  They are written as a user would write them; those
with arrays take them from `aux`, from index `slot` on, so that new arrays need no new kernel.  What joins two
masks is in `joined_masks`, scores are in `score_mods`; all are to be had here.
"""

from __future__ import annotations

from typing import Any

from refimpl.attention.joined_masks import Mask, both, either
from refimpl.attention.score_mods import Score, alibi, alibi_vjp, softcap, softcap_vjp
from refimpl.errors import OptionError
from refimpl.validation import whole

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


def causal(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Keys up to the query's own place.

    Parameters
    ----------
    _b, _h
        Sequence and head, which do not matter.
    i, j
        Places of query and key.

    Returns
    -------
    bool
        Whether the key is seen; of arrays of places an array.

    Examples
    --------
    >>> [causal(0, 0, 1, j) for j in range(3)]
    [True, True, False]
    """
    return j <= i


def documents(slot: int = 0) -> Mask:
    """Keys of the query's own document; ``aux[slot]`` [B, T] numbers the document of each token.

    Parameters
    ----------
    slot : int
        Where in `aux` the array is.

    Returns
    -------
    Callable
        ``mask(b, h, i, j, aux)``.

    Examples
    --------
    >>> import numpy as np
    >>> [bool(documents()(0, 0, 1, j, (np.array([[0, 1, 1]]),))) for j in range(3)]
    [False, True, True]
    """

    def mask(b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
        return aux[slot][b, i] == aux[slot][b, j]

    return mask


def sliding(radius: int) -> Mask:
    """Keys at most `radius` places away, as `sliding_window_attention`.

    Parameters
    ----------
    radius : int
        Places on each side.

    Returns
    -------
    Callable
        ``mask(b, h, i, j)``.

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

    Returns
    -------
    Callable
        ``mask(b, h, i, j)``.

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

    Returns
    -------
    Callable
        ``mask(b, h, i, j)``.

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

    Returns
    -------
    Callable
        ``mask(b, h, i, j, aux)``.

    Raises
    ------
    DTypeError, OptionError
        If `block_size` is no whole number from 1 on.

    Examples
    --------
    >>> import numpy as np
    >>> [bool(bigbird(2)(0, 0, 3, j, (np.eye(2, dtype=bool)[None],))) for j in range(4)]
    [False, False, True, True]
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

    Returns
    -------
    Callable
        ``mask(b, h, i, j)``.

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

    Returns
    -------
    Callable
        ``mask(b, h, i, j)``.

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

    Parameters
    ----------
    slot : int
        Where in `aux` the first array is.

    Returns
    -------
    Callable
        ``mask(b, h, i, j, aux)``.

    Examples
    --------
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

    Returns
    -------
    Callable
        ``mask(b, h, i, j, aux)``.

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
