"""LayerNorm and RMSNorm, per token over the features, with their gradients."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import Array, FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import floating, positive

__all__ = [
    "LayerNormGradients",
    "RMSNormConvention",
    "RMSNormGradients",
    "layer_norm",
    "layer_norm_vjp",
    "rms_norm",
    "rms_norm_vjp",
]

RMSNormConvention: TypeAlias = Literal["torch", "llama"]


class LayerNormGradients(NamedTuple):
    """Gradients of the input, the gain and the shift."""

    dx: FloatArray
    dgamma: FloatArray
    dbeta: FloatArray


class RMSNormGradients(NamedTuple):
    """Gradients of the input and the gain."""

    dx: FloatArray
    dgamma: FloatArray


def _sample(rng: np.random.Generator, *, T: int, M: int, values: str, eps: float) -> Case:
    # Features apart from each other and from 0, so that no row is too curved for finite differences.
    x = rng.uniform(-1, 1, (T, M)) + 1.5 * (-1.0) ** np.arange(M)
    if values == "far":  # a mean that would cancel E[x²] - E[x]²
        x = x + 100.0
    elif values == "constant":
        x, eps = np.full((T, M), 3.0), 0.5
    return Case((x, 1 + rng.standard_normal(M) / 4, rng.standard_normal(M)), {"eps": eps})


def _sample_rms(rng: np.random.Generator, *, convention: str, **shape: Any) -> Case:
    case = _sample(rng, **shape)
    return case.replace(*case.args[:2], convention=convention)


_AXES = {"T": (0, 4), "M": (1, 9)}
_EDGES: tuple[dict[str, Any], ...] = (
    {"T": 0, "M": 3},
    {"T": 2, "M": 1, "values": "normal"},
    {"T": 2, "M": 5, "values": "constant"},
    {"T": 3, "M": 8, "values": "far"},
    {"T": 3, "M": 8, "values": "normal", "eps": 0.5},
)
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "values": ("normal", "far", "constant"),
    "eps": (1e-5, 1e-12, 0.5),  # the last is large enough to be felt
}


@technique(
    "transformer.layer_norm",
    entries=(14,),
    kind="function",
    source=Source("Ba et al. 2016", "arXiv:1607.06450", "eq. 3 and 4"),
    axes=_AXES,
    options=_OPTIONS,
    edges=_EDGES,
    sample=_sample,
    vjp="refimpl.transformer.norms:layer_norm_vjp",
)
def layer_norm(x: FloatArray, gamma: FloatArray, beta: FloatArray, /, *, eps: float = 1e-5) -> FloatArray:
    """Return ``(x - μ) / √(σ² + eps) * gamma + beta``, mean and variance taken over the last axis.

    Parameters
    ----------
    x : ndarray of float, shape (..., M)
        Tokens.
    gamma, beta : ndarray of float, shape (M,)
        Gain and shift.
    eps : float
        Added inside the root.  1e-5 in PyTorch and GPT-2, 1e-12 in BERT; it is part of a model.

    Returns
    -------
    ndarray of float, shape (..., M)
        In the common dtype.

    Raises
    ------
    ShapeError
        If `gamma` or `beta` does not have one entry a feature.
    OptionError
        If `eps` is not above 0.
    DTypeError
        If an array is not real.

    Notes
    -----
    The variance is the biased one (divided by M), and it is taken of the differences from the mean: E[x²] -
    E[x]² loses every digit where |μ| ≫ σ.  Statistics are taken in float32 at least.  **Special cases**

    - A row of equal numbers gives `beta`, and so does M = 1.

    References
    ----------
    .. [1] Ba, Kiros, Hinton, 2016, arXiv:1607.06450, eq. 3 and 4.

    Examples
    --------
    >>> layer_norm(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), eps=1e-12)
    array([[-1.,  1.]])
    """
    x, gamma, beta = floating(x=x, gamma=gamma, beta=beta)
    _check(x, {"gamma": gamma, "beta": beta}, eps)
    normal, _ = _standardized(x, eps)
    return round_to(normal * _wide(gamma) + _wide(beta), x.dtype)


def layer_norm_vjp(
    x: FloatArray, gamma: FloatArray, beta: FloatArray, dy: FloatArray, /, *, eps: float = 1e-5
) -> LayerNormGradients:
    """Return the gradients of ``sum(dy * layer_norm(x, gamma, beta, eps=eps))``.

    Parameters
    ----------
    x, gamma, beta, eps
        As for `layer_norm`.
    dy : ndarray of float, shape (..., M)
        Gradient of the output.

    Returns
    -------
    LayerNormGradients
        ``dx`` is orthogonal to the vector of ones in every row: a shift of a token changes nothing.

    Notes
    -----
    With g = dy * gamma: ``dx = (g - mean(g) - x̂ mean(g x̂)) / √(σ² + eps)``.

    Examples
    --------
    >>> x, one = np.array([[1.0, 3.0]]), np.ones(2)
    >>> layer_norm_vjp(x, one, one, np.array([[1.0, 0.0]]), eps=1e-12).dbeta
    array([1., 0.])
    """
    x, gamma, beta, dy = floating(x=x, gamma=gamma, beta=beta, dy=dy)
    _check(x, {"gamma": gamma, "beta": beta}, eps)
    _same_shape(dy, x)
    normal, inverse = _standardized(x, eps)
    dgamma, dbeta = _gain_gradients(normal, _wide(dy))
    g = _wide(dy) * _wide(gamma)
    dx = inverse * (g - _mean(g) - normal * _mean(g * normal))
    return LayerNormGradients(*(round_to(part, x.dtype) for part in (dx, dgamma, dbeta)))


@technique(
    "transformer.rms_norm",
    entries=(14,),
    kind="function",
    source=Source("Zhang and Sennrich 2019", "arXiv:1910.07467", "eq. 4"),
    axes=_AXES,
    options={**_OPTIONS, "convention": ("torch", "llama")},
    edges=_EDGES,
    sample=_sample_rms,
    vjp="refimpl.transformer.norms:rms_norm_vjp",
)
def rms_norm(
    x: FloatArray,
    gamma: FloatArray,
    /,
    *,
    eps: float = 1e-6,
    convention: RMSNormConvention = "torch",
) -> FloatArray:
    """Return ``x / √(mean(x²) + eps) * gamma``: LayerNorm without mean and shift.

    Parameters
    ----------
    x : ndarray of float, shape (..., M)
        Tokens.
    gamma : ndarray of float, shape (M,)
        Gain.  Gemma stores ``gamma - 1``: add the 1 before.
    eps : float
        Added inside the root.  1e-6 in LLaMA 1, 1e-5 in LLaMA 2 and 3.
    convention : {"torch", "llama"}
        When a narrow format rounds.  ``"torch"`` multiplies by the gain in float32 and rounds once;
        ``"llama"`` rounds the normalised token to the format and multiplies it there, as
        ``LlamaRMSNorm`` of transformers does.  In float32 and float64 both are the same.

    Returns
    -------
    ndarray of float, shape (..., M)
        In the common dtype.

    Raises
    ------
    ShapeError
        If `gamma` does not have one entry a feature.
    OptionError
        If `eps` is not above 0, or the convention is none of the two.
    DTypeError
        If an array is not real.

    Notes
    -----
    Special cases:

    - A row of zeros gives 0.

    References
    ----------
    .. [1] Zhang and Sennrich, 2019, arXiv:1910.07467, eq. 4.

    Examples
    --------
    >>> rms_norm(np.array([[3.0, 4.0]]), np.ones(2)).round(4)
    array([[0.8485, 1.1314]])
    """
    if convention not in ("torch", "llama"):
        raise OptionError(f'convention: expected "torch" or "llama", got {convention!r}')
    x, gamma = floating(x=x, gamma=gamma)
    _check(x, {"gamma": gamma}, eps)
    normal, _ = _scaled(x, eps)
    if convention == "llama":
        normal = _wide(round_to(normal, x.dtype))
    return round_to(normal * _wide(gamma), x.dtype)


def rms_norm_vjp(
    x: FloatArray,
    gamma: FloatArray,
    dy: FloatArray,
    /,
    *,
    eps: float = 1e-6,
    convention: RMSNormConvention = "torch",  # noqa: ARG001 (it says where rounding happens, not what)
) -> RMSNormGradients:
    """Return the gradients of ``sum(dy * rms_norm(x, gamma, eps=eps))``.

    Parameters
    ----------
    x, gamma, eps, convention
        As for `rms_norm`.
    dy : ndarray of float, shape (..., M)
        Gradient of the output.

    Returns
    -------
    RMSNormGradients
        In the common dtype.

    Notes
    -----
    With g = dy * gamma: ``dx = (g - x̂ mean(g x̂)) / √(mean(x²) + eps)``.

    Examples
    --------
    >>> x = np.array([[3.0, 4.0]])
    >>> abs(rms_norm_vjp(x, np.ones(2), x).dx).max() < 1e-6  # along x the norm is constant
    np.True_
    """
    x, gamma, dy = floating(x=x, gamma=gamma, dy=dy)
    _check(x, {"gamma": gamma}, eps)
    _same_shape(dy, x)
    normal, inverse = _scaled(x, eps)
    dgamma, _ = _gain_gradients(normal, _wide(dy))
    g = _wide(dy) * _wide(gamma)
    dx = inverse * (g - normal * _mean(g * normal))
    return RMSNormGradients(round_to(dx, x.dtype), round_to(dgamma, x.dtype))


def _wide(x: FloatArray) -> FloatArray:
    return widen(x).astype(wide_dtype(x.dtype), copy=False)


def _mean(x: FloatArray) -> FloatArray:
    return np.asarray(np.mean(x, axis=-1, keepdims=True))


def _standardized(x: FloatArray, eps: float) -> tuple[FloatArray, FloatArray]:
    """Return (x - μ) / √(σ² + eps) and 1 / √(σ² + eps), in the wide dtype."""
    wide = _wide(x)
    return _scaled(wide - _mean(wide), eps)


def _scaled(x: FloatArray, eps: float) -> tuple[FloatArray, FloatArray]:
    wide = _wide(x)
    inverse = 1 / np.sqrt(_mean(np.square(wide)) + wide.dtype.type(eps))
    return wide * inverse, inverse


def _gain_gradients(normal: FloatArray, dy: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of gain and shift: sums over all tokens."""
    tokens = tuple(range(dy.ndim - 1))
    return np.sum(dy * normal, axis=tokens), np.sum(dy, axis=tokens)


def _check(x: Array, gains: dict[str, Array], eps: float) -> None:
    positive("eps", eps)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ShapeError(f"x: expected at least one axis and one feature, got shape {x.shape}")
    for name, gain in gains.items():
        if gain.shape != x.shape[-1:]:
            raise ShapeError(f"{name}: expected shape {x.shape[-1:]}, got {gain.shape}")


def _same_shape(dy: Array, x: Array) -> None:
    if dy.shape != x.shape:
        raise ShapeError(f"dy: expected the shape of x, {x.shape}, got {dy.shape}")
