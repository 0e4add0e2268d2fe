"""A short causal convolution of each channel with its own taps, and the tokens that it remembers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray

__all__ = ["ConvolutionGradients", "causal_convolution", "causal_convolution_vjp", "with_past"]


class ConvolutionGradients(NamedTuple):
    """Gradients of the tokens with those before them, (B, k - 1 + T, Din), of the taps and of the bias."""

    dtokens: FloatArray
    dtaps: FloatArray
    dbias: FloatArray


def with_past(x: FloatArray, past: FloatArray | None, taps: int) -> FloatArray:
    """Return the tokens with the ``taps - 1`` before them, which are 0 before the first of a sequence.

    Examples
    --------
    >>> with_past(np.ones((1, 2, 1)), None, 4).ravel()
    array([0., 0., 0., 1., 1.])
    """
    before = np.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype) if past is None else past
    return np.concatenate([before.astype(x.dtype, copy=False), x], axis=1)


def causal_convolution(
    tokens: FloatArray, taps: FloatArray, bias: FloatArray | None = None, *, memory: Memory | None = None
) -> FloatArray:
    """Return ``y_t = b + Σ_j taps[:, j] tokens_{t+j}`` for each channel: the last tap meets the token itself.

    Parameters
    ----------
    tokens : ndarray of float, shape (B, k - 1 + T, Din)
        As `with_past` returns them: padded on the left, nothing to cut off on the right.
    taps : ndarray of float, shape (Din, k)
        Weights of each channel, in the order of time, as ``torch.nn.Conv1d`` has them.
    bias : ndarray of float, shape (Din,), optional
        Added.
    memory : Memory, optional
        Counts operations.

    Returns
    -------
    ndarray of float, shape (B, T, Din)
        No token depends on a later one.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    >>> causal_convolution(with_past(x, None, 2), np.array([[10.0, 1.0]])).ravel()
    array([ 1., 12., 23.])
    """
    y = (memory or Memory()).contract("btdk,dk->btd", _windows(tokens, taps), taps)
    return y if bias is None else y + bias


def causal_convolution_vjp(tokens: FloatArray, taps: FloatArray, dy: FloatArray) -> ConvolutionGradients:
    """Return the gradients of ``sum(dy * causal_convolution(tokens, taps, bias))``.

    Examples
    --------
    >>> tokens, taps = np.ones((1, 3, 1)), np.array([[10.0, 1.0]])
    >>> causal_convolution_vjp(tokens, taps, np.ones((1, 2, 1))).dtokens.ravel()
    array([10., 11.,  1.])
    """
    k, T = taps.shape[1], dy.shape[1]
    dtokens = np.zeros_like(tokens)
    for j in range(k):
        dtokens[:, j : j + T] += dy * taps[:, j]
    dtaps = np.einsum("btdk,btd->dk", _windows(tokens, taps), dy)
    return ConvolutionGradients(dtokens, dtaps, dy.sum(axis=(0, 1)))


def _windows(tokens: FloatArray, taps: FloatArray) -> FloatArray:
    """Return what the taps meet at each token, (B, T, Din, k)."""
    k = taps.shape[1]
    T = tokens.shape[1] - k + 1
    return np.stack([tokens[:, j : j + T] for j in range(k)], axis=-1)
