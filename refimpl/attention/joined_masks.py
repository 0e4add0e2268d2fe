"""Two masks of `flexible_attention` as one; `mods` has masks to be joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Mask", "both", "either"]

Mask: TypeAlias = Callable[..., Any]


def both(first: Mask, second: Mask) -> Mask:
    """What two masks allow together; those with arrays get the same `aux`.

    Parameters
    ----------
    first, second : Callable
        Masks.

    Returns
    -------
    Callable
        ``mask(b, h, i, j)``, or ``mask(b, h, i, j, aux)`` if one of them takes arrays.

    Examples
    --------
    >>> from refimpl.attention import mods
    >>> [both(mods.causal, mods.sliding(1))(0, 0, 2, j) for j in range(4)]
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

    Parameters
    ----------
    first, second : Callable
        Masks.

    Returns
    -------
    Callable
        ``mask(b, h, i, j)``, or ``mask(b, h, i, j, aux)`` if one of them takes arrays.

    Examples
    --------
    >>> from refimpl.attention import mods
    >>> [either(mods.sliding(0), mods.global_tokens(1))(0, 0, 3, j) for j in range(4)]
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
