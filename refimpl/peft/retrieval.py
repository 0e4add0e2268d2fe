"""Modules found by what they are for: the k whose keys point most nearly where the query points."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import DTypeError, OptionError
from refimpl.numerics import BoolArray, FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating, positive, whole

__all__ = ["Retrieved", "retrieve", "retrieved_weights", "unit_vectors"]


class Retrieved(NamedTuple):
    """The chosen modules, best first, and their cosines."""

    modules: IntArray
    scores: FloatArray


def sample_keys(rng: np.random.Generator, *, n: int, M: int, k: int, values: str) -> Case:
    """Return a call of `retrieve`; `values` "ties" repeats keys, "zero" holds zero vectors.

    Examples
    --------
    >>> [a.shape for a in sample_keys(np.random.default_rng(0), n=3, M=2, k=1, values="random").args]
    [(2,), (3, 2)]
    """
    query, keys = rng.standard_normal(M), rng.standard_normal((n, M))
    options: dict[str, object] = {"k": min(k, n)}
    if values == "ties":
        keys[1::2] = keys[: n - n % 2 : 2]
    elif values == "zero":
        keys[::2] = 0.0
    elif values == "excluded":
        options["excluded"] = np.arange(n) % 3 == 0
        options["k"] = min(k, int(np.sum(np.arange(n) % 3 != 0)))
    return Case((query, keys), options)


@technique(
    "peft.retrieval",
    entries=(66,),
    kind="function",
    source=Source("Zhao et al. 2024", "arXiv:2402.09997", "section 3.2: input-aware LoRA retrieval"),
    axes={"n": (1, 8), "M": (1, 5), "k": (0, 4)},
    options={"values": ("random", "ties", "zero", "excluded")},
    edges=(
        {"n": 0, "M": 2, "k": 0, "values": "random"},
        {"n": 1, "M": 1, "k": 1, "values": "random"},
        {"n": 4, "M": 3, "k": 4, "values": "random"},
        {"n": 6, "M": 3, "k": 3, "values": "ties"},
        {"n": 5, "M": 3, "k": 4, "values": "zero"},
        {"n": 7, "M": 3, "k": 3, "values": "excluded"},
    ),
    sample=sample_keys,
)
def retrieve(
    query: FloatArray, keys: FloatArray, /, *, k: int, excluded: BoolArray | None = None
) -> Retrieved:
    """Return the k modules whose keys have the largest cosine with the query.

    Parameters
    ----------
    query : ndarray of float, shape (M,)
        Embedding of an input.
    keys : ndarray of float, shape (n, M)
        One of each module, for example the mean embedding of its training examples.
    k : int
        How many.
    excluded : ndarray of bool, shape (n,), optional
        Modules that may not be chosen: that of the task itself, when others are tried on it.

    Returns
    -------
    Retrieved
        ``modules`` int64 (k,), by falling cosine, the first of equals first; ``scores`` (k,).

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, are not real, or `excluded` is not boolean.
    OptionError
        If fewer than k modules may be chosen, k is negative, or a number is NaN or infinite.

    Notes
    -----
    The cosine with a zero vector is 0.

    References
    ----------
    .. [1] Zhao et al., 2024, arXiv:2402.09997, section 3.2.

    Examples
    --------
    >>> keys = np.array([[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    >>> retrieve(np.array([0.0, 5.0]), keys, k=2)
    Retrieved(modules=array([1, 2]), scores=array([1.        , 0.70710678]))
    """
    query, keys = floating(query=query, keys=keys)
    size = bind_axes({"query": (query, "M"), "keys": (keys, "n M")})
    whole("k", k, least=0)
    allowed = np.ones(size["n"], bool)
    if excluded is not None:
        excluded = as_array("excluded", excluded)
        bind_axes({"keys": (keys, "n M"), "excluded": (excluded, "n")})
        if excluded.dtype != np.bool_:
            raise DTypeError(f"excluded: expected booleans, got {excluded.dtype}")
        allowed = ~excluded
    if k > allowed.sum():
        raise OptionError(f"k: expected at most the {allowed.sum()} modules that may be chosen, got {k}")
    if not (np.isfinite(widen(query)).all() and np.isfinite(widen(keys)).all()):
        raise OptionError("query, keys: expected finite numbers, got NaN or infinity")
    wide = wide_dtype(query.dtype)
    direction, directions = (unit_vectors(widen(array).astype(wide, copy=False)) for array in (query, keys))
    scores = directions @ direction
    order = np.argsort(-np.where(allowed, scores, -np.inf), kind="stable")[:k]
    return Retrieved(order, round_to(scores[order], query.dtype))


def retrieved_weights(scores: FloatArray, /, *, temperature: float | None = None) -> FloatArray:
    """Return the shares of retrieved modules: equal, or a softmax of their cosines.

    Parameters
    ----------
    scores : ndarray of float, shape (k,)
        As from `retrieve`.
    temperature : float, optional
        Divides the cosines before the softmax, > 0.  Default: all shares are 1 / k.

    Returns
    -------
    ndarray of float, shape (k,)
        For `refimpl.peft.composed_update` (parameters averaged) or as gates of `refimpl.peft.gated_lora`
        (outputs averaged): the same for a linear layer.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If `scores` is no real vector, or `temperature` not above 0.

    Examples
    --------
    >>> scores = np.array([1.0, 0.0])
    >>> retrieved_weights(scores), retrieved_weights(scores, temperature=0.1).round(4)
    (array([0.5, 0.5]), array([1., 0.]))
    """
    (scores,) = floating(scores=scores)
    bind_axes({"scores": (scores, "k")})
    wide = widen(scores).astype(wide_dtype(scores.dtype), copy=False)
    logits = wide * 0 if temperature is None else wide / wide.dtype.type(positive("temperature", temperature))
    return round_to(softmax(logits), scores.dtype)


def unit_vectors(vectors: FloatArray) -> FloatArray:
    """Return the vectors over the last axis at length 1, zero vectors as they are.

    Examples
    --------
    >>> unit_vectors(np.array([[3e200, 4e200], [0.0, 0.0]]))
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    largest = np.max(np.abs(vectors), axis=-1, keepdims=True, initial=0.0)
    scaled = vectors / np.where(largest > 0, largest, 1)  # so that squares neither overflow nor vanish
    length = np.sqrt(np.sum(scaled**2, axis=-1, keepdims=True))
    unit: FloatArray = scaled / np.where(length > 0, length, 1)
    return unit
