"""Load loss: the variation of the experts' expected numbers of tokens, smooth because the router is noisy.

>>> clean = np.array([[1.0, 0.0, -1.0]])
>>> load_probabilities(clean, clean, np.full((1, 3), 0.5), k=1).round(3)
array([[0.977, 0.023, 0.   ]])
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.moe.losses_importance import (
    VARIATIONS,
    Variation,
    squared_variation,
    squared_variation_vjp,
    wide,
)
from refimpl.moe.losses_samples import load_terms, sample_load
from refimpl.numerics import FloatArray, IntArray, round_to
from refimpl.registry import Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["LoadGradients", "load_loss", "load_loss_vjp", "load_probabilities"]

Threshold = Literal["shazeer", "vmoe"]


class LoadGradients(NamedTuple):
    """Gradients of clean logits, noisy logits and standard deviations, shape (T, E) each."""

    dclean: FloatArray
    dnoisy: FloatArray
    dnoise_std: FloatArray


@technique(
    "moe.load_loss",
    entries=(50,),
    kind="function",
    source=Source("Shazeer et al. 2017", "arXiv:1701.06538", "appendix A, eq. 8 to 11"),
    axes={"T": (0, 7), "E": (1, 6), "k": (1, 4)},
    options={
        "values": ("normal", "wide", "equal"),
        "threshold": ("shazeer", "vmoe"),
        "variation": VARIATIONS,
    },
    sample=sample_load,
    edges=(
        {"T": 0, "E": 3},
        {"T": 4, "E": 1, "k": 1},
        {"T": 4, "E": 3, "k": 3},
        {"T": 5, "E": 4, "k": 2, "values": "wide"},
        {"T": 5, "E": 4, "k": 1, "threshold": "vmoe"},
    ),
    terms=load_terms,
    vjp="refimpl.moe.losses_load:load_loss_vjp",
)
def load_loss(
    clean: FloatArray,
    noisy: FloatArray,
    noise_std: FloatArray,
    /,
    *,
    k: int,
    threshold: Threshold = "shazeer",
    variation: Variation = "shazeer",
) -> float:
    """Return the squared coefficient of variation of the experts' loads, ``CV(Σ_t P(x_t, e))²``.

    P is the probability that expert e is among the top k if its own noise, and no other's, is drawn again:
    ``Φ((clean_e - threshold_e) / σ_e)``.

    Parameters
    ----------
    clean, noisy, noise_std : ndarray of float, shape (T, E)
        Logits before the noise, logits with it, and its standard deviations σ > 0: softplus of a linear map
        in Shazeer et al., 1/E everywhere in V-MoE.
    k : int
        Experts a token.
    threshold : {"shazeer", "vmoe"}
        What an expert's logit must exceed: the k-th largest noisy logit among the *others*, which is the
        (k+1)-th of all for an expert that is selected; or the k-th of all for everyone, as in V-MoE.
    variation : {"shazeer", "tensor2tensor", "davidmrau"}
        As for `importance_loss`.

    Returns
    -------
    float
        From 0 to E - 1.  The coefficient, 0.1 in the paper, is the caller's.

    Raises
    ------
    ShapeError
        If the shapes differ, have not two axes, or there is no expert.
    DTypeError
        If an array is not real.
    OptionError
        If k is not from 1 to E, a standard deviation is not above 0, or an option is unknown.

    Notes
    -----
    Counts of selected tokens have no gradient; this estimate has one through logits and noise.  It is
    undefined without noise.

    **Special cases**: for k = E every expert is selected whatever its noise, P = 1 and the loss is 0
    ("shazeer"); without tokens the loss is 0.  Tied noisy logits give the same threshold either way.

    References
    ----------
    .. [1] Shazeer et al., 2017, arXiv:1701.06538, appendix A, eq. 8 to 11.
    .. [2] google-research/vmoe, ``vmoe/nn/routing.py``, ``_load_auxiliary_loss``.

    Examples
    --------
    >>> balanced = np.array([[2.0, 0.0], [0.0, 2.0]])
    >>> load_loss(balanced, balanced, np.ones((2, 2)), k=1)
    0.0
    """
    _, P, _ = _probabilities(clean, noisy, noise_std, k, threshold)
    return squared_variation(np.sum(P, axis=0), variation)


def load_loss_vjp(
    clean: FloatArray,
    noisy: FloatArray,
    noise_std: FloatArray,
    dloss: float,
    /,
    *,
    k: int,
    threshold: Threshold = "shazeer",
    variation: Variation = "shazeer",
) -> LoadGradients:
    """Return the gradients of `load_loss`; the noisy logits have one through the thresholds.

    Parameters
    ----------
    clean, noisy, noise_std, k, threshold, variation
        As for `load_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    LoadGradients
        In the dtype of the logits.  With ``noisy = clean + σ ε`` the caller adds ``dnoisy`` to ``dclean``.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `load_loss`.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0]])
    >>> load_loss_vjp(x, x, np.ones((1, 2)), 1.0, k=1).dclean.round(4)
    array([[ 0.1048, -0.5559]])
    """
    z, P, at = _probabilities(clean, noisy, noise_std, k, threshold)
    dtype = floating(clean=clean, noisy=noisy, noise_std=noise_std)[0].dtype
    each = float(dloss) * squared_variation_vjp(np.sum(P, axis=0), variation)
    # The density of a standard normal at z; z is infinite where nothing can take an expert out.
    dz = each * np.exp(-0.5 * np.square(z)) / np.sqrt(2 * np.pi)
    std = wide(np.asarray(noise_std))
    dclean = dz / std
    dnoisy = np.zeros(z.shape)
    np.add.at(dnoisy, (np.arange(len(z))[:, None], at), -dclean)
    dstd = -np.where(np.isfinite(z), z, 0.0) * dz / std
    return LoadGradients(*(round_to(gradient, dtype) for gradient in (dclean, dnoisy, dstd)))


def load_probabilities(
    clean: FloatArray,
    noisy: FloatArray,
    noise_std: FloatArray,
    /,
    *,
    k: int,
    threshold: Threshold = "shazeer",
) -> FloatArray:
    """Return P(x, e), the probability of each expert to be selected if its noise is drawn again.

    Parameters
    ----------
    clean, noisy, noise_std, k, threshold
        As for `load_loss`.

    Returns
    -------
    ndarray, shape (T, E)
        In float64 for float64 logits, otherwise in float32.  Its sum over tokens is the load of an expert.

    Examples
    --------
    >>> zero = np.zeros((1, 2))
    >>> load_probabilities(zero, zero, zero + 1, k=1)
    array([[0.5, 0.5]])
    """
    return _probabilities(clean, noisy, noise_std, k, threshold)[1]


def _probabilities(
    clean: FloatArray, noisy: FloatArray, noise_std: FloatArray, k: int, threshold: Threshold
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Return z-scores, probabilities, and the column of the noisy logit that each threshold is."""
    from scipy.special import ndtr

    found = floating(clean=clean, noisy=noisy, noise_std=noise_std)
    arrays = dict(zip(("clean", "noisy", "noise_std"), found, strict=True))
    E = bind_axes({name: (array, "T E") for name, array in arrays.items()})["E"]
    if not E:
        raise ShapeError(f"clean: expected at least 1 expert, got shape {arrays['clean'].shape}")
    if whole("k", k) > E:
        raise OptionError(f"k: expected at most E={E} experts a token, got {k}")
    if threshold not in ("shazeer", "vmoe"):
        raise OptionError(f"threshold: expected 'shazeer' or 'vmoe', got {threshold!r}")
    x, h, std = map(wide, arrays.values())
    if not np.all(std > 0):
        raise OptionError("noise_std: expected standard deviations above 0; without noise there is no load")
    order = np.argsort(-h, axis=1, kind="stable")
    kth = order[:, k - 1 : k]
    at = np.broadcast_to(kth, h.shape)
    if threshold == "shazeer" and k < E:
        rank = np.argsort(order, axis=1, kind="stable")
        at = np.where(rank < k, order[:, k : k + 1], kth)
    if threshold == "shazeer" and k == E:
        z = np.full(h.shape, np.inf, h.dtype)
    else:
        z = (x - np.take_along_axis(h, at, axis=1)) / std
    return z, np.asarray(ndtr(z)), at
