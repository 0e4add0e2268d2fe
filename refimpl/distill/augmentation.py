"""Data augmentation for distillation: copies of a sentence with some words replaced by likely ones."""

from __future__ import annotations

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, IntArray, wide_dtype, widen
from refimpl.objectives.cross_entropy import token_ids
from refimpl.peft.retrieval import unit_vectors
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, finite, floating, whole

__all__ = ["augment", "nearest_embeddings"]


def sample_sentence(rng: np.random.Generator, *, T: int, K: int, copies: int, probability: float) -> Case:
    """Return a call of `augment`; some positions have fewer than K candidates.

    Examples
    --------
    >>> case = sample_sentence(np.random.default_rng(0), T=2, K=3, copies=1, probability=0.5)
    >>> [a.shape for a in case.args]
    [(2,), (2, 3), (1, 2), (1, 2)]
    """
    tokens, candidates = rng.integers(0, 50, T), rng.integers(50, 99, (T, K))
    missing = rng.integers(0, K + 1, T)
    candidates[np.arange(K)[None, :] >= missing[:, None]] = -1
    draws = rng.random((2, copies, T))
    return Case((tokens, candidates, *draws), {"probability": probability})


@technique(
    "distill.augmentation",
    entries=(109,),
    kind="function",
    source=Source("Jiao et al. 2020", "arXiv:1909.10351", "section 3.3, Algorithm 1: data augmentation"),
    axes={"T": (0, 6), "K": (1, 4), "copies": (0, 4)},
    options={"probability": (0.0, 0.4, 1.0)},
    edges=(
        {"T": 0, "K": 2, "copies": 2},
        {"T": 3, "K": 2, "copies": 0},
        {"T": 4, "K": 0, "copies": 2, "probability": 1.0},
        {"T": 1, "K": 1, "copies": 1, "probability": 1.0},
    ),
    sample=sample_sentence,
    exact=True,
)
def augment(
    tokens: IntArray,
    candidates: IntArray,
    u_replace: FloatArray,
    u_choice: FloatArray,
    /,
    *,
    probability: float = 0.4,
) -> IntArray:
    """Return a sentence, and copies of it in which words are replaced by candidates at random.

    Parameters
    ----------
    tokens : ndarray of int, shape (T,)
        The sentence.
    candidates : ndarray of int, shape (T, K)
        Replacements for each position: of whole words the most likely ones of a masked language model, of
        pieces of words the nearest embeddings (`nearest_embeddings`).  -1 fills positions with fewer.
    u_replace, u_choice : ndarray of float, shape (copies, T)
        Draws in [0, 1): whether to replace, and by which candidate.
    probability : float
        p_t, that a word is replaced, in [0, 1]; 0.4 in the paper.

    Returns
    -------
    ndarray of int, shape (1 + copies, T)
        The sentence itself first.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not of their kinds.
    OptionError
        If `probability` is not in [0, 1], or a draw not in [0, 1).

    Notes
    -----
    A position is replaced if its draw is below `probability`; the choice is uniform over its candidates.
    Without candidates it stays.

    References
    ----------
    .. [1] Jiao et al., 2020, arXiv:1909.10351, Algorithm 1.

    Examples
    --------
    >>> tokens, candidates = np.array([5, 6]), np.array([[1, 2], [3, -1]])
    >>> augment(tokens, candidates, np.array([[0.1, 0.9]]), np.array([[0.7, 0.0]]))
    array([[5, 6],
           [2, 6]])
    """
    tokens, candidates = token_ids("tokens", tokens), token_ids("candidates", candidates)
    u_replace, u_choice = floating(u_replace=u_replace, u_choice=u_choice)
    bind_axes(
        {"tokens": (tokens, "T"), "candidates": (candidates, "T K"), "u_replace": (u_replace, "copies T"),
         "u_choice": (u_choice, "copies T")}
    )  # fmt: skip
    if not 0 <= finite("probability", probability) <= 1:
        raise OptionError(f"probability: expected a number in [0, 1], got {probability}")
    for name, draws in (("u_replace", widen(u_replace)), ("u_choice", widen(u_choice))):
        if not np.all((draws >= 0) & (draws <= 1)):
            raise OptionError(f"{name}: expected draws in [0, 1)")
    count = np.sum(candidates >= 0, axis=1)
    # A draw of 1, which a narrow format may round to, means the last candidate.
    index = np.minimum(np.floor(widen(u_choice) * count).astype(np.int64), np.maximum(count - 1, 0))
    replace = (widen(u_replace) < probability) & (count > 0)
    order = np.argsort(candidates < 0, axis=1, kind="stable")
    packed = np.take_along_axis(candidates, order, axis=1)
    chosen = packed[np.arange(tokens.size)[None, :], index] if candidates.shape[1] else np.zeros_like(index)
    return np.concatenate([tokens[None, :], np.where(replace, chosen, tokens[None, :])])


def nearest_embeddings(table: FloatArray, tokens: IntArray, /, *, k: int) -> IntArray:
    """Return the k tokens whose embeddings have the largest cosine with each token's own, itself excluded.

    Parameters
    ----------
    table : ndarray of float, shape (V, M)
        Embeddings.
    tokens : ndarray of int, shape (T,)
        Indices.
    k : int
        How many, less than V.

    Returns
    -------
    ndarray of int, shape (T, k)
        The nearest first, of equals the lowest index.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit or are not of their kinds, a token is no row, a number is NaN or infinite, or
        k is out of range.

    References
    ----------
    .. [1] Jiao et al., 2020, arXiv:1909.10351, Algorithm 1, line 7: GloVe's nearest words.

    Examples
    --------
    >>> table = np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
    >>> nearest_embeddings(table, np.array([0]), k=2)
    array([[1, 2]])
    """
    (table,), tokens = floating(table=table), token_ids("tokens", tokens)
    size = bind_axes({"table": (table, "V M"), "tokens": (tokens, "T")})
    whole("k", k, least=0)
    if k >= size["V"]:
        raise OptionError(f"k: expected less than the {size['V']} tokens there are, got {k}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < size["V"]:
        raise OptionError(f"tokens: expected ids in [0, {size['V']}), got {tokens.min()} to {tokens.max()}")
    wide = widen(table).astype(wide_dtype(table.dtype), copy=False)
    if not np.isfinite(wide).all():
        raise OptionError("table: expected finite numbers, got NaN or infinity")
    unit = unit_vectors(wide)
    cosine = unit[tokens] @ unit.T
    cosine[np.arange(tokens.size), tokens] = -np.inf
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k]
