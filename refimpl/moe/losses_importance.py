"""Importance loss: how unequal the experts' shares of the gates are, as a squared coefficient of variation.

>>> importance_loss(np.array([[0.5, 0.5], [1.0, 0.0]]))  # importances 1.5 and 0.5
0.25
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.moe.losses_samples import coefficient_terms, sample_gates
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Source, technique
from refimpl.validation import floating

__all__ = [
    "ImportanceGradient",
    "Variation",
    "importance_loss",
    "importance_loss_vjp",
    "per_expert",
    "squared_variation",
    "squared_variation_vjp",
    "wide",
]

Variation = Literal["shazeer", "tensor2tensor", "davidmrau"]
VARIATIONS = ("shazeer", "tensor2tensor", "davidmrau")
# What both programs add to the squared mean before they divide by it.
EPSILON = 1e-10


class ImportanceGradient(NamedTuple):
    """Gradient of the gates, shape (T, E)."""

    dgates: FloatArray


def per_expert(name: str, value: FloatArray) -> FloatArray:
    """Return `value` as numbers, a row for each token and a column for each expert.

    Raises
    ------
    ShapeError, DTypeError
        If it is anything else, or there is no expert.

    Examples
    --------
    >>> per_expert("logits", [[1, 2]])
    array([[1., 2.]])
    """
    (given,) = floating(**{name: value})
    if given.ndim != 2 or not given.shape[1]:
        raise ShapeError(f"{name}: expected 2 axes (T, E) and an expert, got shape {given.shape}")
    return given


def wide(array: FloatArray) -> FloatArray:
    """Return an array in the format that sums over it are taken in: float32 at least.

    Examples
    --------
    >>> wide(np.ones(1, np.float16)).dtype
    dtype('float32')
    """
    return widen(array).astype(wide_dtype(array.dtype), copy=False)


def squared_variation(amounts: FloatArray, variation: Variation = "shazeer") -> float:
    """Return variance over squared mean of the experts' amounts, as one of three programs has it.

    Examples
    --------
    >>> squared_variation(np.array([4.0, 0.0])), squared_variation(np.array([4.0, 0.0]), "davidmrau") > 1.99
    (1.0, True)
    """
    centered, mean, divisor, epsilon = _moments(amounts, variation)
    if divisor <= 0 or (mean == 0 and not epsilon):
        return 0.0
    return float(np.sum(centered**2) / divisor / (mean**2 + epsilon))


def squared_variation_vjp(amounts: FloatArray, variation: Variation = "shazeer") -> FloatArray:
    """Return the gradient of `squared_variation` with respect to each amount.

    Examples
    --------
    >>> squared_variation_vjp(np.array([3.0, 1.0]))
    array([ 0.125, -0.375])
    """
    centered, mean, divisor, epsilon = _moments(amounts, variation)
    if divisor <= 0 or (mean == 0 and not epsilon):
        return np.zeros(amounts.shape)
    square = mean**2 + epsilon
    loss = np.sum(centered**2) / divisor / square
    return np.asarray(2 * centered / divisor / square - loss * 2 * mean / square / amounts.size)


def _moments(amounts: FloatArray, variation: Variation) -> tuple[FloatArray, float, int, float]:
    """Return the amounts less their mean, the mean, what the squares are divided by, and the epsilon."""
    if variation not in VARIATIONS:
        raise OptionError(f"variation: expected one of {', '.join(VARIATIONS)}; got {variation!r}")
    mean = np.mean(amounts)
    divisor = amounts.size - 1 if variation == "davidmrau" else amounts.size
    return amounts - mean, float(mean), divisor, 0.0 if variation == "shazeer" else EPSILON


@technique(
    "moe.importance_loss",
    entries=(49,),
    kind="function",
    source=Source("Shazeer et al. 2017", "arXiv:1701.06538", "section 4, eq. 6 and 7"),
    axes={"T": (0, 9), "E": (1, 7)},
    options={"values": ("gates", "sparse", "equal"), "variation": VARIATIONS},
    sample=sample_gates,
    edges=(
        {"T": 0, "E": 4},
        {"T": 3, "E": 1},
        {"T": 1, "E": 5, "values": "sparse"},
        {"T": 6, "E": 4, "values": "equal"},
        {"T": 5, "E": 2, "variation": "davidmrau"},
    ),
    terms=coefficient_terms,
    vjp="refimpl.moe.losses_importance:importance_loss_vjp",
)
def importance_loss(gates: FloatArray, /, *, variation: Variation = "shazeer") -> float:
    """Return the squared coefficient of variation of the experts' importances, ``CV(Σ_t G(x_t))²``.

    Parameters
    ----------
    gates : ndarray of float, shape (T, E)
        Gates of T tokens over E experts.  Shazeer et al. sum the gates after top-k, zeros included; V-MoE the
        softmax over all experts: what is passed decides.
    variation : {"shazeer", "tensor2tensor", "davidmrau"}
        Variance over E and nothing added, as in the paper and V-MoE; the same with 1e-10 added to the squared
        mean, as in tensor2tensor; or that with the variance over E - 1, as in the PyTorch port that most
        copies descend from (davidmrau/mixture-of-experts).

    Returns
    -------
    float
        0 if all importances are equal, E - 1 if one expert has everything (E under "davidmrau").  The
        coefficient, 0.1 in the paper, is the caller's.

    Raises
    ------
    ShapeError
        If `gates` has not two axes, or there is no expert.
    DTypeError
        If `gates` are not real.
    OptionError
        If `variation` is unknown.

    Notes
    -----
    **Special cases**: without tokens, and with one expert, the loss is 0.

    References
    ----------
    .. [1] Shazeer et al., 2017, arXiv:1701.06538, section 4, eq. 6 and 7.
    .. [2] google-research/vmoe, ``vmoe/nn/routing.py``: standard deviation with ddof 0.
    .. [3] davidmrau/mixture-of-experts, ``moe.py``, ``cv_squared``: unbiased variance, epsilon 1e-10.

    Examples
    --------
    >>> importance_loss(np.eye(4)), importance_loss(np.array([[1.0, 0.0, 0.0, 0.0]]))
    (0.0, 3.0)
    """
    return squared_variation(_importance(gates)[1], variation)


def importance_loss_vjp(
    gates: FloatArray, dloss: float, /, *, variation: Variation = "shazeer"
) -> ImportanceGradient:
    """Return the gradient of `importance_loss`: the same for every token.

    Parameters
    ----------
    gates, variation
        As for `importance_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    ImportanceGradient
        In the dtype of the gates.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `importance_loss`.

    Examples
    --------
    >>> importance_loss_vjp(np.array([[2.0, 1.0], [1.0, 0.0]]), 1.0).dgates
    array([[ 0.125, -0.375],
           [ 0.125, -0.375]])
    """
    given, importance = _importance(gates)
    each = float(dloss) * squared_variation_vjp(importance, variation)
    return ImportanceGradient(round_to(np.broadcast_to(each, given.shape).copy(), given.dtype))


def _importance(gates: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the gates as an array, and their sums over tokens."""
    given = per_expert("gates", gates)
    return given, np.sum(wide(given), axis=0)
