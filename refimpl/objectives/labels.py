"""Which tokens are labels, and what share each has in a loss: masks, packing, and what is divided by what."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, is_floating, widen
from refimpl.objectives.cross_entropy import token_ids
from refimpl.validation import as_array, bind_axes, whole

__all__ = ["Reduction", "label_shares", "response_mask"]

Reduction = Literal["token", "sequence", "sum"]


def response_mask(
    prompt_lengths: IntArray,
    response_lengths: IntArray,
    /,
    *,
    length: int,
    padding: Literal["right", "left"] = "right",
) -> BoolArray:
    """Return which tokens of padded rows are output.

    Parameters
    ----------
    prompt_lengths, response_lengths : ndarray of int, shape (B,)
        Tokens of each prompt, and of each response with its end-of-sequence token.
    length : int
        T, the width of a row.
    padding : {"right", "left"}
        Where a row shorter than `length` is filled.

    Returns
    -------
    ndarray of bool, shape (B, T)

    Raises
    ------
    ShapeError
        If the two differ in shape.
    OptionError
        If a length is negative, or a row does not fit.

    Examples
    --------
    >>> response_mask(np.array([2, 1]), np.array([2, 1]), length=4).astype(int)
    array([[0, 0, 1, 1],
           [0, 1, 0, 0]])
    >>> response_mask(np.array([2, 1]), np.array([2, 1]), length=4, padding="left").astype(int)
    array([[0, 0, 1, 1],
           [0, 0, 0, 1]])
    """
    prompts = token_ids("prompt_lengths", prompt_lengths)
    responses = token_ids("response_lengths", response_lengths)
    bind_axes({"prompt_lengths": (prompts, "B"), "response_lengths": (responses, "B")})
    T = whole("length", length, least=0)
    if np.any(prompts < 0) or np.any(responses < 0) or np.any(prompts + responses > T):
        raise OptionError(
            f"lengths: expected prompt + response between 0 and {T}, got {prompts.tolist()} "
            f"and {responses.tolist()}"
        )
    if padding not in ("right", "left"):
        raise OptionError(f"padding: expected 'right' or 'left', got {padding!r}")
    start = prompts if padding == "right" else T - responses
    position = np.arange(T)
    return np.asarray((position >= start[:, None]) & (position < (start + responses)[:, None]))


def label_shares(
    logits: FloatArray,
    tokens: IntArray,
    weights: Array | None,
    document_ids: IntArray | None,
    reduction: Reduction,
) -> tuple[IntArray, FloatArray]:
    """Return the tokens, and the factor of each label's loss in the result.

    Parameters
    ----------
    logits, tokens, weights, document_ids, reduction
        As for `refimpl.objectives.next_token_loss`.

    Returns
    -------
    tokens : ndarray of int, shape (B, T)
    shares : ndarray of float64, shape (B, T - 1)
        Of the labels ``tokens[:, 1:]``; 0 for what is no label.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `refimpl.objectives.next_token_loss`.

    Examples
    --------
    >>> label_shares(np.zeros((1, 3, 5)), np.array([[0, 1, 2]]), None, None, "token")[1]
    array([[0.5, 0.5]])
    """
    tokens = token_ids("tokens", tokens)
    shapes: dict[str, tuple[Array, str]] = {"logits": (logits, "B T V"), "tokens": (tokens, "B T")}
    w = np.ones(tokens.shape) if weights is None else _weights(weights)
    shapes["weights"] = (w, "B T")
    ids = None if document_ids is None else token_ids("document_ids", document_ids)
    if ids is not None:
        shapes["document_ids"] = (ids, "B T")
    sizes = bind_axes(shapes)
    if not sizes["V"]:
        raise ShapeError(f"logits: expected a vocabulary of at least 1, got shape {logits.shape}")
    w = w[:, 1:]
    if ids is not None:
        w = np.where(ids[:, 1:] == ids[:, :-1], w, 0.0)
    if reduction == "sum":
        return tokens, w
    if reduction == "token":
        return tokens, _over(w, np.sum(w))
    if reduction == "sequence":
        each = _over(w, np.sum(w, axis=1, keepdims=True))
        return tokens, _over(each, np.count_nonzero(np.any(w != 0, axis=1)))
    raise OptionError(f"reduction: expected 'token', 'sequence' or 'sum', got {reduction!r}")


def _over(w: FloatArray, total: Any) -> FloatArray:
    """Return ``w / total``, 0 where the total is 0: then every weight in it is 0."""
    return np.asarray(w / np.where(total == 0, 1, total))


def _weights(weights: Array) -> FloatArray:
    array = as_array("weights", weights)
    if array.dtype.kind not in "biu" and not is_floating(array.dtype):
        raise DTypeError(f"weights: expected bool or real numbers, got {array.dtype}")
    wide = widen(array).astype(np.float64)
    if not np.all(np.isfinite(wide) & (wide >= 0)):
        raise OptionError("weights: expected finite numbers of at least 0")
    return wide
