"""Prompt tuning: a few learned embeddings before those of the text, at the input only."""

from __future__ import annotations

import numpy as np

from refimpl.errors import DTypeError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = ["soft_prompt", "soft_prompt_labels", "soft_prompt_vjp"]


def sample_prompt(rng: np.random.Generator, *, B: int, T: int, P: int, M: int) -> Case:
    """Return a call of `soft_prompt`.

    Examples
    --------
    >>> [a.shape for a in sample_prompt(np.random.default_rng(0), B=2, T=3, P=4, M=5).args]
    [(4, 5), (2, 3, 5)]
    """
    return Case((rng.standard_normal((P, M)), rng.standard_normal((B, T, M))))


@technique(
    "peft.soft_prompt",
    entries=(64,),
    kind="function",
    source=Source("Lester et al. 2021", "arXiv:2104.08691", "section 2"),
    axes={"B": (1, 3), "T": (0, 5), "P": (0, 4), "M": (1, 4)},
    edges=({"B": 0, "P": 2}, {"T": 0, "P": 2}, {"P": 0, "T": 3}, {"B": 1, "T": 1, "P": 1, "M": 1}),
    sample=sample_prompt,
    vjp="refimpl.peft.soft_prompt:soft_prompt_vjp",
)
def soft_prompt(prompt: FloatArray, embedded: FloatArray, /) -> FloatArray:
    """Return every sequence of embeddings with the learned prompt before it.

    Parameters
    ----------
    prompt : ndarray of float, shape (P, M)
        The trained embeddings.
    embedded : ndarray of float, shape (B, T, M)
        Those of the text.

    Returns
    -------
    ndarray of float, shape (B, P + T, M)

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    Notes
    -----
    Positions of the text move by P, and its labels too (`soft_prompt_labels`).  A prompt of the embeddings
    of real tokens is exactly that text as a prompt.  P M numbers are trained: 20,480 for P = 5 in T5-XXL.

    References
    ----------
    .. [1] Lester et al., 2021, arXiv:2104.08691, section 2.

    Examples
    --------
    >>> soft_prompt(np.array([[9.0]]), np.array([[[1.0], [2.0]]]))[0].T
    array([[9., 1., 2.]])
    """
    prompt, embedded = floating(prompt=prompt, embedded=embedded)
    size = bind_axes({"prompt": (prompt, "P M"), "embedded": (embedded, "B T M")})
    return np.concatenate([np.broadcast_to(prompt, (size["B"], *prompt.shape)), embedded], axis=1)


def soft_prompt_vjp(
    prompt: FloatArray, embedded: FloatArray, dy: FloatArray, /
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of the prompt, summed over the sequences, and of the embeddings.

    Examples
    --------
    >>> dprompt, _ = soft_prompt_vjp(np.zeros((1, 1)), np.zeros((2, 3, 1)), np.ones((2, 4, 1)))
    >>> dprompt
    array([[2.]])
    """
    prompt, embedded, dy = floating(prompt=prompt, embedded=embedded, dy=dy)
    P = len(prompt)
    bind_axes({"prompt": (prompt, "P M"), "embedded": (embedded, "B T M"), "dy": (dy[:, P:], "B T M")})
    shared = widen(dy[:, :P]).sum(axis=0, dtype=wide_dtype(dy.dtype))
    return round_to(shared, dy.dtype), dy[:, P:]


def soft_prompt_labels(labels: IntArray, /, *, length: int, ignore: int = -100) -> IntArray:
    """Return labels for prompted sequences: nothing is learned on the prompt's positions.

    Parameters
    ----------
    labels : ndarray of int, shape (B, T)
        Of the text.
    length : int
        P, how many embeddings the prompt has.
    ignore : int
        What marks a position that has no label.

    Returns
    -------
    ndarray of int, shape (B, P + T)
        In the dtype of `labels` if that can hold `ignore`, else int64.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If `labels` is no integer matrix or `length` is negative.

    Examples
    --------
    >>> soft_prompt_labels(np.array([[7, 8]]), length=2)
    array([[-100, -100,    7,    8]])
    """
    labels = as_array("labels", labels)
    bind_axes({"labels": (labels, "B T")})
    if not np.issubdtype(labels.dtype, np.integer):
        raise DTypeError(f"labels: expected integers, got {labels.dtype}")
    whole("length", length, least=0)
    limits = np.iinfo(labels.dtype)
    if not limits.min <= ignore <= limits.max:
        labels = labels.astype(np.int64)
    return np.pad(labels, ((0, 0), (length, 0)), constant_values=ignore)
