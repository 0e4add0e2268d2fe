"""Hashes of a token's place and neighbours: the other ways of Table 3 to pick an expert without a router."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, widen
from refimpl.random import philox4x32
from refimpl.registry import Case, Source, technique
from refimpl.transformer.embedding import indices
from refimpl.validation import floating, whole

__all__ = ["bigram_hash", "future_hash", "position_hash", "predicted_future_hash", "previous_hash"]

_PAPER = "Roller et al. 2021", "arXiv:2106.04426"
_LOCATOR = "section 3.1 and Table 3"
_WORD = 32  # bits of a Philox word
_AXES = {"B": (0, 2), "T": (0, 8), "V": (1, 9), "E": (1, 5)}
_EDGES: tuple[dict[str, Any], ...] = (
    {"B": 0},
    {"B": 1, "T": 0},
    {"B": 1, "T": 1, "V": 1, "E": 1},
    {"B": 2, "T": 8, "V": 2, "E": 5},
)


def _sample_position(rng: np.random.Generator, *, B: int, T: int, V: int, E: int, start: int) -> Case:
    return Case((rng.integers(0, V, (B, T)), rng.integers(0, E, T + start)), {"start": start})


def _sample(rng: np.random.Generator, *, B: int, T: int, V: int, E: int) -> Case:
    return Case((rng.integers(0, V, (B, T)), rng.integers(0, E, V)))


@technique(
    "moe.hash.position",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, f"{_LOCATOR}, Position"),
    axes={**_AXES, "start": (0, 3)},
    edges=_EDGES,
    sample=_sample_position,
    exact=True,
)
def position_hash(tokens: IntArray, table: IntArray, /, *, start: int = 0) -> IntArray:
    """Return the expert of each token by its position in the sequence, whatever the token is.

    Parameters
    ----------
    tokens : ndarray of int, shape (..., T)
        Of which only the shape matters.
    table : ndarray of int, shape (P,)
        Expert of each position, such as `refimpl.moe.hash_tables.random_table` gives for P draws.
    start : int
        Position of the first token: that of the cache, when decoding.

    Returns
    -------
    ndarray of int, shape (..., T)
        ``table[start + t]``.

    Raises
    ------
    OptionError
        If the table has no entry for a position.
    ShapeError, DTypeError
        If an array has too few axes, or holds no integers.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1.

    Examples
    --------
    >>> position_hash(np.array([[7, 7, 7]]), np.array([1, 0, 1]))
    array([[1, 0, 1]])
    """
    tokens, table = _tokens("tokens", tokens), _table(table)
    first, length = whole("start", start, 0), tokens.shape[-1]
    if length and first + length > len(table):
        raise OptionError(f"table: expected at least {first + length} positions, got {len(table)}")
    return np.broadcast_to(table[first : first + length], tokens.shape).copy()


def _sample_bigram(rng: np.random.Generator, *, B: int, T: int, V: int, E: int, seed: int) -> Case:
    options = {"num_experts": E, "seed": seed, "first_token": int(rng.integers(V))}
    return Case((rng.integers(0, V, (B, T)),), options)


@technique(
    "moe.hash.bigram",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, f"{_LOCATOR}, Bigram"),
    axes={**_AXES, "seed": (0, 3)},
    edges=_EDGES,
    sample=_sample_bigram,
    exact=True,
)
def bigram_hash(tokens: IntArray, /, *, num_experts: int, first_token: int, seed: int = 0) -> IntArray:
    """Return the expert of each token by the token and the one before it.

    Parameters
    ----------
    tokens : ndarray of int, shape (..., T)
        Token ids below 2**32.
    num_experts : int
        E, at most 2**32.
    first_token : int
        What stands before the first token: the id that begins a sequence.
    seed : int
        Another seed is another hash.

    Returns
    -------
    ndarray of int, shape (..., T)
        ``floor(E w / 2**32)`` with w the first Philox word of the pair.

    Raises
    ------
    OptionError
        If a token is negative, or there is no expert.
    ShapeError, DTypeError
        If `tokens` has no axis, or holds no integers.

    Notes
    -----
    A table would need V² entries, so the pair is hashed: counter ``(x_{t-1}, x_t, 0, 0)`` and key `seed` of
    Philox4x32-10 [2]_, which is the same on every machine and in every run.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1.
    .. [2] Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.

    Examples
    --------
    >>> bigram_hash(np.array([5, 6, 5, 6]), num_experts=16, first_token=6)
    array([ 8, 13,  8, 13])
    """
    experts = whole("num_experts", num_experts)
    tokens = _tokens("tokens", tokens)
    before = _shifted(tokens, whole("first_token", first_token, 0))
    word = philox4x32(before, tokens, 0, 0, seed)[..., 0].astype(np.uint64)
    return np.asarray((word * np.uint64(experts)) >> np.uint64(_WORD)).astype(np.int64)


def _sample_previous(rng: np.random.Generator, **axes: int) -> Case:
    return _sample(rng, **axes).replace(first_token=int(rng.integers(axes["V"])))


@technique(
    "moe.hash.previous",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, f"{_LOCATOR}, Previous Token"),
    axes=_AXES,
    edges=_EDGES,
    sample=_sample_previous,
    exact=True,
)
def previous_hash(tokens: IntArray, table: IntArray, /, *, first_token: int) -> IntArray:
    """Return the expert of each token by the token before it.

    Parameters
    ----------
    tokens : ndarray of int, shape (..., T)
        Token ids.
    table : ndarray of int, shape (V,)
        Expert of each token of the vocabulary.
    first_token : int
        What stands before the first token: the id that begins a sequence.

    Returns
    -------
    ndarray of int, shape (..., T)
        ``table[x_{t-1}]``.

    Raises
    ------
    OptionError
        If a token is outside the table.
    ShapeError, DTypeError
        If an array has too few axes, or holds no integers.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1.

    Examples
    --------
    >>> previous_hash(np.array([1, 2, 0]), np.array([10, 11, 12]), first_token=0)
    array([10, 11, 12])
    """
    table = _table(table)
    (first,) = indices("first_token", np.array([first_token]), len(table))
    return table[_shifted(_tokens("tokens", tokens, len(table)), int(first))]


def _sample_future(rng: np.random.Generator, **axes: int) -> Case:
    return _sample(rng, **axes).replace(last_token=int(rng.integers(axes["V"])))


@technique(
    "moe.hash.future",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, f"{_LOCATOR}, Future Token (Oracle)"),
    axes=_AXES,
    edges=_EDGES,
    sample=_sample_future,
    exact=True,
)
def future_hash(tokens: IntArray, table: IntArray, /, *, last_token: int) -> IntArray:
    """Return the expert of each token by the token that really follows: an oracle, no language model.

    Parameters
    ----------
    tokens : ndarray of int, shape (..., T)
        Token ids.
    table : ndarray of int, shape (V,)
        Expert of each token of the vocabulary.
    last_token : int
        What follows the last token: the label there, or the id that ends a sequence.

    Returns
    -------
    ndarray of int, shape (..., T)
        ``table[x_{t+1}]``.

    Raises
    ------
    OptionError
        If a token is outside the table.
    ShapeError, DTypeError
        If an array has too few axes, or holds no integers.

    Notes
    -----
    The expert tells the model about the label: the paper's PPL of 1.97 says how much, and is no result that
    another row may be compared with.  `predicted_future_hash` is what a model may do.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1 and Table 3.

    Examples
    --------
    >>> future_hash(np.array([1, 2, 0]), np.array([10, 11, 12]), last_token=0)
    array([12, 10, 10])
    """
    table = _table(table)
    (last,) = indices("last_token", np.array([last_token]), len(table))
    return table[_shifted(_tokens("tokens", tokens, len(table))[..., ::-1], int(last))[..., ::-1]]


def _sample_predicted(rng: np.random.Generator, *, B: int, T: int, V: int, E: int, values: str) -> Case:
    logits = rng.standard_normal((B, T, V)) if values == "normal" else 1.0 * rng.integers(0, 2, (B, T, V))
    return Case((logits, rng.integers(0, E, V)))


@technique(
    "moe.hash.predicted_future",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, f"{_LOCATOR}, Future Token (Predicted)"),
    axes=_AXES,
    options={"values": ("normal", "tied")},
    edges=_EDGES,
    sample=_sample_predicted,
    exact=True,
)
def predicted_future_hash(logits: FloatArray, table: IntArray, /) -> IntArray:
    """Return the expert of each token by the next token that a baseline model predicts.

    Parameters
    ----------
    logits : ndarray of float, shape (..., T, V)
        The baseline's scores of the next token.
    table : ndarray of int, shape (V,)
        Expert of each token of the vocabulary.

    Returns
    -------
    ndarray of int, shape (..., T)
        ``table[argmax(logits)]``, ties to the lowest token.

    Raises
    ------
    ShapeError
        If vocabularies differ, or there is none.
    DTypeError
        If `logits` is not real, or the table holds no integers.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1.

    Examples
    --------
    >>> predicted_future_hash(np.array([[0.0, 2.0, 1.0]]), np.array([10, 11, 12]))
    array([11])
    """
    (logits,) = floating(logits=logits)
    table = _table(table)
    if logits.ndim < 1 or logits.shape[-1] != len(table) or not len(table):
        raise ShapeError(f"logits: expected shape (..., {len(table)}), got {logits.shape}")
    return np.asarray(table[np.argmax(widen(logits), axis=-1)])


def _shifted(tokens: IntArray, before: int) -> IntArray:
    """Return what stands before each token."""
    first = np.full((*tokens.shape[:-1], 1), before, dtype=np.int64)
    return np.concatenate([first, tokens], axis=-1)[..., : tokens.shape[-1]]


def _tokens(name: str, tokens: IntArray, size: int = 2**_WORD) -> IntArray:
    array = indices(name, tokens, size)
    if not array.ndim:
        raise ShapeError(f"{name}: expected shape (..., T), got a scalar")
    return array


def _table(table: IntArray) -> IntArray:
    array = indices("table", table, np.iinfo(np.int64).max)
    if array.ndim != 1:
        raise ShapeError(f"table: expected shape (V,), got {array.shape}")
    return array.astype(np.int64, copy=False)
