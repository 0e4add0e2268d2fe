"""Causal lightweight and dynamic convolution token by token: a decoder keeps the last K - 1 tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.attention.depthwise_convolution import checked_kernels, kernels
from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.validation import floating

__all__ = ["ConvolutionStep", "convolution_step"]


class ConvolutionStep(NamedTuple):
    """The output of one token, shape (B, D), and the tokens that the next one sees, shape (B, K - 1, D)."""

    out: FloatArray
    buffer: FloatArray


def convolution_step(x: FloatArray, w: FloatArray, buffer: FloatArray | None = None, /) -> ConvolutionStep:
    """Return the causal convolution at one more token, and what is to be kept for the next.

    Parameters
    ----------
    x : ndarray of float, shape (B, D)
        The token.
    w : ndarray of float, shape (H, K) or (D, H, K)
        As for `lightweight_convolution` or `dynamic_convolution`.
    buffer : ndarray of float, shape (B, K - 1, D), optional
        The tokens before it, the oldest first.  At the first token None, which is zeros.

    Returns
    -------
    ConvolutionStep
        In the common dtype.

    Raises
    ------
    ShapeError
        As those functions, or if the buffer has another shape.
    DTypeError
        If an array is not real.

    References
    ----------
    .. [1] github.com/mit-han-lab/lite-transformer, commit 8504193, modules/dynamic_convolution.py,
       ``incremental_state``.

    Examples
    --------
    >>> w, step = np.zeros((1, 3)), None
    >>> for token in (3.0, 6.0, 9.0):
    ...     step = convolution_step(np.array([[token]]), w, step and step.buffer)
    ...     print(step.out.item())
    1.0
    3.0
    6.0
    """
    given = {"x": x, "w": w} | ({} if buffer is None else {"buffer": buffer})
    x, w, *rest = floating(**given)
    if x.ndim != 2:
        raise ShapeError(f"x: expected 2 axes (B, D), got shape {x.shape}")
    checked_kernels(x[:, None], w)
    (B, D), (H, K) = x.shape, w.shape[-2:]
    past = rest[0] if rest else np.zeros((B, K - 1, D), x.dtype)
    if past.shape != (B, K - 1, D):
        raise ShapeError(f"buffer: expected shape {(B, K - 1, D)}, got {past.shape}")
    window = np.concatenate([past, x[:, None]], axis=1)
    p = kernels(widen(x[:, None]), widen(w), Memory())
    heads = widen(window).reshape(B, K, H, D // H)
    if p.ndim == 2:
        out = contract("bkhr,hk->bhr", heads, p)
    else:
        out = contract("bkhr,bhk->bhr", heads, p[:, 0])
    return ConvolutionStep(round_to(out.reshape(B, D), x.dtype), window[:, 1:])
