"""Hash layers' tables: which expert each token of the vocabulary belongs to, decided once, before training.

A table is an array of V expert numbers.  It is stored with the model: a language's own ``hash()`` is salted,
so it differs from run to run.  Routing is the look-up ``table[tokens]``; hashes of more than the token itself
are in `refimpl.moe.hash_context`, the layer that uses them is `refimpl.moe.hash_layers.hash_layer`.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.embedding import indices
from refimpl.validation import bind_axes, floating, whole

__all__ = ["balanced_table", "clustered_table", "dispersed_table", "random_table"]

_PAPER = "Roller et al. 2021", "arXiv:2106.04426"
_EDGES: tuple[dict[str, Any], ...] = ({"V": 0}, {"V": 1, "E": 1}, {"V": 9, "E": 1}, {"V": 2, "E": 5})


def _sample_draws(rng: np.random.Generator, *, V: int, E: int, values: str) -> Case:
    draws = rng.random(V)
    if values == "extreme":  # both ends of [0, 1)
        draws = np.where(draws < 0.5, 0.0, np.nextafter(1.0, 0.0))
    return Case((draws,), {"num_experts": E})


@technique(
    "moe.hash.random",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, "section 3.1, Random Hash"),
    axes={"V": (0, 40), "E": (1, 7)},
    options={"values": ("uniform", "extreme")},
    edges=_EDGES,
    sample=_sample_draws,
    exact=True,
)
def random_table(draws: FloatArray, /, *, num_experts: int) -> IntArray:
    """Return a table that puts each token into an expert drawn for it alone.

    Parameters
    ----------
    draws : ndarray of float, shape (V,)
        One uniform number in [0, 1) a token, such as ``np.random.default_rng(42).random(V)``.  One that a
        narrow format has rounded to 1 stands for the last expert.
    num_experts : int
        E.

    Returns
    -------
    ndarray of int, shape (V,)
        ``floor(E u)``, at most E - 1.

    Raises
    ------
    OptionError
        If a draw is outside [0, 1], or there is no expert.
    ShapeError, DTypeError
        If `draws` is not one row of real numbers.

    Notes
    -----
    ParlAI [2]_ draws inside each layer from a generator seeded with 42, so that all its layers share one
    table (the "same hash" row of Table 3, PPL 23.81 for 5 layers); draws of its own for each layer make the
    better "different hash" row (23.27).

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1.
    .. [2] ParlAI, projects/params_vs_compute/hash_ladder/hash_ladder.py, ``HashLayerFFN.hash``.

    Examples
    --------
    >>> random_table(np.array([0.1, 0.9, 0.5]), num_experts=4)
    array([0, 3, 2])
    """
    (draws,) = floating(draws=draws)
    bind_axes({"draws": (draws, "V")})
    u = widen(draws).astype(np.float64)
    if not np.all((u >= 0) & (u <= 1)):
        raise OptionError("draws: expected numbers in [0, 1)")
    experts = whole("num_experts", num_experts)
    return np.minimum(np.floor(u * experts), experts - 1).astype(np.int64)


def _sample_counts(rng: np.random.Generator, *, V: int, E: int, values: str) -> Case:
    counts = rng.integers(0, 50, V) if values == "uniform" else 1000 // (1 + rng.permutation(V))
    if values == "tied":
        counts = rng.integers(0, 3, V)
    return Case((counts,), {"num_experts": E})


@technique(
    "moe.hash.balanced",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, "section 3.1, Balanced assignment"),
    axes={"V": (0, 40), "E": (1, 7)},
    options={"values": ("uniform", "zipf", "tied")},
    edges=_EDGES,
    sample=_sample_counts,
    exact=True,
)
def balanced_table(counts: IntArray, /, *, num_experts: int) -> IntArray:
    """Return a table whose experts get about equally many tokens of the corpus.

    The most frequent token that is left goes to the emptiest expert, until none is left.

    Parameters
    ----------
    counts : ndarray of int, shape (V,)
        How often each token occurs in the corpus.
    num_experts : int
        E.

    Returns
    -------
    ndarray of int, shape (V,)
        Expert of each token.

    Raises
    ------
    OptionError
        If a count is negative, or there is no expert.
    ShapeError, DTypeError
        If `counts` is not one row of integers.

    Notes
    -----
    Special cases:

    - Equal counts: the lower token first; equally empty experts: the lower one.
    - Tokens that never occur weigh nothing and all go to the one expert that is emptiest at the end.

    This is the greedy rule for scheduling on equal machines, longest job first [2]_: the fullest expert has
    at most 4/3 - 1/(3E) of what the best possible table would give it.  A token that is more frequent than
    the mean of the experts cannot be balanced by any table: it is not split.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1.
    .. [2] Graham, 1969, "Bounds on multiprocessing timing anomalies", theorem 2.

    Examples
    --------
    >>> balanced_table(np.array([50, 30, 20, 10]), num_experts=2)
    array([0, 1, 1, 0])
    """
    experts = whole("num_experts", num_experts)
    if np.ndim(counts) != 1:
        raise ShapeError(f"counts: expected shape (V,), got {np.shape(counts)}")
    counts = indices("counts", counts, np.iinfo(np.int64).max)
    table = np.zeros(len(counts), np.int64)
    masses = [(0, expert) for expert in range(experts)]  # a heap: the emptiest first, then the lowest
    for token in np.argsort(-counts.astype(np.int64), kind="stable"):
        mass, expert = masses[0]
        table[token] = expert
        heapq.heapreplace(masses, (mass + int(counts[token]), expert))
    return table


def _sample_embeddings(rng: np.random.Generator, *, V: int, M: int, E: int, values: str) -> Case:
    embeddings = rng.standard_normal((V, M))
    if values == "groups":  # clusters that any k-means should find
        embeddings = 0.1 * embeddings + 10 * rng.standard_normal((E, M))[rng.integers(0, E, V)]
    initial = embeddings[rng.permutation(V)[:E]] if E <= V else rng.standard_normal((E, M))
    return Case((embeddings, initial), {})


@technique(
    "moe.hash.clustered",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, "section 3.1, Token Clustering"),
    axes={"V": (0, 30), "M": (1, 4), "E": (1, 5)},
    options={"values": ("normal", "groups")},
    edges=({"V": 0}, {"V": 1, "M": 1, "E": 1}, {"V": 2, "E": 5}, {"V": 20, "E": 1}),
    sample=_sample_embeddings,
    exact=True,
)
def clustered_table(embeddings: FloatArray, initial: FloatArray, /, *, max_iterations: int = 300) -> IntArray:
    """Return a table that gives similar tokens to the same expert: k-means of their embeddings.

    Parameters
    ----------
    embeddings : ndarray of float, shape (V, M)
        Token embeddings of a trained baseline model.
    initial : ndarray of float, shape (E, M)
        Centers to begin with, such as the embeddings of E tokens drawn at random.
    max_iterations : int
        At most so many rounds of Lloyd's algorithm; it ends by itself once no token moves.

    Returns
    -------
    ndarray of int, shape (V,)
        The cluster of each token, in the order of `initial`.

    Raises
    ------
    OptionError
        If `max_iterations` is below 1.
    ShapeError, DTypeError
        If the arrays do not fit together, or are not real.

    Notes
    -----
    Special cases:

    - A token between two centers goes to the lower one.
    - A cluster that loses all its tokens keeps its center (scikit-learn would move it to a far token).

    Clusters are as uneven as the embeddings: in the paper this is worse (PPL 23.99) than a random table
    (23.27), and spreading each cluster (`dispersed_table`) is best (23.22).

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1 and Table 3.
    .. [2] Lloyd, 1982, "Least squares quantization in PCM", section 3.

    Examples
    --------
    >>> embeddings = np.array([[0.0], [10.0], [0.5], [9.0]])
    >>> clustered_table(embeddings, embeddings[:2])
    array([0, 1, 0, 1])
    """
    given = floating(embeddings=embeddings, initial=initial)
    bind_axes({"embeddings": (given[0], "V M"), "initial": (given[1], "E M")})
    points, centers = (widen(array).astype(np.float64) for array in given)
    if not len(centers):
        raise ShapeError(f"initial: expected at least one center, got shape {centers.shape}")
    table = np.full(len(points), -1)
    for _ in range(whole("max_iterations", max_iterations)):
        distances = np.stack([np.sum((points - center) ** 2, axis=1) for center in centers], axis=1)
        moved = np.argmin(distances, axis=1)
        if np.array_equal(moved, table):
            break
        table = moved
        for e in np.unique(table):
            centers[e] = points[table == e].mean(axis=0)
    return table


def _sample_clusters(rng: np.random.Generator, *, V: int, K: int, E: int) -> Case:
    return Case((rng.integers(0, K, V),), {"num_experts": E})


@technique(
    "moe.hash.dispersed",
    entries=(39,),
    kind="function",
    source=Source(*_PAPER, "section 3.1, Dispersed Hash"),
    axes={"V": (0, 40), "K": (1, 6), "E": (1, 7)},
    edges=({"V": 0}, {"V": 1, "K": 1, "E": 1}, {"V": 13, "K": 1}, {"V": 3, "K": 6, "E": 7}),
    sample=_sample_clusters,
    exact=True,
)
def dispersed_table(clusters: IntArray, /, *, num_experts: int) -> IntArray:
    """Return a table that gives similar tokens to different experts: each cluster is dealt out evenly.

    Parameters
    ----------
    clusters : ndarray of int, shape (V,)
        Cluster of each token, as from `clustered_table`; any number of clusters.
    num_experts : int
        E.

    Returns
    -------
    ndarray of int, shape (V,)
        Tokens in order of cluster, then of number, dealt to experts 0, 1, ..., E - 1, 0, ...

    Raises
    ------
    OptionError
        If a cluster is negative, or there is no expert.
    ShapeError, DTypeError
        If `clusters` is not one row of integers.

    Notes
    -----
    Any E tokens that follow one another in a deal have different experts, so the counts of a cluster's
    tokens differ by at most 1 between experts, and so do those of all tokens.  The next cluster goes on where
    the last one ended: if each began at expert 0, many small clusters would all fill the first experts.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.1.

    Examples
    --------
    >>> dispersed_table(np.array([0, 0, 1, 0, 1]), num_experts=2)
    array([0, 1, 1, 0, 0])
    """
    experts = whole("num_experts", num_experts)
    if np.ndim(clusters) != 1:
        raise ShapeError(f"clusters: expected shape (V,), got {np.shape(clusters)}")
    clusters = indices("clusters", clusters, np.iinfo(np.int64).max)
    table = np.zeros(len(clusters), np.int64)
    table[np.argsort(clusters, kind="stable")] = np.arange(len(clusters)) % experts
    return table
