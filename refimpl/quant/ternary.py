"""QMoE's ternary weights: an expert's numbers rounded to its least, to 0 or to its greatest, as in GPTQ."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, IntArray, widen
from refimpl.quant.gptq import compensate, hessian, sample_layer
from refimpl.registry import Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["Ternary", "ternary"]


class Ternary(NamedTuple):
    """Codes -1, 0, 1 [K, N], and what -1 and 1 stand for in each output [N]."""

    codes: IntArray
    low: FloatArray
    high: FloatArray


@technique(
    "quant.qmoe.ternary",
    entries=(76,),
    kind="function",
    source=Source("Frantar and Alistarh 2023", "arXiv:2310.16795", "section 3.2; percdamp 0.1"),
    axes={"T": (1, 12), "K": (1, 8), "N": (1, 5)},
    options={"inputs": ("correlated", "identity", "dead", "none")},
    edges=(
        {"T": 2, "K": 0, "N": 3},
        {"T": 2, "K": 3, "N": 0},
        {"T": 1, "K": 1, "N": 1, "inputs": "correlated"},
        {"T": 4, "K": 7, "N": 3, "inputs": "none"},
        {"T": 12, "K": 8, "N": 5, "inputs": "correlated"},
    ),
    sample=lambda rng, **shape: sample_layer(rng, bits=2, **shape).without("bits"),
)
def ternary(weight: FloatArray, x: FloatArray, /, *, damping: float = 0.1) -> Ternary:
    """Return the ternary codes of an expert's weight: its least, its greatest number, or 0.

    Parameters
    ----------
    weight : ndarray of float, shape (K, N)
        Used as ``x @ weight``.
    x : ndarray of float, shape (T, K)
        Tokens routed to the expert; none gives plain rounding, the paper's fall-back.
    damping : float
        As for `refimpl.quant.gptq.hessian`; the paper's experts take 0.1.

    Returns
    -------
    Ternary
        ``low <= 0 <= high``, float64; an output without negative numbers has low 0 and no code -1.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `refimpl.quant.gptq.gptq`.

    Notes
    -----
    Above ``high / 2`` a number becomes high, below ``low / 2`` low, and 0 otherwise, the halves themselves
    too; errors are made good by the features still to come, as in GPTQ.

    References
    ----------
    .. [1] Frantar and Alistarh, 2023, arXiv:2310.16795, section 3.2.

    Examples
    --------
    >>> ternary(np.array([[1.0], [0.4], [-0.2], [-0.06]]), np.zeros((0, 4))).codes.T
    array([[ 1,  0, -1,  0]], dtype=int8)
    """
    (weight,), (x,) = floating(weight=weight), floating(x=x)
    bind_axes({"weight": (weight, "K N"), "x": (x, "T K")})
    wide = widen(weight).astype(np.float64)
    if not np.isfinite(wide).all():
        raise OptionError("weight: expected finite numbers, got NaN or infinity")
    low, high = np.min(wide, axis=0, initial=0.0), np.max(wide, axis=0, initial=0.0)

    def codes(row: FloatArray) -> IntArray:
        up, down = (high > 0) & (row > high / 2), (low < 0) & (row < low / 2)
        signs: IntArray = up.astype(np.int8) - down.astype(np.int8)
        return signs

    def to_grid(row: FloatArray) -> FloatArray:
        code = codes(row)
        values: FloatArray = np.where(code > 0, high, np.where(code < 0, low, 0.0))
        return values

    rounded = compensate(wide, hessian(x, damping=damping), to_grid)
    return Ternary(codes(rounded), low, high)
