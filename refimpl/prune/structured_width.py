"""Structured pruning of the residual stream: features masked, their norm counting the kept ones only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import BoolArray, FloatArray, round_to, wide_dtype, widen
from refimpl.prune.structured import kept_units, sample_mask
from refimpl.registry import Case, Source, implements, technique
from refimpl.transformer.linear import product
from refimpl.transformer.norms import rms_norm, rms_norm_vjp
from refimpl.validation import bind_axes, floating, positive

__all__ = ["WidthGradients", "compacted_width", "masked_width", "masked_width_vjp"]


class WidthGradients(NamedTuple):
    """Gradients of stream, gains and weight, 0 for removed features."""

    x: FloatArray
    gamma: FloatArray
    weight: FloatArray


def sample_features(rng: np.random.Generator, *, T: int, M: int, N: int, kept: str) -> Case:
    """Return a call of `masked_width`.

    Examples
    --------
    >>> [a.shape for a in sample_features(np.random.default_rng(0), T=2, M=3, N=4, kept="all").args]
    [(2, 3), (3,), (3, 4), (3,)]
    """
    x, gamma, weight = (rng.standard_normal(shape) for shape in ((T, M), (M,), (M, N)))
    x += np.copysign(0.5, x)  # near 0 the norm is too steep for its gradient to be told by differences
    keep = sample_mask(rng, M, kept)
    keep[:1] = True  # a stream of no features has no mean
    return Case((x, gamma, weight, keep))


def _width_terms(case: Case) -> tuple[int, FloatArray]:
    x, gamma, weight, keep = case.args
    return 2 * x.shape[1] + 8, np.abs(rms_norm(x[:, keep], gamma[keep])) @ np.abs(weight[keep])


@technique(
    "prune.structured.width",
    entries=(79,),
    kind="function",
    source=Source("Xia et al. 2023", "arXiv:2310.06694", "section 2.1; LLM-Shearing, CoFiRMSNorm"),
    axes={"T": (1, 4), "M": (1, 6), "N": (1, 4)},
    options={"kept": ("some", "all")},
    edges=(
        {"T": 0, "kept": "some"},
        {"T": 1, "M": 1, "N": 1, "kept": "all"},
        {"T": 3, "M": 6, "N": 2, "kept": "some"},
    ),
    sample=sample_features,
    terms=_width_terms,
    vjp="refimpl.prune.structured_width:masked_width_vjp",
)
def masked_width(
    x: FloatArray, gamma: FloatArray, weight: FloatArray, keep: BoolArray, /, *, eps: float = 1e-6
) -> FloatArray:
    """Return ``RMSNorm(x) W`` on a residual stream of which only some features are left.

    Parameters
    ----------
    x : ndarray of float, shape (T, M)
        The stream; what it holds outside `keep` does not matter.
    gamma : ndarray of float, shape (M,)
        Gains of the norm.
    weight : ndarray of float, shape (M, N)
        The next projection.
    keep : ndarray of bool, shape (M,)
        Which features stay, the same in every layer; at least one.
    eps : float
        As for `refimpl.transformer.rms_norm`.

    Returns
    -------
    ndarray of float, shape (T, N)

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, are not real, or `keep` is not boolean.
    OptionError
        If no feature stays.

    Notes
    -----
    The mean of squares divides by the number of kept features.  Divided by M, as masking alone would, every
    output is too large by ``sqrt(M / kept)``, and the model compacted afterwards is another one.

    References
    ----------
    .. [1] Xia et al., 2023, arXiv:2310.06694, section 2.1; LLM-Shearing's ``CoFiRMSNorm``.

    Examples
    --------
    >>> x, gamma, keep = np.array([[3.0, 9.0]]), np.ones(2), np.array([True, False])
    >>> masked_width(x, gamma, np.eye(2), keep, eps=1e-30)
    array([[1., 0.]])
    """
    x, gamma, weight, keep = _operands(x, gamma, weight, keep)
    wide = np.where(keep, widen(x), 0).astype(wide_dtype(x.dtype), copy=False)
    mean = np.sum(wide**2, axis=1, keepdims=True) / wide.dtype.type(keep.sum())
    normed = round_to(wide / np.sqrt(mean + wide.dtype.type(positive("eps", eps))) * widen(gamma), x.dtype)
    return round_to(product(widen(normed), widen(weight)), x.dtype)


def masked_width_vjp(
    x: FloatArray,
    gamma: FloatArray,
    weight: FloatArray,
    keep: BoolArray,
    dy: FloatArray,
    /,
    *,
    eps: float = 1e-6,
) -> WidthGradients:
    """Return the gradients of `masked_width`: those of the smaller stream, put back in their places.

    Parameters
    ----------
    x, gamma, weight, keep, eps
        As for `masked_width`.
    dy : ndarray of float, shape (T, N)
        Gradient of the output.

    Returns
    -------
    WidthGradients

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `masked_width`.

    Examples
    --------
    >>> x, gamma, keep = np.array([[3.0, 9.0]]), np.ones(2), np.array([True, False])
    >>> masked_width_vjp(x, gamma, np.eye(2), keep, np.ones((1, 2)), eps=1e-30).weight
    array([[1., 1.],
           [0., 0.]])
    """
    x, gamma, weight, keep = _operands(x, gamma, weight, keep)
    (dy,) = floating(dy=dy)
    bind_axes({"x": (x, "T M"), "weight": (weight, "M N"), "dy": (dy, "T N")})
    dnormed = round_to(product(widen(dy), widen(weight[keep]).T), x.dtype)
    inner = rms_norm_vjp(x[:, keep], gamma[keep], dnormed, eps=eps)
    dx, dgamma, dweight = (np.zeros_like(array) for array in (x, gamma, weight))
    dx[:, keep], dgamma[keep] = inner.dx, inner.dgamma
    normed = rms_norm(x[:, keep], gamma[keep], eps=eps)
    dweight[keep] = round_to(product(widen(normed).T, widen(dy)), x.dtype)
    return WidthGradients(dx, dgamma, dweight)


@implements("prune.structured.width", backend="numpy")
def compacted_width(
    x: FloatArray, gamma: FloatArray, weight: FloatArray, keep: BoolArray, /, *, eps: float = 1e-6
) -> FloatArray:
    """Return `masked_width` from the smaller stream: features taken out of x, gains and weight.

    Examples
    --------
    >>> x, gamma, keep = np.array([[3.0, 9.0]]), np.ones(2), np.array([True, False])
    >>> compacted_width(x, gamma, np.eye(2), keep, eps=1e-30)
    array([[1., 0.]])
    """
    x, gamma, weight, keep = _operands(x, gamma, weight, keep)
    normed = rms_norm(x[:, keep], gamma[keep], eps=eps)
    return round_to(product(widen(normed), widen(weight[keep])), x.dtype)


def _operands(
    x: FloatArray, gamma: FloatArray, weight: FloatArray, keep: BoolArray
) -> tuple[FloatArray, FloatArray, FloatArray, BoolArray]:
    x, gamma, weight = floating(x=x, gamma=gamma, weight=weight)
    size = bind_axes({"x": (x, "T M"), "gamma": (gamma, "M"), "weight": (weight, "M N")})
    keep = kept_units(keep, size["M"])
    if not keep.any():
        raise OptionError("keep: expected at least one feature to stay")
    return x, gamma, weight, keep
