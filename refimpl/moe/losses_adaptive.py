"""Skywork-MoE's two remedies: gating logits normalised before the softmax, and a coefficient that adapts.

>>> normalize_logits(np.array([[1.0, 2.0, 3.0]])).round(4)
array([[-1.2247,  0.    ,  1.2247]])
>>> adapt_coefficient(np.array([0.01]), np.array([0.0]))
array([0.0099])
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.errors import OptionError
from refimpl.moe.losses_samples import sample_logits
from refimpl.moe.losses_z import LogitGradient, checked_logits
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, finite, floating, fraction

__all__ = ["adapt_coefficient", "normalize_logits", "normalize_logits_vjp"]


def _sample_normalization(rng: np.random.Generator, *, values: str, **shape: Any) -> Case:
    case = sample_logits(rng, values=values, **shape)
    return case.replace(temperature=float(rng.choice([0.5, 1.0, 2.0])))


def _normalization_terms(case: Case) -> tuple[int, float]:
    return 2 * case.args[0].shape[1], 4.0 * case.args[0].shape[1]


@technique(
    "moe.logit_normalization",
    entries=(52,),
    kind="function",
    source=Source("Wei et al. 2024", "arXiv:2406.06563", "section 3.2, gating logit normalization"),
    axes={"T": (0, 6), "E": (1, 7)},
    options={"values": ("normal", "large")},
    sample=_sample_normalization,
    edges=({"T": 0, "E": 3}, {"T": 3, "E": 1}, {"T": 2, "E": 2}, {"T": 5, "E": 6, "values": "large"}),
    terms=_normalization_terms,
    vjp="refimpl.moe.losses_adaptive:normalize_logits_vjp",
)
def normalize_logits(logits: FloatArray, /, *, temperature: float = 1.0) -> FloatArray:
    """Return ``λ (z - μ) / σ`` over the experts of each token: what the softmax is then taken of.

    Parameters
    ----------
    logits : ndarray of float, shape (T, E)
        Scores of the experts.
    temperature : float
        λ: the larger, the sharper the gates.  Skywork-MoE finds 1 sufficient.

    Returns
    -------
    ndarray, shape (T, E)
        In the dtype of the logits: of each token with mean 0 and standard deviation λ, over E and not E - 1.

    Raises
    ------
    ShapeError, DTypeError
        If `logits` are no real array of two axes with an expert.
    OptionError
        If `temperature` is not finite.

    Notes
    -----
    The gates cannot become nearly uniform, however small the logits are.

    **Special cases**: equal logits, such as those of a single expert, have no standard deviation and give 0.

    References
    ----------
    .. [1] Wei et al., 2024, arXiv:2406.06563, section 3.2.

    Examples
    --------
    >>> normalize_logits(np.array([[5.0, 5.0], [-1.0, 1.0]]), temperature=2.0)
    array([[ 0.,  0.],
           [-2.,  2.]])
    """
    given, unit, _ = _standardized(logits)
    return np.asarray(round_to(finite("temperature", temperature) * unit, given.dtype))


def normalize_logits_vjp(
    logits: FloatArray, dnormalized: FloatArray, /, *, temperature: float = 1.0
) -> LogitGradient:
    """Return the gradient of `normalize_logits`; 0 where the logits of a token are equal.

    Parameters
    ----------
    logits, temperature
        As for `normalize_logits`.
    dnormalized : ndarray of float, shape (T, E)
        Gradient of the result.

    Returns
    -------
    LogitGradient
        In the dtype of the logits.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `normalize_logits`.

    Examples
    --------
    >>> normalize_logits_vjp(np.array([[-1.0, 0.0, 1.0]]), np.ones((1, 3))).dlogits
    array([[0., 0., 0.]])
    """
    given, unit, deviation = _standardized(logits)
    bind_axes({"logits": (given, "T E"), "dnormalized": (np.asarray(dnormalized), "T E")})
    dy = finite("temperature", temperature) * widen(np.asarray(dnormalized)).astype(np.float64)
    inner = dy - dy.mean(axis=1, keepdims=True) - unit * np.mean(dy * unit, axis=1, keepdims=True)
    dlogits = np.where(deviation > 0, inner / np.where(deviation > 0, deviation, 1.0), 0.0)
    return LogitGradient(round_to(dlogits, given.dtype))


def _standardized(logits: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the logits, the standardised ones in float64, and the deviations that they were divided by."""
    given = checked_logits(logits)
    wide = widen(given).astype(np.float64)
    flat = np.all(wide == wide[:, :1], axis=1, keepdims=True)
    centered = np.where(flat, 0.0, wide - wide.mean(axis=1, keepdims=True))
    deviation = np.sqrt(np.mean(np.square(centered), axis=1, keepdims=True))
    return given, centered / np.where(deviation > 0, deviation, 1.0), deviation


def _sample_coefficients(rng: np.random.Generator, *, layers: int, dropped: str) -> Case:
    # Rates stay inside [0, 1], so that one unit in the last place either way is a rate too.
    rates = {"none": 1e-9, "some": 0.1, "all": 1.0}[dropped] * (0.1 + 0.8 * rng.random(layers))
    return Case((0.02 * rng.random(layers), rates))


@technique(
    "moe.adaptive_coefficient",
    entries=(52,),
    kind="function",
    source=Source("Wei et al. 2024", "arXiv:2406.06563", "section 3.3, adaptive auxiliary loss coefficients"),
    axes={"layers": (0, 6)},
    options={"dropped": ("none", "some", "all")},
    sample=_sample_coefficients,
    edges=({"layers": 0}, {"layers": 1, "dropped": "all"}, {"layers": 3, "dropped": "none"}),
)
def adapt_coefficient(
    coefficient: FloatArray,
    drop_rate: FloatArray,
    /,
    *,
    sensitivity: float = 0.2,
    largest: float = 0.01,
    momentum: float = 0.99,
) -> FloatArray:
    """Return each layer's next coefficient, ``β α + (1 - β) min(ξ d, α_max)``, from the share d it dropped.

    Parameters
    ----------
    coefficient, drop_rate : ndarray of float, shape (layers,)
        α now, and the share of tokens dropped for want of capacity, from 0 to 1.
    sensitivity, largest, momentum : float
        ξ, α_max and β; defaults are Skywork-MoE's.

    Returns
    -------
    ndarray, shape (layers,)
        In the dtype of the arguments.

    Raises
    ------
    ShapeError, DTypeError
        If the arguments are not two rows of the same length of real numbers.
    OptionError
        If a rate is outside [0, 1], β outside [0, 1), or ξ or α_max not finite.

    Notes
    -----
    A layer that drops nothing loses its auxiliary loss in time, and with it the loss's pull on the router.

    **Special cases**: with no layer the result is empty.

    References
    ----------
    .. [1] Wei et al., 2024, arXiv:2406.06563, section 3.3.

    Examples
    --------
    >>> adapt_coefficient(np.array([0.01]), np.array([0.5]))
    array([0.01])
    """
    alpha, rate = floating(coefficient=coefficient, drop_rate=drop_rate)
    bind_axes({"coefficient": (alpha, "layers"), "drop_rate": (rate, "layers")})
    wide, d = widen(alpha).astype(np.float64), widen(rate).astype(np.float64)
    if not np.all((d >= 0) & (d <= 1)):
        raise OptionError("drop_rate: expected shares in [0, 1]")
    beta = fraction("momentum", momentum)
    target = np.minimum(finite("sensitivity", sensitivity) * d, finite("largest", largest))
    return np.asarray(round_to(beta * wide + (1 - beta) * target, alpha.dtype))
