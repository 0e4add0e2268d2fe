"""Cross-entropy of integer labels under logits: the sum that every language-modelling loss is made of.

>>> per_label, _ = negative_log_likelihood(np.zeros((3, 8)), np.array([0, 5, 7]))
>>> np.exp(per_label)
array([8., 8., 8.])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError
from refimpl.numerics import BoolArray, FloatArray, IntArray, wide_dtype, widen
from refimpl.validation import as_array

__all__ = ["NegativeLogLikelihood", "log_softmax", "negative_log_likelihood", "token_ids"]


class NegativeLogLikelihood(NamedTuple):
    """``-log softmax(z)[label]`` of every position, and the log-probabilities it was read from."""

    losses: FloatArray
    log_probabilities: FloatArray


def token_ids(name: str, value: Any) -> IntArray:
    """Return `value` as an array of integers.

    Raises
    ------
    DTypeError
        If it holds anything else; truth values are no token ids.

    Examples
    --------
    >>> token_ids("tokens", [3, 1])
    array([3, 1])
    """
    array = as_array(name, value)
    if not array.size:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"{name}: expected integers, got {array.dtype}")
    return array


def log_softmax(logits: FloatArray) -> FloatArray:
    """Return ``z - logsumexp(z)`` along the last axis, with the largest logit subtracted first.

    Parameters
    ----------
    logits : ndarray of float, shape (..., V)
        -inf excludes a class, such as the padding of a vocabulary.

    Returns
    -------
    ndarray, shape (..., V)
        In float64 for float64 logits, otherwise in float32.

    Notes
    -----
    **Special cases**: a row of nothing but -inf has no distribution and gives NaN, as does one with +inf.

    Examples
    --------
    >>> log_softmax(np.array([1000.0, 1000.0, -np.inf]))
    array([-0.69314718, -0.69314718,        -inf])
    """
    z = widen(logits).astype(wide_dtype(logits.dtype), copy=False)
    with np.errstate(invalid="ignore"):  # inf - inf, documented as NaN
        shifted = z - np.max(z, axis=-1, keepdims=True, initial=-np.inf)
        total: FloatArray = np.sum(np.exp(shifted), axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(total))


def negative_log_likelihood(
    logits: FloatArray, labels: IntArray, counted: BoolArray | None = None
) -> NegativeLogLikelihood:
    """Return the loss of every label, 0 where it is not `counted`.

    Parameters
    ----------
    logits : ndarray of float, shape (..., V)
        Scores of the classes.
    labels : ndarray of int, shape (...)
        The class of each position, in [0, V) where counted; elsewhere anything, such as -100.
    counted : ndarray of bool, shape (...), optional
        Which labels have a loss.  Default: all.

    Returns
    -------
    NegativeLogLikelihood
        ``losses`` shaped like `labels`, ``log_probabilities`` like `logits`.

    Raises
    ------
    OptionError
        If a counted label is no class.

    Examples
    --------
    >>> negative_log_likelihood(np.zeros((1, 2)), np.array([-100]), np.array([False])).losses
    array([0.])
    """
    vocabulary = logits.shape[-1]
    counted = np.ones(labels.shape, bool) if counted is None else counted
    outside = counted & ((labels < 0) | (labels >= vocabulary))
    if np.any(outside):
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        raise OptionError(
            f"labels: expected ids in [0, {vocabulary}), got {int(labels[where])} at {list(where)} "
            f"({int(outside.sum())} of {labels.size} are outside)"
        )
    log_p = log_softmax(logits)
    safe = np.where(counted, labels, 0)
    if not vocabulary:  # then nothing is counted
        return NegativeLogLikelihood(np.zeros(labels.shape, log_p.dtype), log_p)
    losses = -np.take_along_axis(log_p, safe[..., None], axis=-1)[..., 0]
    return NegativeLogLikelihood(np.where(counted, losses, losses.dtype.type(0)), log_p)
