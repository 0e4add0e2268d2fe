"""Skywork-MoE: its own auxiliary loss, and gating logits that are normalised before the softmax.

>>> normalize_logits(np.array([[1.0, 2.0, 3.0]])).round(4)
array([[-1.2247,  0.    ,  1.2247]])
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.moe.losses_importance import ImportanceGradient, per_expert, wide
from refimpl.moe.losses_samples import coefficient_terms, sample_gates, sample_logits
from refimpl.moe.losses_z import LogitGradient
from refimpl.numerics import FloatArray, round_to
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, finite

__all__ = [
    "normalize_logits",
    "normalize_logits_vjp",
    "uniformity_loss",
    "uniformity_loss_vjp",
]


@technique(
    "moe.balance_loss.skywork",
    entries=(51, 52),
    kind="function",
    source=Source("Wei et al. 2024", "arXiv:2406.06563", "section 2, eq. 4"),
    axes={"T": (0, 9), "E": (1, 7)},
    options={"values": ("gates", "sparse", "equal")},
    sample=sample_gates,
    edges=({"T": 0, "E": 3}, {"T": 3, "E": 1}, {"T": 1, "E": 5, "values": "sparse"}),
    terms=coefficient_terms,
    vjp="refimpl.moe.losses_skywork:uniformity_loss_vjp",
)
def uniformity_loss(gates: FloatArray, /) -> float:
    """Return ``Σ_e (1/E - mean_t g_te)²``: the report calls it Switch's loss, but it is another one.

    Parameters
    ----------
    gates : ndarray of float, shape (T, E)
        Gates, each token's with sum 1.

    Returns
    -------
    float
        0 if the mean gates are equal, 1 - 1/E if one expert has everything.

    Raises
    ------
    ShapeError
        If `gates` has not two axes, or there is no expert.
    DTypeError
        If `gates` are not real.

    Notes
    -----
    For gates that sum to 1 it is `importance_loss` divided by E: no count of tokens takes part, and the
    gradient flows through both factors of the square.

    **Special cases**: without tokens the loss is 0.

    References
    ----------
    .. [1] Wei et al., 2024, arXiv:2406.06563, eq. 4.

    Examples
    --------
    >>> uniformity_loss(np.array([[1.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    _, distance = _distance(gates)
    return float(np.sum(np.square(distance)))


def uniformity_loss_vjp(gates: FloatArray, dloss: float, /) -> ImportanceGradient:
    """Return the gradient of `uniformity_loss`: the same for every token.

    Parameters
    ----------
    gates
        As for `uniformity_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    ImportanceGradient
        In the dtype of the gates.

    Raises
    ------
    ShapeError, DTypeError
        As `uniformity_loss`.

    Examples
    --------
    >>> uniformity_loss_vjp(np.array([[1.0, 0.0]]), 1.0).dgates
    array([[ 1., -1.]])
    """
    given, distance = _distance(gates)
    each = 2 * float(dloss) * distance / max(len(given), 1)
    return ImportanceGradient(round_to(np.broadcast_to(each, given.shape).copy(), given.dtype))


def _distance(gates: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the gates as an array, and how far their means are above 1/E; 0 without tokens."""
    given = per_expert("gates", gates)
    tokens, experts = given.shape
    if not tokens:
        return given, np.zeros(experts)
    return given, np.asarray(np.sum(wide(given), axis=0) / tokens - 1 / experts)


def _sample_normalization(rng: np.random.Generator, *, values: str, **shape: Any) -> Case:
    case = sample_logits(rng, values=values, **shape)
    return case.replace(temperature=float(rng.choice([0.5, 1.0, 2.0])))


def _normalization_terms(case: Case) -> tuple[int, float]:
    return 2 * case.args[0].shape[1], 4.0 * case.args[0].shape[1]


@technique(
    "moe.logit_normalization",
    entries=(52,),
    kind="function",
    source=Source("Wei et al. 2024", "arXiv:2406.06563", "section on gating logit normalization"),
    axes={"T": (0, 6), "E": (1, 7)},
    options={"values": ("normal", "large")},
    sample=_sample_normalization,
    edges=({"T": 0, "E": 3}, {"T": 3, "E": 1}, {"T": 2, "E": 2}, {"T": 5, "E": 6, "values": "large"}),
    terms=_normalization_terms,
    vjp="refimpl.moe.losses_skywork:normalize_logits_vjp",
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
    .. [1] Wei et al., 2024, arXiv:2406.06563, gating logit normalization.

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
    dy = finite("temperature", temperature) * wide(np.asarray(dnormalized))
    inner = dy - dy.mean(axis=1, keepdims=True) - unit * np.mean(dy * unit, axis=1, keepdims=True)
    dlogits = np.where(deviation > 0, inner / np.where(deviation > 0, deviation, 1.0), 0.0)
    return LogitGradient(round_to(dlogits, given.dtype))


def _standardized(logits: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the logits, the standardised ones, and the deviations that they were divided by."""
    given = per_expert("logits", logits)
    z = wide(given)
    flat = np.all(z == z[:, :1], axis=1, keepdims=True)
    centered = np.where(flat, z.dtype.type(0), z - z.mean(axis=1, keepdims=True))
    deviation = np.sqrt(np.mean(np.square(centered), axis=1, keepdims=True))
    return given, centered / np.where(deviation > 0, deviation, z.dtype.type(1)), deviation
