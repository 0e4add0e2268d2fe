"""How fast information spreads over the graph of an attention: BigBird's reason for random keys, measured.

A random walk on the graph forgets where it began at a rate that the second eigenvalue of the normalized
adjacency sets; the diameter is the number of layers after which every token has heard of every other.  Random
graphs have a second eigenvalue far from 1 and a diameter like log N; a band has neither.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, ShapeError
from refimpl.numerics import BoolArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import as_array

__all__ = ["Mixing", "diameter", "rapid_mixing", "rapid_mixing_sparse", "spectral_gap"]


ROUGHLY = 1e-3  # how near a first estimate of an eigenvalue in a cluster comes
LARGEST = 1e-11  # what is as near to 1 is the eigenvalue 1 of every graph


class Mixing(NamedTuple):
    """The spectral gap, from 0 to 2, and the diameter, infinite for a graph in several parts."""

    spectral_gap: float
    diameter: float


def sample_graph(rng: np.random.Generator, *, N: int, degree: int, graph: str) -> Case:
    """Return a call on the graph of a pattern over N tokens; `degree` is a radius or a number of draws.

    Examples
    --------
    >>> sample_graph(np.random.default_rng(0), N=3, degree=1, graph="window").args[0].astype(int)
    array([[1, 1, 0],
           [1, 1, 1],
           [0, 1, 1]])
    """
    i = np.arange(N)
    mask = np.abs(i[:, None] - i) <= (degree if graph != "random" else 0)
    if graph == "hub" and N:
        hub = int(rng.integers(N))
        mask[hub], mask[:, hub] = True, True
    if graph in ("random", "window_random"):
        mask |= rng.random((N, N)) < degree / max(N, 1)
    if graph == "parts":
        mask &= (i[:, None] < N // 2) == (i < N // 2)
    if graph == "no_loops":
        mask &= i[:, None] != i
    return Case((mask,))


def _terms(case: Case) -> tuple[int, Any]:
    """Return the size of the eigenvalues, 1, and a diameter that is no sum."""
    return max(len(case.args[0]), 1), Mixing(1.0, 0.0)


@technique(
    "attention.rapid_mixing",
    entries=(108,),
    kind="identity",
    source=Source("Zaheer et al. 2020", "arXiv:2007.14062", "section 2, 'random attention'"),
    axes={"N": (0, 24), "degree": (0, 4)},
    options={"graph": ("window", "random", "window_random", "hub", "parts", "no_loops")},
    edges=(
        {"N": 0, "degree": 1, "graph": "window"},
        {"N": 1, "degree": 0, "graph": "no_loops"},
        {"N": 2, "degree": 1, "graph": "no_loops"},  # bipartite: the smallest eigenvalue is -1
        {"N": 7, "degree": 0, "graph": "no_loops"},  # nothing but single tokens
        {"N": 9, "degree": 20, "graph": "window"},
        {"N": 30, "degree": 1, "graph": "window"},
        {"N": 12, "degree": 2, "graph": "parts"},
    ),
    sample=sample_graph,
    terms=_terms,
)
def rapid_mixing(mask: BoolArray, /) -> Mixing:
    """Return the spectral gap and the diameter of the graph of an attention.

    Parameters
    ----------
    mask : ndarray of bool, shape (N, N)
        True where a query, the row, sees a key.  Two tokens are joined if either sees the other: random
        patterns are not symmetric, and information flows along an edge from the key to the query.

    Returns
    -------
    Mixing
        `spectral_gap` and `diameter`.

    Raises
    ------
    ShapeError, DTypeError
        If `mask` is not a square of bools.

    Notes
    -----
    **Special cases**

    - A graph in several parts has gap 0 and infinite diameter; a token without any edge is such a part.
    - A graph of one token, or of none, has gap 1 and diameter 0.

    References
    ----------
    .. [1] Zaheer et al., 2020, arXiv:2007.14062, section 2.
    .. [2] Chung, 1997, "Spectral graph theory", section 1.2 (the gap is λ1 there).

    Examples
    --------
    A ring of 16, and the same with one token that sees all:

    >>> ring = np.eye(16, dtype=bool) | np.roll(np.eye(16, dtype=bool), 1, axis=0)
    >>> [round(value, 3) for value in rapid_mixing(ring)]
    [0.051, 8.0]
    >>> ring[0] = True
    >>> [round(value, 3) for value in rapid_mixing(ring)]
    [0.275, 2.0]
    """
    return Mixing(spectral_gap(mask), diameter(mask))


def spectral_gap(mask: BoolArray, /) -> float:
    """Return ``1 - λ2``, λ2 the second largest eigenvalue of ``D^-½ A D^-½`` over all N, by definition.

    Parameters
    ----------
    mask : ndarray of bool, shape (N, N)
        As for `rapid_mixing`.

    Returns
    -------
    float
        0 for a graph in several parts, at most ``N / (N - 1)``.

    Examples
    --------
    >>> round(spectral_gap(np.ones((4, 4), dtype=bool)), 12)
    1.0
    """
    joined = _joined(mask)
    if len(joined) < 2:
        return 1.0
    degree = joined.sum(axis=1)
    joined[degree == 0, degree == 0] = True  # a walk that cannot leave stays
    root = np.sqrt(np.maximum(degree, 1))
    return float(1.0 - np.linalg.eigvalsh(joined / root[:, None] / root)[-2])


def diameter(mask: BoolArray, /) -> float:
    """Return the largest number of edges between two tokens, step by step from all of them at once.

    Parameters
    ----------
    mask : ndarray of bool, shape (N, N)
        As for `rapid_mixing`.

    Returns
    -------
    float
        A whole number, or infinity.

    Examples
    --------
    >>> diameter(np.tri(5, dtype=bool)), diameter(np.eye(2, dtype=bool))
    (1.0, inf)
    """
    joined = _joined(mask)
    reached, steps = np.eye(len(joined), dtype=bool), 0
    while not reached.all():
        grown = reached | (reached.astype(np.float64) @ joined > 0)
        if np.array_equal(grown, reached):
            return math.inf
        reached, steps = grown, steps + 1
    return float(steps)


@implements("attention.rapid_mixing", backend="numpy")
def rapid_mixing_sparse(mask: Any, /) -> Mixing:
    """Return `rapid_mixing` from the edges alone, for graphs of many tokens.

    Parameters
    ----------
    mask : ndarray of bool or scipy.sparse array, shape (N, N)
        As for `rapid_mixing`.

    Returns
    -------
    Mixing
        As `rapid_mixing`.

    Raises
    ------
    ShapeError, DTypeError
        If `mask` is not a square of bools.

    Notes
    -----
    The top eigenvector, √degree, is known and taken off, so that λ2 is the largest that is left.  Lanczos
    finds it at once if it stands alone, as in a random graph.  In a band it stands in a cluster; the shifted
    inverse tells it apart there, and its factors stay as sparse as the band.

    Examples
    --------
    >>> import scipy.sparse
    >>> ring = scipy.sparse.eye_array(2000, dtype=bool) + scipy.sparse.eye_array(2000, k=1, dtype=bool)
    >>> gap, far = rapid_mixing_sparse(ring.astype(bool))
    >>> gap < 1e-5, far
    (True, 1999.0)
    """
    import scipy.sparse
    from scipy.sparse import csgraph

    given: Any = mask if scipy.sparse.issparse(mask) else _joined(mask)
    graph: Any = scipy.sparse.csr_array(given)
    if graph.dtype != np.bool_ or graph.shape[0] != graph.shape[1]:
        raise ShapeError(f"mask: expected a square of bools, got {graph.dtype}, shape {graph.shape}")
    graph = scipy.sparse.csr_array((graph + graph.T).astype(np.float64))
    graph.data[:] = 1.0
    count = graph.shape[0]
    if count < 2:
        return Mixing(1.0, 0.0)
    if csgraph.connected_components(graph, directed=False)[0] > 1:
        return Mixing(0.0, math.inf)
    return Mixing(1.0 - _second_eigenvalue(graph), _bounded_diameter(graph))


def _second_eigenvalue(graph: Any) -> float:
    """Return λ2 of a connected graph of at least two vertices, given as a symmetric array of ones."""
    import scipy.sparse
    from scipy.sparse import linalg

    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = scipy.sparse.dia_array((degree**-0.5, 0), shape=graph.shape)
    walk = scipy.sparse.csc_array(scale @ graph @ scale)
    if graph.shape[0] < 32:  # Lanczos needs room
        return float(np.linalg.eigvalsh(walk.toarray())[-2])
    top = np.sqrt(degree / degree.sum())
    rest = linalg.LinearOperator(
        walk.shape, matvec=lambda x: walk @ x - top * (top @ x) * 2.0, dtype=np.float64
    )
    start = np.linspace(-1.0, 1.0, graph.shape[0]) ** 3 + 0.1  # fixed: the same answer every time
    options: dict[str, Any] = {"v0": start, "return_eigenvectors": False}
    try:
        return float(linalg.eigsh(rest, k=1, which="LA", maxiter=50, **options)[0])
    except linalg.ArpackNoConvergence:
        rough = float(linalg.eigsh(rest, k=1, which="LA", tol=ROUGHLY, **options)[0])
    near = np.sort(linalg.eigsh(walk, k=2, sigma=rough + 2 * ROUGHLY, which="LM", **options))
    return float(near[0] if near[1] > 1.0 - LARGEST else near[1])


def _bounded_diameter(graph: Any) -> float:
    """Return the diameter of a connected graph from the distances of as few vertices as settle it.

    The distances from a vertex bound every other one's largest distance from both sides (Takes and Kosters
    2011, "Determining the diameter of small world networks", section 3).
    """
    from scipy.sparse import csgraph

    upper = np.full(graph.shape[0], np.inf)
    longest = 0.0
    source = int(np.argmax(graph.sum(axis=1)))
    while upper[source] > longest:
        distance = csgraph.shortest_path(graph, unweighted=True, indices=source)
        furthest = float(distance.max())
        longest = max(longest, furthest)
        upper = np.minimum(upper, furthest + distance)
        source = int(np.argmax(upper))
    return longest


def _joined(mask: Any) -> BoolArray:
    """Return the symmetric graph of `mask`."""
    array = as_array("mask", mask)
    if array.dtype != np.bool_:
        raise DTypeError(f"mask: expected bool, True = sees, got {array.dtype}")
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ShapeError(f"mask: expected shape (N, N), got {array.shape}")
    joined: BoolArray = array | array.T
    return joined
