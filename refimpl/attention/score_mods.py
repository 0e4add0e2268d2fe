"""Ready-made scores for `flexible_attention`, each with its gradient; `mods` has the masks.

A score is ``score_mod(score, b, h, i, j)`` or, with arrays, ``score_mod(score, b, h, i, j, aux)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from refimpl.validation import positive

__all__ = ["Score", "alibi", "alibi_vjp", "softcap", "softcap_vjp"]

Score: TypeAlias = Callable[..., Any]


def alibi(slot: int = 0) -> Score:
    """Less by the slope of the head, ``aux[slot]`` [Hq], for each place between query and key.

    Parameters
    ----------
    slot : int
        Where in `aux` the array is.

    Returns
    -------
    Callable
        ``score_mod(score, b, h, i, j, aux)``; `alibi_vjp` is its gradient.

    Examples
    --------
    >>> import numpy as np
    >>> float(alibi()(1.0, 0, 0, 5, 3, (np.array([0.25]),)))
    0.5
    """

    def score_mod(score: Any, _b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
        return score - aux[slot][h] * abs(i - j)

    return score_mod


def alibi_vjp(gradient: Any, _score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
    """Return the gradient of `alibi`, which a term beside the score lets pass.

    Parameters
    ----------
    gradient
        That of the changed score.
    _score, _b, _h, _i, _j
        Score and place, which do not matter.

    Returns
    -------
    float
        `gradient`.

    Examples
    --------
    >>> alibi_vjp(0.5, 1.0, 0, 0, 5, 3)
    0.5
    """
    return gradient


def softcap(cap: float) -> Score:
    """``cap tanh(score / cap)``.

    Parameters
    ----------
    cap : float
        Above 0: no score leaves its size.

    Returns
    -------
    Callable
        ``score_mod(score, b, h, i, j)``; `softcap_vjp` makes its gradient.

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
    """Return the gradient of `softcap`: ``1 - tanh²`` of it.

    Parameters
    ----------
    cap : float
        As of `softcap`.

    Returns
    -------
    Callable
        ``score_mod_vjp(gradient, score, b, h, i, j)``.

    Raises
    ------
    DTypeError, OptionError
        If it is no number above 0.

    Examples
    --------
    >>> float(softcap_vjp(2.0)(1.0, 0.0, 0, 0, 0, 0))
    1.0
    """
    number = positive("cap", cap)

    def score_mod_vjp(gradient: Any, score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
        bent = math.tanh(score / number)
        return gradient * (1 - bent * bent)

    return score_mod_vjp
