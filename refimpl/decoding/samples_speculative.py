"""Rounds of speculative sampling on which implementations are judged, drawn from a seed."""

from __future__ import annotations

import numpy as np

from refimpl.numerics import Array, FloatArray
from refimpl.registry import Case

__all__ = ["EDGES", "draw_rows", "pair_of_laws", "sample_round"]

# Uniforms are odd multiples of 1/256: exact in every format, bfloat16 included, and never 1.
STEPS = 128

EDGES: tuple[dict[str, int | str], ...] = (
    {"B": 1, "K": 1, "V": 1, "models": "same"},
    {"B": 0, "K": 2, "V": 3, "models": "near"},
    {"B": 2, "K": 0, "V": 3, "models": "near"},
    {"B": 3, "K": 4, "V": 5, "models": "same"},
    {"B": 3, "K": 4, "V": 5, "models": "disjoint"},
    {"B": 3, "K": 4, "V": 5, "models": "greedy"},
    {"B": 4, "K": 3, "V": 4, "models": "zero_draws"},
    {"B": 4, "K": 3, "V": 4, "models": "quarters"},
)


def sample_round(rng: np.random.Generator, *, B: int, K: int, V: int, models: str) -> Case:
    """Return a call of `speculative`: drafted tokens, both models' probabilities, and uniforms.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    B, K, V : int
        Sequences, drafted tokens, vocabulary.
    models : {"near", "same", "disjoint", "sparse", "greedy", "quarters", "zero_draws"}
        How draft and target relate; ``"zero_draws"``: sparse, and every uniform is 0.

    Returns
    -------
    Case

    Examples
    --------
    >>> case = sample_round(np.random.default_rng(0), B=1, K=2, V=3, models="same")
    >>> [a.shape for a in case.args], case.kwargs["uniforms"].shape
    ([(1, 2), (1, 2, 3), (1, 3, 3)], (1, 3))
    """
    draft, target = pair_of_laws(rng, (B, K + 1, V), "sparse" if models == "zero_draws" else models)
    drafted = draw_rows(rng, draft[:, :K])
    uniforms = (2 * rng.integers(0, STEPS, (B, K + 1)) + 1) / (2 * STEPS)
    if models == "zero_draws":
        uniforms = np.zeros_like(uniforms)
    return Case((drafted, draft[:, :K], target), {"uniforms": uniforms})


def pair_of_laws(
    rng: np.random.Generator, shape: tuple[int, ...], models: str
) -> tuple[FloatArray, FloatArray]:
    """Return the probabilities of a draft and of a target, of `shape` (..., V).

    Examples
    --------
    >>> [a.tolist() for a in pair_of_laws(np.random.default_rng(0), (4,), "disjoint")]
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    V = shape[-1]
    if models == "disjoint" and V > 1:
        split = np.arange(V) < (V + 1) // 2
        draft, target = (np.broadcast_to(side / side.sum(), shape).copy() for side in (split, ~split))
        return draft, target
    if models == "greedy":
        return _one_hot(rng.integers(0, V, shape[:-1]), V), _one_hot(rng.integers(0, V, shape[:-1]), V)
    if models == "quarters":
        counts = rng.multinomial(4, np.full(V, 1 / V), (2, *shape[:-1]))
        return counts[0] / 4, counts[1] / 4
    draft = _softmax(rng.standard_normal(shape))
    if models == "same":
        return draft, draft.copy()
    target = _softmax(np.log(draft) + rng.standard_normal(shape))
    return (_thinned(rng, draft), _thinned(rng, target)) if models == "sparse" else (draft, target)


def draw_rows(rng: np.random.Generator, probabilities: FloatArray) -> Array:
    """Return a token for each row, by the Gumbel-max trick: never one of probability 0.

    Examples
    --------
    >>> draw_rows(np.random.default_rng(0), np.array([[0.0, 1.0], [1.0, 0.0]]))
    array([1, 0])
    """
    with np.errstate(divide="ignore"):
        tokens: Array = np.argmax(np.log(probabilities) + rng.gumbel(size=probabilities.shape), axis=-1)
    return tokens


def _softmax(x: FloatArray) -> FloatArray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _one_hot(tokens: Array, V: int) -> FloatArray:
    return np.asarray(np.arange(V) == tokens[..., None], dtype=np.float64)


def _thinned(rng: np.random.Generator, probabilities: FloatArray) -> FloatArray:
    """Return the rows with about half of the tokens removed, as a filter does; the most likely one stays."""
    top = probabilities.max(axis=-1, keepdims=True)
    rest = np.where((rng.random(probabilities.shape) < 0.5) | (probabilities == top), probabilities, 0.0)
    return np.asarray(rest / rest.sum(axis=-1, keepdims=True))
