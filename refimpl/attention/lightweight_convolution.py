"""Lightweight and dynamic convolution: depthwise kernels that softmax makes averages, shared by channels.

Both say for each token how much of its K neighbours to take, as attention does, but by their distance alone:
a lightweight kernel is the same everywhere, a dynamic one is predicted from the token in its middle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.depthwise_convolution import (
    AXES,
    EDGES,
    OPTIONS,
    checked_kernels,
    convolution_terms,
    convolved,
    convolved_vjp,
    kernels,
    sample_convolution,
)
from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.registry import Source, implements, technique
from refimpl.validation import bind_axes, flag, floating

__all__ = [
    "ConvolutionGradients",
    "convolution_by_bands",
    "dynamic_convolution",
    "dynamic_convolution_vjp",
    "lightweight_convolution",
    "lightweight_convolution_vjp",
]

WU = "Wu et al. 2019"
ARXIV = "arXiv:1901.10430"


class ConvolutionGradients(NamedTuple):
    """Gradients of the tokens and of the kernels' weights, in their shapes."""

    dx: FloatArray
    dw: FloatArray


@technique(
    "attention.lightweight_convolution",
    entries=(22,),
    kind="function",
    source=Source(WU, ARXIV, "section 3, eq. for LightConv"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_convolution,
    terms=convolution_terms,
    vjp="refimpl.attention.lightweight_convolution:lightweight_convolution_vjp",
)
def lightweight_convolution(
    x: FloatArray, w: FloatArray, /, *, causal: bool = False, memory: Memory | None = None
) -> FloatArray:
    """Return ``y[t, c] = Σ_j softmax(w[h])_j x[t + j - pad, c]``, where channel c belongs to head h.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, D)
        Tokens.
    w : ndarray of float, shape (H, K)
        One kernel a head, before the softmax.  H divides D; channel c reads kernel ``c * H // D``.
    causal : bool
        Whether a token sees only itself and earlier ones: pad = K - 1.  Otherwise pad = (K - 1) // 2, as much
        on the left as on the right for odd K and one less for even K.
    memory : Memory, optional
        Counts what moves, FLOPs, and the tokens that a causal convolution carries on.

    Returns
    -------
    ndarray of float, shape (B, T, D)
        In the common dtype.

    Raises
    ------
    ShapeError
        If H does not divide D, or the kernels have no taps.
    DTypeError
        If an array is not real.

    Notes
    -----
    ``2 B T D K`` FLOPs and H K weights.  **Special cases**

    - Outside the sequence stand zeros, which the kernels weigh as if they were tokens: near the ends the
      weights that count sum to less than 1.
    - fairseq's class for inputs (B, C, T), which its models do not use, gives channel c the kernel ``c % H``.

    References
    ----------
    .. [1] Wu et al., 2019, arXiv:1901.10430, section 3.
    .. [2] github.com/mit-han-lab/lite-transformer, commit 8504193, modules/lightweight_convolution.py.

    Examples
    --------
    Equal weights are a moving average:

    >>> x = np.array([3.0, 6.0, 9.0]).reshape(1, 3, 1)
    >>> lightweight_convolution(x, np.zeros((1, 3))).ravel()
    array([3., 6., 5.])
    >>> lightweight_convolution(x, np.zeros((1, 3)), causal=True).ravel()
    array([1., 3., 6.])
    """
    return _convolution(x, _with_axes(w, 2), causal, memory or Memory())


@technique(
    "attention.dynamic_convolution",
    entries=(22,),
    kind="function",
    source=Source(WU, ARXIV, "section 4, eq. for DynamicConv"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=lambda rng, **shape: sample_convolution(rng, dynamic=True, **shape),
    terms=convolution_terms,
    vjp="refimpl.attention.lightweight_convolution:dynamic_convolution_vjp",
)
def dynamic_convolution(
    x: FloatArray, w: FloatArray, /, *, causal: bool = False, memory: Memory | None = None
) -> FloatArray:
    """Return ``y[t, c] = Σ_j softmax(x[t] w[:, h])_j x[t + j - pad, c]``: each token predicts its kernels.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, D)
        Tokens.
    w : ndarray of float, shape (D, H, K)
        Projection from a token to the kernels of its H heads.
    causal : bool
        As for `lightweight_convolution`.
    memory : Memory, optional
        Counts what moves, FLOPs, and the tokens that a causal convolution carries on.

    Returns
    -------
    ndarray of float, shape (B, T, D)
        In the common dtype.

    Raises
    ------
    ShapeError
        If shared axes differ, H does not divide D, or the kernels have no taps.
    DTypeError
        If an array is not real.

    Notes
    -----
    ``2 B T D K (H + 1)`` FLOPs.  **Special cases**

    - Zeros outside the sequence take part, as for `lightweight_convolution`.  The released code for
      sequences that are shorter than the kernel and causal cuts the kernel before the softmax, not after,
      if it unfolds; its other path is this one.

    References
    ----------
    .. [1] Wu et al., 2019, arXiv:1901.10430, section 4.
    .. [2] github.com/mit-han-lab/lite-transformer, commit 8504193, modules/dynamic_convolution.py.

    Examples
    --------
    >>> x = np.array([3.0, 6.0, 9.0]).reshape(1, 3, 1)
    >>> dynamic_convolution(x, np.zeros((1, 1, 3))).ravel()
    array([3., 6., 5.])
    """
    return _convolution(x, _with_axes(w, 3), causal, memory or Memory())


def lightweight_convolution_vjp(
    x: FloatArray, w: FloatArray, dy: FloatArray, /, *, causal: bool = False
) -> ConvolutionGradients:
    """Return the gradients of ``sum(dy * lightweight_convolution(x, w))``.

    Parameters
    ----------
    x, w : ndarray of float
        As for `lightweight_convolution`.
    dy : ndarray of float, shape (B, T, D)
        Gradient of the output.
    causal : bool
        That of the forward call.

    Returns
    -------
    ConvolutionGradients
        In the dtype of the arrays; each kernel's gradient sums to 0.

    Examples
    --------
    >>> x = np.ones((1, 2, 1))
    >>> lightweight_convolution_vjp(x, np.zeros((1, 1)), x).dx.ravel()
    array([1., 1.])
    """
    return _convolution_vjp(x, _with_axes(w, 2), dy, causal)


def dynamic_convolution_vjp(
    x: FloatArray, w: FloatArray, dy: FloatArray, /, *, causal: bool = False
) -> ConvolutionGradients:
    """Return the gradients of ``sum(dy * dynamic_convolution(x, w))``.

    Parameters
    ----------
    x, w : ndarray of float
        As for `dynamic_convolution`.
    dy : ndarray of float, shape (B, T, D)
        Gradient of the output.
    causal : bool
        That of the forward call.

    Returns
    -------
    ConvolutionGradients
        In the dtype of the arrays; `dx` holds both paths, through the tokens and through their kernels.

    Examples
    --------
    >>> x = np.ones((1, 2, 1))
    >>> dynamic_convolution_vjp(x, np.zeros((1, 1, 1)), x).dx.ravel()
    array([1., 1.])
    """
    return _convolution_vjp(x, _with_axes(w, 3), dy, causal)


@implements("attention.lightweight_convolution", backend="numpy")
@implements("attention.dynamic_convolution", backend="numpy")
def convolution_by_bands(x: FloatArray, w: FloatArray, /, *, causal: bool = False) -> FloatArray:
    """Return either convolution as one product with a banded matrix a head: what attention would multiply by.

    Parameters
    ----------
    x, w : ndarray of float
        As for `lightweight_convolution`, or for `dynamic_convolution` if `w` has three axes.
    causal : bool
        As there.

    Returns
    -------
    ndarray of float, shape (B, T, D)
        In the common dtype.

    References
    ----------
    .. [1] github.com/mit-han-lab/lite-transformer, commit 8504193, modules/lightweight_convolution.py,
       ``_forward_expanded``.

    Examples
    --------
    >>> convolution_by_bands(np.array([3.0, 6.0, 9.0]).reshape(1, 3, 1), np.zeros((1, 3))).ravel()
    array([3., 6., 5.])
    """
    x, w = checked_kernels(x, w)
    (B, T, D), (H, K) = x.shape, w.shape[-2:]
    p = np.broadcast_to(kernels(widen(x), widen(w), Memory()), (B, T, H, K))
    band = np.zeros((B, H, T, T + K - 1), p.dtype)
    for t in range(T):
        band[:, :, t, t : t + K] = p[:, t]
    before = K - 1 if flag("causal", causal) else (K - 1) // 2
    tokens = widen(x).reshape(B, T, H, D // H)
    mixed = contract("bhts,bshr->bthr", band[..., before : before + T], tokens)
    return round_to(mixed.reshape(x.shape), x.dtype)


def _convolution(x: Any, w: Any, causal: bool, hbm: Memory) -> FloatArray:
    x, w = checked_kernels(x, w)
    out = np.zeros(x.shape, x.dtype)
    with hbm.on_chip():
        tokens, weights = hbm.load("x", x), hbm.load("w", w)
        hbm.store("y", out, None, convolved(tokens, kernels(tokens, weights, hbm), causal, hbm))
    if causal:  # what a decoder would carry on: see `convolution_step`
        B, T, D = x.shape
        before = np.zeros((B, w.shape[-1] - 1, D), tokens.dtype)
        hbm.keep("last tokens", np.concatenate([before, tokens], axis=1)[:, T:])
    return out


def _convolution_vjp(x: Any, w: Any, dy: Any, causal: bool) -> ConvolutionGradients:
    x, w, dy = floating(x=x, w=w, dy=dy)
    checked_kernels(x, w)
    bind_axes({"x": (x, "B T D"), "dy": (dy, "B T D")})
    dx, dw = convolved_vjp(x, w, dy, causal)
    return ConvolutionGradients(round_to(dx, x.dtype), round_to(dw, x.dtype))


def _with_axes(w: Any, count: int) -> Any:
    """Return `w` if it has `count` axes: the two kinds of kernels differ in nothing else."""
    if np.ndim(w) != count:
        axes = "H, K" if count == 2 else "D, H, K"
        raise ShapeError(f"w: expected {count} axes ({axes}), got shape {np.shape(w)}")
    return w
