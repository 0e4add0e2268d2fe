"""Quantisation error: what is lost, its mean square, and what theory says of both.

>>> quantizer_gain = uniform_sqnr(8) - uniform_sqnr(7)
>>> round(quantizer_gain, 4)
6.0206
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, widen
from refimpl.quant.samples import sample_pair
from refimpl.registry import Case, Source, technique
from refimpl.validation import floating, positive

__all__ = ["QuantizationError", "error", "uniform_mse", "uniform_sqnr"]


class QuantizationError(NamedTuple):
    """The error ``e = x - Q(x)``, its mean square, and the signal's power over it in decibels."""

    error: FloatArray
    mse: float
    sqnr_db: float


def _terms(case: Case) -> tuple[int, QuantizationError]:
    """Return the number of summands and the sizes of what is summed; a logarithm moves little."""
    x, y = case.args
    square = float(np.mean(np.square(x - y))) if x.size else 0.0
    return max(x.size, 1), QuantizationError(np.abs(x) + np.abs(y), square, 300.0)


@technique(
    "quant.error",
    entries=(71,),
    kind="function",
    source=Source("Gray & Neuhoff 1998", "doi:10.1109/18.720541", "section II, eq. 1 to 4"),
    axes={"n": (1, 60), "bits": (2, 8)},
    options={"values": ("uniform", "normal", "exact", "zero")},
    edges=({"n": 0}, {"n": 1}, {"n": 5, "values": "exact"}, {"n": 5, "values": "zero"}),
    sample=sample_pair,
    terms=_terms,
)
def error(x: FloatArray, quantized: FloatArray, /) -> QuantizationError:
    """Return the error of `quantized` against `x`, its mean square, and the signal-to-noise ratio.

    Parameters
    ----------
    x, quantized : ndarray of float, one shape
        The numbers, and what quantising and dequantising made of them.

    Returns
    -------
    QuantizationError
        ``error`` shaped like `x`, and two numbers, all in float64.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DTypeError
        If an array is not real.

    Notes
    -----
    **Special cases**

    - Without error the ratio is inf, for an array of zeros and for an empty one too.
    - If `x` is zero and its quantised values are not, the ratio is -inf.

    References
    ----------
    .. [1] Gray & Neuhoff, 1998, "Quantization", IEEE Trans. Inf. Theory 44(6), section II.

    Examples
    --------
    >>> result = error(np.array([1.0, 2.0]), np.array([1.0, 2.2]))
    >>> round(result.mse, 4), round(result.sqnr_db, 2)
    (0.02, 20.97)
    """
    x, quantized = floating(x=x, quantized=quantized)
    if x.shape != quantized.shape:
        raise ShapeError(f"quantized: expected the shape of x, {x.shape}, got {quantized.shape}")
    wide = widen(x).astype(np.float64)
    e = wide - widen(quantized).astype(np.float64)
    noise, signal = float(np.sum(np.square(e))), float(np.sum(np.square(wide)))
    mse = noise / max(e.size, 1)
    if noise == 0:
        return QuantizationError(e, mse, math.inf)
    return QuantizationError(e, mse, 10 * math.log10(signal / noise) if signal > 0 else -math.inf)


def uniform_mse(scale: float) -> float:
    """Return S²/12, the mean square of an error that is uniform over a step of width S.

    Raises
    ------
    OptionError
        If `scale` is not a finite number above 0.

    References
    ----------
    .. [1] Gray & Neuhoff, 1998, section II (Bennett 1948): high-resolution theory.

    Examples
    --------
    >>> uniform_mse(0.6)
    0.03
    """
    return positive("scale", scale) ** 2 / 12


def uniform_sqnr(bits: int) -> float:
    """Return the signal-to-noise ratio, in decibels, of a uniform signal that fills a grid of 2**bits steps.

    It is ``20 log10(2)`` = 6.02 dB for each bit: a signal over a width of 2**bits S has variance
    ``(2**bits S)**2 / 12``, its error S²/12.

    Raises
    ------
    OptionError
        If `bits` is not above 0.

    Examples
    --------
    >>> round(uniform_sqnr(8), 2)
    48.16
    """
    return positive("bits", bits) * 20 * math.log10(2)
