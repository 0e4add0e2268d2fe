"""Sampling from a model: the law that temperature, top-k and nucleus leave, its draws, and the plain loop.

Logits become a law first (`sampling_law`) and a token second (`inverse_cdf`, one uniform number a token), so
that every method of decoding can be held to the law, and two programs can be given the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from refimpl.decoding.samples import SAMPLING, sample_law, sample_sampling
from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, wide_dtype, widen
from refimpl.registry import Source, technique
from refimpl.validation import finite, floating, whole

__all__ = ["Generated", "Model", "autoregressive", "inverse_cdf", "sampling", "sampling_law"]

# ``model(tokens [B, t], cache) -> (logits [B, t, V], cache)``: `refimpl.transformer.decoder_step` with its
# parameters bound, or any table of laws.  The first cache is None.
Model: TypeAlias = Callable[[IntArray, Any], tuple[FloatArray, Any]]


class Generated(NamedTuple):
    """The prompt with what was generated behind it, (B, T + steps), and how often the model was called."""

    tokens: IntArray
    calls: int


@technique(
    "decoding.sampling.law",
    entries=(107,),
    kind="function",
    source=Source("Holtzman et al. 2020", "arXiv:1904.09751", "section 3.1 and eq. 2"),
    sample=sample_law,
    **SAMPLING,
)
def sampling_law(
    logits: FloatArray,
    /,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> FloatArray:
    """Return the probabilities of the next token that temperature, top-k and nucleus leave, in this order.

    Parameters
    ----------
    logits : ndarray of float, shape (..., V)
        Scores of the model; -inf forbids a token.
    temperature : float
        Divides the logits.  0 is greedy decoding: the first of the largest has probability 1.
    top_k : int, optional
        Only this many most probable tokens stay; of equal ones those of lowest index.  More than V: all.
    top_p : float
        Nucleus: the fewest most probable tokens stay whose probabilities, renormalised after top-k, sum to at
        least this.  The token that crosses the threshold stays; 0 leaves one token, 1 leaves all.

    Returns
    -------
    ndarray of float, shape (..., V)
        Each row sums to 1, in the wide dtype of `logits`: a format of 8 bits would forbid rare tokens.

    Raises
    ------
    OptionError
        If an option is out of range, a row has no finite logit, or holds NaN or +inf.
    ShapeError
        If there is no axis of tokens, or it is empty.
    DTypeError
        If `logits` is not real.

    Notes
    -----
    The order of the filters matters: a temperature after the nucleus would leave other tokens.  Tokens of
    equal probability at the edge of a filter are told apart by index, lowest first; libraries that compare
    probabilities with a threshold keep all of them.

    References
    ----------
    .. [1] Holtzman et al., 2020, arXiv:1904.09751, section 3.1 and eq. 2.
    .. [2] github.com/huggingface/transformers, ``generation/logits_process.py`` (the order of the filters).

    Examples
    --------
    >>> logits = np.log([0.5, 0.25, 0.15, 0.1])
    >>> sampling_law(logits, top_p=0.7).round(3)
    array([0.667, 0.333, 0.   , 0.   ])
    >>> sampling_law(logits, temperature=0.0)
    array([1., 0., 0., 0.])
    """
    (logits,) = floating(logits=logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"logits: expected a last axis of at least one token, got shape {logits.shape}")
    if not finite("temperature", temperature) >= 0:
        raise OptionError(f"temperature: expected a number from 0, got {temperature}")
    if not 0 <= finite("top_p", top_p) <= 1:
        raise OptionError(f"top_p: expected a number in [0, 1], got {top_p}")
    count = logits.shape[-1] if top_k is None else min(whole("top_k", top_k), logits.shape[-1])
    wide = widen(logits).astype(wide_dtype(logits.dtype), copy=False)
    top = np.max(wide, axis=-1, keepdims=True)
    if not np.all(np.isfinite(top)):  # NaN and +inf come out on top, and -inf where all is forbidden
        raise OptionError("logits: expected a largest logit that is finite in every row, and no NaN")

    order = np.argsort(-wide, axis=-1, kind="stable")  # stable: of equal ones the lowest index first
    falling = np.take_along_axis(wide - top, order, axis=-1)
    if temperature == 0:
        weights = (np.arange(falling.shape[-1]) == 0) * np.ones_like(falling)
    else:
        with np.errstate(over="ignore", under="ignore"):  # a vanishing temperature makes -inf, and then 0
            weights = np.exp(falling / wide.dtype.type(temperature))
    weights[..., count:] = 0
    if top_p < 1:  # at 1 nothing may be lost to the rounding of a sum
        mass = np.cumsum(weights, axis=-1)
        # A token stays while those before it have not reached the threshold; the first always does.
        weights[..., 1:][mass[..., :-1] >= top_p * mass[..., -1:]] = 0
    law: FloatArray = np.empty_like(weights)
    np.put_along_axis(law, order, weights / np.sum(weights, axis=-1, keepdims=True), axis=-1)
    return law


def inverse_cdf(probabilities: FloatArray, uniforms: FloatArray, /) -> IntArray:
    """Return for each law the first token whose cumulated probability exceeds the uniform number.

    Parameters
    ----------
    probabilities : ndarray of float, shape (..., V)
        Rows that sum to about 1.
    uniforms : ndarray of float, shape (...)
        Draws in [0, 1); they broadcast against the leading axes.

    Returns
    -------
    ndarray of int64, shape (...)
        Tokens.  One of probability 0 is never drawn, whatever the rounding of the sums.

    Raises
    ------
    OptionError
        If a uniform number is outside [0, 1).
    ShapeError
        If the shapes do not broadcast.

    Examples
    --------
    >>> inverse_cdf(np.array([0.0, 0.5, 0.5, 0.0]), np.array([0.0, 0.49, 0.5, 0.999]))
    array([1, 1, 2, 2])
    """
    (p,) = floating(probabilities=probabilities)
    (u,) = floating(uniforms=uniforms)
    if not np.all((u >= 0) & (u < 1)):
        raise OptionError("uniforms: expected numbers in [0, 1)")
    try:
        shape = np.broadcast_shapes(p.shape[:-1], u.shape)
    except ValueError:
        raise ShapeError(f"uniforms: {u.shape} does not broadcast against laws {p.shape[:-1]}") from None
    cumulated = np.cumsum(widen(p).astype(np.float64), axis=-1)
    # Scaled by the sum, so that the last token with a probability takes what rounding left over.
    passed = cumulated <= u.astype(np.float64)[..., None] * cumulated[..., -1:]
    last = p.shape[-1] - 1 - np.argmax((widen(p) > 0)[..., ::-1], axis=-1)
    tokens: IntArray = np.minimum(np.sum(passed, axis=-1), np.broadcast_to(last, shape)).astype(np.int64)
    return tokens


@technique(
    "decoding.sampling",
    entries=(107,),
    kind="function",
    source=Source("Holtzman et al. 2020", "arXiv:1904.09751", "section 3"),
    sample=sample_sampling,
    exact=True,
    **SAMPLING,
)
def sampling(
    logits: FloatArray,
    /,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    uniforms: FloatArray | None = None,
    rng: np.random.Generator | int | None = None,
) -> IntArray:
    """Return one token drawn from the law of each row of logits.

    Parameters
    ----------
    logits : ndarray of float, shape (..., V)
        Scores of the model.
    temperature, top_k, top_p
        As for `sampling_law`.
    uniforms : ndarray of float, shape (...), optional
        The draws, in [0, 1): a token is the first whose cumulated probability, in order of index, exceeds its
        draw.
    rng : numpy.random.Generator or int, optional
        Where the draws come from if there are none.  Greedy decoding draws nothing.

    Returns
    -------
    ndarray of int64, shape (...)
        Token ids.

    Raises
    ------
    OptionError
        As for `sampling_law`, and if a uniform number is outside [0, 1), or both `uniforms` and `rng` are
        given.
    ShapeError
        If the shapes do not fit.
    DTypeError
        If an array is not real.

    References
    ----------
    .. [1] Holtzman et al., 2020, arXiv:1904.09751, section 3.

    Examples
    --------
    >>> sampling(np.log([[0.2, 0.5, 0.3]]), uniforms=np.array([0.75]))
    array([2])
    >>> sampling(np.log([[0.2, 0.5, 0.3]]), temperature=0.0)
    array([1])
    """
    law = sampling_law(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if uniforms is not None and rng is not None:
        raise OptionError("uniforms, rng: expected one of the two, got both")
    if uniforms is None:
        greedy = temperature == 0
        uniforms = np.zeros(law.shape[:-1]) if greedy else np.random.default_rng(rng).random(law.shape[:-1])
    if np.shape(uniforms) != law.shape[:-1]:
        raise ShapeError(f"uniforms: expected shape {law.shape[:-1]}, got {np.shape(uniforms)}")
    return inverse_cdf(law, uniforms)


def autoregressive(
    model: Model,
    prompt: IntArray,
    /,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    uniforms: FloatArray | None = None,
    rng: np.random.Generator | int | None = None,
) -> Generated:
    """Return a prompt continued by `steps` tokens, one call of the model a token: the baseline of decoding.

    Parameters
    ----------
    model : callable
        ``model(tokens, cache) -> (logits, cache)``; `Model` says more.
    prompt : ndarray of int, shape (B, T)
        At least one token.
    steps : int
        How many tokens to generate.
    temperature, top_k, top_p
        As for `sampling_law`.
    uniforms : ndarray of float, shape (steps, B), optional
        The draws.
    rng : numpy.random.Generator or int, optional
        Where the draws come from otherwise.

    Returns
    -------
    Generated
        Tokens and calls.  The first call reads the whole prompt.

    Raises
    ------
    ShapeError
        If the prompt has no token, or the draws have another shape.
    OptionError
        As for `sampling`.

    Examples
    --------
    A model of three tokens that always says the next one, and needs no cache:

    >>> def following(tokens, cache):
    ...     return 9.0 * np.eye(3)[(tokens + 1) % 3], cache
    >>> autoregressive(following, np.array([[0]]), steps=4, temperature=0.0)
    Generated(tokens=array([[0, 1, 2, 0, 1]]), calls=4)
    """
    tokens = np.asarray(prompt)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ShapeError(f"prompt: expected shape (B, T) with T of at least 1, got {tokens.shape}")
    if uniforms is not None and np.shape(uniforms) != (whole("steps", steps, 0), len(tokens)):
        raise ShapeError(f"uniforms: expected shape {(steps, len(tokens))}, got {np.shape(uniforms)}")
    if uniforms is not None and rng is not None:
        raise OptionError("uniforms, rng: expected one of the two, got both")
    source = None if uniforms is not None else np.random.default_rng(rng)
    cache: Any = None
    new = tokens
    for step in range(whole("steps", steps, 0)):
        logits, cache = model(new, cache)
        draws = {"uniforms": uniforms[step]} if uniforms is not None else {"rng": source}
        new = sampling(logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, **draws)[:, None]
        tokens = np.concatenate([tokens, new], axis=1)
    return Generated(tokens, steps)
