"""Dynamic batch loading: domains whose loss lags behind its reference are sampled more."""

from __future__ import annotations

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["dynamic_batch_loading", "dynamic_batch_loading_released"]

# The share of the uniform distribution that the released code mixes in.
UNIFORM_SHARE = 1e-4


def sample_domains(rng: np.random.Generator, *, n: int, values: str) -> Case:
    """Return a call of `dynamic_batch_loading`; `values` "even" gives every domain the same lag.

    Examples
    --------
    >>> [a.shape for a in sample_domains(np.random.default_rng(0), n=2, values="mixed").args]
    [(2,), (2,), (2,)]
    """
    weights = rng.random(n) + 0.05
    reference = 1 + rng.random(n)
    loss = reference + rng.standard_normal(n)
    if values == "even":
        loss = reference + 0.5
    elif values == "ahead":
        loss = reference - rng.random(n)
    elif values == "rare":
        weights[::2] *= 1e-6
    return Case((weights / weights.sum(), loss, reference))


def _terms(case: Case) -> tuple[int, FloatArray]:
    return 8 + case.args[0].size, np.ones(case.args[0].shape)


_EDGES: tuple[dict[str, int | str], ...] = (
    {"n": 1, "values": "mixed"},
    {"n": 4, "values": "even"},
    {"n": 5, "values": "ahead"},
    {"n": 5, "values": "rare"},
)


@technique(
    "prune.dynamic_batch_loading",
    entries=(82,),
    kind="function",
    source=Source("Xia et al. 2023", "arXiv:2310.06694", "section 2.2, Algorithm 1"),
    axes={"n": (1, 7)},
    options={"values": ("mixed", "even", "ahead", "rare")},
    edges=_EDGES,
    sample=sample_domains,
    terms=_terms,
)
def dynamic_batch_loading(weights: FloatArray, loss: FloatArray, reference: FloatArray, /) -> FloatArray:
    """Return the new shares of the domains: ``w e^Δ / Σ w e^Δ`` with ``Δ = max(ℓ - ℓ_ref, 0)``.

    Parameters
    ----------
    weights : ndarray of float, shape (n,)
        Shares of the domains until now, >= 0, at least one above 0.
    loss, reference : ndarray of float, shape (n,)
        Validation loss of each domain, now and as it should be.

    Returns
    -------
    ndarray of float, shape (n,)
        They sum to 1.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If a share is negative, all are 0, or a number is NaN or infinite.

    Notes
    -----
    Evaluated every 50 steps in the paper.  Logarithms of the shares add up over steps.

    **Special cases**

    - Domains that all lag alike, or are all ahead, keep their shares.
    - A domain with share 0 keeps it for ever.
    - The lecture's subroutine returns θ; what must be returned is w.

    References
    ----------
    .. [1] Xia et al., 2023, arXiv:2310.06694, Algorithm 1, UpdateWeight.

    Examples
    --------
    >>> loss, reference = np.array([2.0, 1.0]), np.array([2.0 - np.log(3.0), 5.0])
    >>> dynamic_batch_loading(np.array([0.5, 0.5]), loss, reference)
    array([0.75, 0.25])
    """
    weights, lag = _operands(weights, loss, reference)
    return _moved(weights, np.maximum(lag, 0))


@technique(
    "prune.dynamic_batch_loading.released",
    entries=(82,),
    kind="function",
    source=Source("Xia et al. 2023", "github.com/princeton-nlp/LLM-Shearing", "dynamic_loading_callback.py"),
    axes={"n": (1, 7)},
    options={"values": ("mixed", "even", "ahead", "rare")},
    edges=_EDGES,
    sample=sample_domains,
    terms=_terms,
)
def dynamic_batch_loading_released(
    weights: FloatArray, loss: FloatArray, reference: FloatArray, /
) -> FloatArray:
    """Return the new shares as the released code updates them: lags below 0 count, and none reaches 0.

    Parameters
    ----------
    weights, loss, reference
        As for `dynamic_batch_loading`.

    Returns
    -------
    ndarray of float, shape (n,)
        ``(1 - c) w' + c / n`` with c = 1e-4 and w' the update with ``Δ = ℓ - ℓ_ref``, which is not clipped.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `dynamic_batch_loading`.

    References
    ----------
    .. [1] LLM-Shearing, llmshearing/callbacks/dynamic_loading_callback.py, ``update_proportion``; as DoReMi.

    Examples
    --------
    >>> loss, reference = np.array([2.0, 1.0]), np.array([2.0, 1.0 + np.log(3.0)])
    >>> dynamic_batch_loading_released(np.array([0.5, 0.5]), loss, reference)
    array([0.749975, 0.250025])
    """
    weights, lag = _operands(weights, loss, reference)
    moved = widen(_moved(weights, lag))
    n = moved.dtype.type(max(moved.size, 1))
    return round_to((1 - moved.dtype.type(UNIFORM_SHARE)) * moved + UNIFORM_SHARE / n, weights.dtype)


def _operands(weights: FloatArray, loss: FloatArray, reference: FloatArray) -> tuple[FloatArray, FloatArray]:
    weights, loss, reference = floating(weights=weights, loss=loss, reference=reference)
    bind_axes({"weights": (weights, "n"), "loss": (loss, "n"), "reference": (reference, "n")})
    wide = wide_dtype(weights.dtype)
    w, lag = widen(weights), widen(loss).astype(wide) - widen(reference).astype(wide)
    if not (np.isfinite(w).all() and np.isfinite(lag).all()):
        raise OptionError("weights, loss, reference: expected finite numbers, got NaN or infinity")
    if np.any(w < 0) or not np.any(w > 0):
        raise OptionError(f"weights: expected shares of at least 0, one above 0; got {w.tolist()}")
    return weights, lag


def _moved(weights: FloatArray, lag: FloatArray) -> FloatArray:
    """Return ``w e^Δ`` normalised, as a softmax, so that a large lag does not overflow."""
    with np.errstate(divide="ignore"):  # log 0 = -inf: a share of 0 stays 0
        logits = np.log(widen(weights).astype(lag.dtype)) + lag
    return round_to(softmax(logits), weights.dtype)
