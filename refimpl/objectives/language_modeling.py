"""The losses that language models are trained with: next token, and next token of the output part only.

>>> tokens = np.array([[3, 1, 2]])
>>> round(next_token_loss(np.zeros((1, 3, 4)), tokens), 4), round(np.log(4), 4)
(1.3863, np.float64(1.3863))
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import DTypeError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, round_to
from refimpl.objectives.cross_entropy import NegativeLogLikelihood, negative_log_likelihood
from refimpl.objectives.labels import Reduction, label_shares
from refimpl.objectives.samples import (
    AXES,
    EDGES,
    INSTRUCTION_EDGES,
    OPTIONS,
    loss_terms,
    sample_instruction,
    sample_next_token,
)
from refimpl.registry import Source, technique
from refimpl.validation import as_array, floating

__all__ = [
    "LossGradients",
    "instruction_loss",
    "instruction_loss_vjp",
    "next_token_loss",
    "next_token_loss_vjp",
]


class LossGradients(NamedTuple):
    """The gradient of the logits, in their shape and dtype; token ids and masks have none."""

    dlogits: FloatArray


@technique(
    "objectives.next_token",
    entries=(2,),
    kind="function",
    source=Source("Radford et al. 2018", "GPT: Improving Language Understanding", "section 3.1, eq. 1"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_next_token,
    terms=loss_terms,
    vjp="refimpl.objectives.language_modeling:next_token_loss_vjp",
)
def next_token_loss(
    logits: FloatArray,
    tokens: IntArray,
    /,
    *,
    weights: Array | None = None,
    document_ids: IntArray | None = None,
    reduction: Reduction = "token",
) -> float:
    """Return the weighted mean of ``-log softmax(logits[b, t])[tokens[b, t + 1]]``.

    The shift is done here: the logits at t predict the token at t + 1, the last logits predict nothing, and
    no logits predict the first token.

    Parameters
    ----------
    logits : ndarray of float, shape (B, T, V)
        Output of the model on `tokens`.
    tokens : ndarray of int, shape (B, T)
        Token ids, the model's input.
    weights : ndarray of bool or float, shape (B, T), optional
        Weight of each token *as a label*, not below 0: ``weights[b, t]`` weighs the prediction of
        ``tokens[b, t]`` made at t - 1, so the first column has no effect.  Padding has weight 0, and there
        `tokens` may hold anything (-100, say).  Default: 1.
    document_ids : ndarray of int, shape (B, T), optional
        Documents packed into a row: a token that is the first of its document is no label, because the
        logits before it belong to another document.
    reduction : {"token", "sequence", "sum"}
        Divide the weighted sum by the weight of the whole batch ("token"), average the means of the
        sequences that have a label ("sequence": a different loss where they have different lengths, and one
        that depends on how a batch is cut into ranks), or do not divide ("sum": ranks add their sums, and
        divide by the weight of all).

    Returns
    -------
    float
        In nats.

    Raises
    ------
    ShapeError
        If the shapes do not fit together.
    DTypeError
        If tokens are no integers, or logits or weights no numbers.
    OptionError
        If a label with weight is outside [0, V), a weight is negative or not finite, or the reduction is
        unknown.

    Notes
    -----
    Log-probabilities in float32 at least, their sum in float64.  ``exp`` of the result is the perplexity.
    **Special cases**

    - Without any label (T below 2, all weights 0, B = 0) the loss and its gradient are 0; PyTorch has NaN.
    - A label whose logit is -inf costs inf; with weight 0 it costs nothing.

    References
    ----------
    .. [1] Radford et al., 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1.

    Examples
    --------
    >>> logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]]])
    >>> round(next_token_loss(logits, np.array([[1, 0, 2]])), 6), round(-np.log(0.5 * 0.8) / 2, 6)
    (0.458145, np.float64(0.458145))
    """
    (logits,) = floating(logits=logits)
    tokens, shares = label_shares(logits, tokens, weights, document_ids, reduction)
    return float(np.sum(shares * _losses(logits, tokens, shares).losses, dtype=np.float64))


def next_token_loss_vjp(
    logits: FloatArray,
    tokens: IntArray,
    dloss: float,
    /,
    *,
    weights: Array | None = None,
    document_ids: IntArray | None = None,
    reduction: Reduction = "token",
) -> LossGradients:
    """Return the gradient of `next_token_loss`: each label's share of (softmax - one-hot).

    Parameters
    ----------
    logits, tokens, weights, document_ids, reduction
        As for `next_token_loss`.
    dloss : float
        Gradient of the loss, 1 where training begins.

    Returns
    -------
    LossGradients
        ``dlogits`` in the dtype of `logits`.  Rows sum to 0; rows that predict no label are 0.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `next_token_loss`.

    Examples
    --------
    >>> next_token_loss_vjp(np.zeros((1, 2, 4)), np.array([[0, 1]]), 1.0).dlogits[0]
    array([[ 0.25, -0.75,  0.25,  0.25],
           [ 0.  ,  0.  ,  0.  ,  0.  ]])
    """
    (logits,) = floating(logits=logits)
    tokens, shares = label_shares(logits, tokens, weights, document_ids, reduction)
    found = _losses(logits, tokens, shares)
    rows = np.nonzero(shares)  # only these: the softmax of a row that predicts nothing may be NaN
    gradient = np.zeros(logits.shape, found.log_probabilities.dtype)
    wanted = np.exp(found.log_probabilities[rows])
    wanted[np.arange(len(wanted)), tokens[:, 1:][rows]] -= 1
    gradient[rows] = wanted * (float(dloss) * shares[rows])[:, None]
    return LossGradients(round_to(gradient, logits.dtype))


@technique(
    "objectives.instruction",
    entries=(3,),
    kind="function",
    source=Source("Ouyang et al. 2022", "arXiv:2203.02155", "section 3.5: supervised fine-tuning"),
    axes=AXES,
    options={"values": OPTIONS["values"], "packed": OPTIONS["packed"], "reduction": OPTIONS["reduction"]},
    edges=INSTRUCTION_EDGES,
    sample=sample_instruction,
    terms=loss_terms,
    vjp="refimpl.objectives.language_modeling:instruction_loss_vjp",
)
def instruction_loss(
    logits: FloatArray,
    tokens: IntArray,
    response: BoolArray,
    /,
    *,
    document_ids: IntArray | None = None,
    reduction: Reduction = "token",
) -> float:
    """Return the next-token loss of the output part: prompt tokens are read but are no labels.

    Parameters
    ----------
    logits : ndarray of float, shape (B, T, V)
        Output of the model on prompts and responses.
    tokens : ndarray of int, shape (B, T)
        Instruction, input and output, one after the other.
    response : ndarray of bool, shape (B, T)
        True where a token is part of the output, the end-of-sequence token included, so that the model
        learns to stop (`response_mask` makes it from lengths).  It marks labels, not inputs: the first
        output token is predicted at the last prompt position.
    document_ids : ndarray of int, shape (B, T), optional
        Examples packed into a row, as for `next_token_loss`.  Their attention must be block-diagonal too.
    reduction : {"token", "sequence", "sum"}
        As for `next_token_loss`.

    Returns
    -------
    float
        In nats; 0 without any response token.

    Raises
    ------
    DTypeError
        If `response` is not bool (weights go to `next_token_loss`), and as `next_token_loss`.
    ShapeError, OptionError
        As `next_token_loss`.

    References
    ----------
    .. [1] Ouyang et al., 2022, arXiv:2203.02155, section 3.5 and appendix C.
    .. [2] PyTorch, ``cross_entropy(ignore_index=-100)``: the label that prompts get in released code.

    Examples
    --------
    >>> tokens, response = np.array([[1, 2, 3]]), np.array([[False, False, True]])
    >>> logits = np.zeros((1, 3, 4))
    >>> logits[0, 1, 3] = 50.0  # the last prompt position is sure of the response
    >>> round(instruction_loss(logits, tokens, response), 6)
    0.0
    """
    return next_token_loss(
        logits, tokens, weights=_response(response), document_ids=document_ids, reduction=reduction
    )


def instruction_loss_vjp(
    logits: FloatArray,
    tokens: IntArray,
    response: BoolArray,
    dloss: float,
    /,
    *,
    document_ids: IntArray | None = None,
    reduction: Reduction = "token",
) -> LossGradients:
    """Return the gradient of `instruction_loss`: exactly 0 at every position whose next token is a prompt's.

    Examples
    --------
    >>> tokens, response = np.array([[1, 2, 3]]), np.array([[False, False, True]])
    >>> instruction_loss_vjp(np.zeros((1, 3, 4)), tokens, response, 1.0).dlogits[0, :, 3]
    array([ 0.  , -0.75,  0.  ])
    """
    return next_token_loss_vjp(
        logits, tokens, dloss, weights=_response(response), document_ids=document_ids, reduction=reduction
    )


def _response(response: BoolArray) -> BoolArray:
    array = as_array("response", response)
    if array.dtype != np.bool_:
        raise DTypeError(f"response: expected bool, got {array.dtype}; weights go to next_token_loss")
    return array


def _losses(logits: FloatArray, tokens: IntArray, shares: FloatArray) -> NegativeLogLikelihood:
    return negative_log_likelihood(logits[:, :-1], tokens[:, 1:], shares != 0)
