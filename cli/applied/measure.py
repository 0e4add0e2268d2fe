"""What a technique costs: how far states, sentence embeddings and their similarities move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cli.applied.model import Model
from refimpl.numerics import FloatArray, IntArray
from refimpl.transformer.bert import sentence_embeddings

__all__ = ["Moved", "compare", "rank_correlation"]


class Moved(NamedTuple):
    """Cosines of embeddings, before and after; relative errors after each layer; Spearman's correlation."""

    cosine_mean: float
    cosine_least: float
    errors: list[float]
    rank_correlation: float | None


def compare(before: Model, after: Model, texts: Sequence[IntArray]) -> Moved:
    """Return how far `after` is from `before` on texts.

    Parameters
    ----------
    before, after : Model
        Of as many layers.
    texts : sequence of ndarray of int
        Token ids, without padding; at least one text.

    Returns
    -------
    Moved
        An error is ``|a - b| / |b|`` over all tokens of all texts (Frobenius norms).
    """
    pairs = [(before.states(ids), after.states(ids)) for ids in texts]
    errors = []
    for layer in range(1, len(before.layers) + 1):
        off = sum(float(np.sum((new[layer] - old[layer]) ** 2)) for old, new in pairs)
        size = sum(float(np.sum(old[layer] ** 2)) for old, _ in pairs)
        errors.append(float(np.sqrt(off / size)) if size else float(off > 0))
    old, new = (np.vstack([_embedding(states[side][-1]) for states in pairs]) for side in (0, 1))
    cosines = np.sum(old * new, axis=1)
    return Moved(float(cosines.mean()), float(cosines.min()), errors, rank_correlation(old, new))


def rank_correlation(old: FloatArray, new: FloatArray) -> float | None:
    """Return Spearman's correlation of the similarities of all pairs of embeddings.

    Returns
    -------
    float or None
        None where there are fewer than three texts, or all similarities are equal.

    References
    ----------
    .. [1] Spearman, 1904, doi:10.2307/1412159.

    Examples
    --------
    >>> eye = np.eye(3)
    >>> rank_correlation(eye, eye) is None  # no order to keep
    True
    >>> x = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> round(rank_correlation(x, x[::-1]), 3)
    0.5
    """
    from scipy.stats import spearmanr

    above = np.triu_indices(len(old), 1)
    one, other = (x @ x.T for x in (old, new))
    if len(old) < 3 or not all(np.ptp(table[above]) for table in (one, other)):
        return None
    return float(spearmanr(one[above], other[above]).statistic)


def _embedding(states: FloatArray) -> FloatArray:
    """Return the embedding [1, M] of one text, in float64: cosines near 1 need the digits."""
    return sentence_embeddings(states[None].astype(np.float64), np.ones((1, len(states)), bool))
