"""Floating-point operations of attention: one multiply-add is two.

>>> attention_flops(Tq=1024, D=64, H=16, B=64, direction="both").total
824633720832
"""

from __future__ import annotations

from typing import Literal

from memsim.estimate import Estimate, estimate, term
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError

__all__ = ["attended_pairs", "attention_flops", "softmax_flops"]

_SOURCES = {
    "standard": "arXiv:2205.14135, Algorithms 0 and 3",
    "flash": "arXiv:2205.14135, Algorithms 1 and 4",
}
# (name, head dimension in it): forward S = QK^T, O = PV; backward dV = P^T dO, dP = dO V^T, dQ = dS K and
# dK = dS^T Q; FlashAttention computes S once more.
_MATMULS = {
    "forward": (("QK^T", "D"), ("PV", "D_v")),
    "backward": (("P^T dO", "D_v"), ("dO V^T", "D_v"), ("dS K", "D"), ("dS^T Q", "D")),
}


def attended_pairs(Tq: int, Tk: int, causal: bool | Literal["top_left", "bottom_right"] = False) -> int:
    """Return how many (query, key) pairs a mask lets through.

    Parameters
    ----------
    Tq, Tk : int
        Query and key length.
    causal : {False, True, "top_left", "bottom_right"}
        Key j is attended by query i iff j <= i ("top_left") or j <= i + Tk - Tq ("bottom_right"); True says
        that both are the same, ``Tq == Tk``.

    Returns
    -------
    int

    Raises
    ------
    OptionError
        If a length is negative, `causal` is unknown, or True although ``Tq != Tk``.

    Examples
    --------
    >>> attended_pairs(2, 3), attended_pairs(2, 3, "top_left"), attended_pairs(2, 3, "bottom_right")
    (6, 3, 5)
    """
    if min(Tq, Tk) < 0:
        raise OptionError(f"Tq, Tk: expected lengths of at least 0; got {Tq} and {Tk}")
    if causal is False:
        return Tq * Tk
    if causal is True and Tq != Tk:
        raise OptionError(
            f"causal: True needs Tq == Tk, else 'top_left' or 'bottom_right'; got Tq={Tq}, Tk={Tk}"
        )
    diagonal = min(Tq, Tk)
    triangle = diagonal * (diagonal + 1) // 2
    if causal is True or causal == "top_left":
        return triangle + (Tq - diagonal) * Tk  # queries below the square see every key
    if causal == "bottom_right":
        return triangle + (Tk - diagonal) * Tq  # keys left of the square are seen by every query
    raise OptionError(f"causal: expected False, True, 'top_left' or 'bottom_right'; got {causal!r}")


def attention_flops(
    *,
    Tq: int,
    D: int,
    Tk: int | None = None,
    Dv: int | None = None,
    H: int = 1,
    B: int = 1,
    direction: Literal["forward", "backward", "both"] = "forward",
    algorithm: Literal["standard", "flash"] = "standard",
    causal: bool | Literal["top_left", "bottom_right"] = False,
) -> Estimate:
    """Return the FLOPs of attention's matrix products: 2 forward, 4 backward, 5 backward in FlashAttention.

    Parameters
    ----------
    Tq, Tk, D, Dv, H, B : int
        Lengths, head dimensions, query heads, batch; `Tk` defaults to `Tq`, `Dv` to `D`.
    direction : {"forward", "backward", "both"}
        Which pass.
    algorithm : {"standard", "flash"}
        "flash" computes the scores a second time in the backward pass.
    causal : {False, True, "top_left", "bottom_right"}
        Count only the pairs that the mask lets through, exactly (`attended_pairs`).

    Returns
    -------
    Estimate
        One term a product, in FLOP.

    Raises
    ------
    OptionError
        If an option is unknown.

    References
    ----------
    .. [1] Dao et al. 2022, arXiv:2205.14135, Algorithms 0, 1, 3, 4.

    Examples
    --------
    >>> attention_flops(Tq=4096, D=128, causal=True).total  # half, and half the diagonal
    4296015872
    """
    if direction not in (*_MATMULS, "both"):
        raise OptionError(f"direction: expected 'forward', 'backward' or 'both'; got {direction!r}")
    if algorithm not in _SOURCES:
        raise OptionError(f"algorithm: expected 'standard' or 'flash'; got {algorithm!r}")
    values: dict[str, Number] = {
        "pairs": attended_pairs(Tq, Tq if Tk is None else Tk, causal),
        "D": exact(D), "D_v": exact(D if Dv is None else Dv), "H": exact(H), "B": exact(B),
    }  # fmt: skip
    products: list[tuple[str, str]] = []
    if direction != "backward":
        products += _MATMULS["forward"]
    if direction != "forward":
        products += [("QK^T again", "D")] if algorithm == "flash" else []
        products += _MATMULS["backward"]
    return estimate(
        f"matrix products of {algorithm} attention, {direction}",
        [term(name, f"2*pairs*{width}*B*H", values, "FLOP", _SOURCES[algorithm]) for name, width in products],
        leaves_out="softmax, scale, masks, dropout (see softmax_flops)",
    )


def softmax_flops(*, pairs: int, per_score: Quantity, H: int = 1, B: int = 1) -> Estimate:
    """Return the FLOPs of what is done to every score: softmax, scale, masks, dropout, their gradients.

    Parameters
    ----------
    pairs : int
        Scores of one head (`attended_pairs`).
    per_score : int, float or Fraction
        Operations counted for one score: no source agrees on it, so it has no default.
    H, B : int
        Heads, batch.

    Returns
    -------
    Estimate
        In FLOP.

    Examples
    --------
    >>> softmax_flops(pairs=1024**2, per_score=14, H=16, B=64).total
    15032385536
    """
    values = {"c": exact(per_score), "pairs": exact(pairs), "H": exact(H), "B": exact(B)}
    return estimate(
        "operations on scores", [term("operations on scores", "c*pairs*B*H", values, "FLOP", "a reading")]
    )
