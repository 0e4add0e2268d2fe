"""Each collective on the data of all ranks at once, one row a rank: what the records are about.

>>> all_reduce(np.array([[1.0, 2.0], [10.0, 20.0]]))
array([[11., 22.],
       [11., 22.]])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import Array, widen
from refimpl.parallel import collectives
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array

__all__ = ["ALL_REDUCE", "all_gather", "all_reduce", "all_to_all", "broadcast", "reduce", "reduce_scatter"]

Algorithm = Literal["ring", "recursive", "tree"]
ALL_REDUCE = {
    "ring": collectives.ring_all_reduce,
    "recursive": collectives.recursive_all_reduce,
    "tree": collectives.tree_all_reduce,
}
_thakur = partial(
    Source,
    "Thakur et al. 2005, Optimization of collective communication operations in MPICH",
    "doi:10.1177/1094342005051521",
)
_RING = Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "section 7.1 (ring); others as documented")
_EDGES: tuple[dict[str, Any], ...] = (
    {"ranks": 1, "n": 3},
    {"ranks": 4, "n": 0},
    {"ranks": 7, "n": 3},
    {"ranks": 6, "n": 13},
    {"ranks": 8, "n": 16},
)


def sample_rows(rng: np.random.Generator, *, ranks: int, n: int, **options: Any) -> Case:
    """Return one call on an array of `ranks` rows of `n`; "last" as the root is the last rank."""
    if "root" in options:
        options["root"] = {"first": 0, "last": ranks - 1}[options["root"]]
    return Case((rng.standard_normal((ranks, n)),), options)


def sample_blocks(rng: np.random.Generator, *, ranks: int, n: int) -> Case:
    """Return one call on an array of `ranks` by `ranks` blocks of `n`."""
    return Case((rng.standard_normal((ranks, ranks, n)),))


_record = partial(technique, entries=(92,), kind="function")
_record_of_rows = partial(_record, axes={"ranks": (1, 8), "n": (0, 20)}, sample=sample_rows)


def _on_ranks(
    program: Callable[[Comm, Any], Any], rows: Any, launch: Launch, traffic: Traffic | None
) -> list[Any]:
    """Run ``program(comm, rows[comm.rank])`` on one rank for each row; return what each rank has then."""
    return launch(len(rows), lambda comm: program(comm, rows[comm.rank]), traffic=traffic)


def _rows(x: Array, axes: int = 2) -> Array:
    x = as_array("x", x)
    if x.ndim != axes or x.shape[0] < 1 or (axes == 3 and x.shape[0] != x.shape[1]):
        expected = "(ranks, n)" if axes == 2 else "(ranks, ranks, n)"
        raise ShapeError(f"x: expected shape {expected} with at least one rank, got {x.shape}")
    return x


def _sum_terms(case: Case) -> tuple[int, Any]:
    (x,) = case.args
    sums = np.sum(np.abs(widen(x).astype(np.float64)), axis=0)
    return len(x), np.broadcast_to(sums, x.shape)


def _chunk_terms(case: Case) -> tuple[int, Any]:
    n, sums = _sum_terms(case)
    return n, collectives.padded(sums[0], n).reshape(n, -1)


def _root_terms(case: Case) -> tuple[int, Any]:
    n, sums = _sum_terms(case)
    return n, sums[0]


@_record_of_rows(
    "parallel.collectives",
    source=_RING,
    options={"algorithm": tuple(ALL_REDUCE)},
    edges=tuple({**edge, "algorithm": name} for edge in _EDGES for name in ALL_REDUCE),
    terms=_sum_terms,
)
def all_reduce(
    x: Array,
    /,
    *,
    algorithm: Algorithm = "ring",
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> Array:
    """Return the sum over ranks, on every rank.

    Parameters
    ----------
    x : ndarray, shape (R, n)
        Row r is what rank r adds.
    algorithm : {"ring", "recursive", "tree"}
        Ring: 2 (R - 1) messages a rank of ceil(n / R) elements.  Recursive halving and doubling: 2 log2 R
        messages, R a power of two or folded to one.  Tree: 2 ceil(log2 R) rounds of whole vectors.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray, shape (R, n)
        Rows equal bit for bit.

    Raises
    ------
    ShapeError
        If `x` has no row or is not a matrix.
    OptionError
        If there is no such algorithm.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 7.1.
    .. [2] Thakur et al. 2005, doi:10.1177/1094342005051521, section 4.5.

    Examples
    --------
    >>> traffic = Traffic()
    >>> _ = all_reduce(np.ones((4, 8)), traffic=traffic)
    >>> traffic.sent(0)  # 2 * 3 chunks of 2 elements
    Sent(messages=6, bytes=96)
    """
    x = _rows(x)
    if algorithm not in ALL_REDUCE:
        raise OptionError(f"algorithm: expected one of {', '.join(ALL_REDUCE)}; got {algorithm!r}")
    return np.stack(_on_ranks(ALL_REDUCE[algorithm], x, launch, traffic))


@_record_of_rows("parallel.collectives.reduce_scatter", source=_RING, edges=_EDGES, terms=_chunk_terms)
def reduce_scatter(x: Array, /, *, traffic: Traffic | None = None, launch: Launch = run_ranks) -> Array:
    """Return chunk r of the sum over ranks on rank r: a ring.

    Parameters
    ----------
    x : ndarray, shape (R, n)
        Row r is what rank r adds.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray, shape (R, ceil(n / R))
        The sum, padded with zeros to a multiple of R.

    Raises
    ------
    ShapeError
        If `x` has no row or is not a matrix.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 7.1.

    Examples
    --------
    >>> reduce_scatter(np.ones((2, 3)))
    array([[2., 2.],
           [2., 0.]])
    """
    x = _rows(x)
    return np.stack(_on_ranks(collectives.ring_reduce_scatter, x, launch, traffic))


@_record_of_rows("parallel.collectives.all_gather", source=_RING, edges=_EDGES, exact=True)
def all_gather(x: Array, /, *, traffic: Traffic | None = None, launch: Launch = run_ranks) -> Array:
    """Return all ranks' chunks, one behind the other, on every rank: a ring.

    Parameters
    ----------
    x : ndarray, shape (R, c)
        Row r is rank r's chunk.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray, shape (R, R * c)
        Equal rows.

    Raises
    ------
    ShapeError
        If `x` has no row or is not a matrix.

    References
    ----------
    .. [1] Thakur et al. 2005, doi:10.1177/1094342005051521, section 4.1.

    Examples
    --------
    >>> all_gather(np.array([[1.0], [2.0]]))
    array([[1., 2.],
           [1., 2.]])
    """
    x = _rows(x)
    return np.stack(_on_ranks(collectives.ring_all_gather, x, launch, traffic))


@_record(
    "parallel.collectives.all_to_all",
    source=_thakur("section 4.3, pairwise exchange"),
    axes={"ranks": (1, 7), "n": (0, 4)},
    edges=({"ranks": 1}, {"ranks": 5, "n": 0}, {"ranks": 4, "n": 3}),
    sample=sample_blocks,
    exact=True,
)
def all_to_all(x: Array, /, *, traffic: Traffic | None = None, launch: Launch = run_ranks) -> Array:
    """Return what every rank has for each other one: the transpose of blocks, by pairwise exchange.

    Parameters
    ----------
    x : ndarray, shape (R, R, n)
        ``x[r, s]`` is what rank r has for rank s.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray, shape (R, R, n)
        ``[r, s]`` is what rank r got from rank s.

    Raises
    ------
    ShapeError
        If `x` does not hold one block for each pair.

    References
    ----------
    .. [1] Thakur et al. 2005, doi:10.1177/1094342005051521, section 4.3.

    Examples
    --------
    >>> all_to_all(np.array([[[11], [12]], [[21], [22]]]))[..., 0]
    array([[11, 21],
           [12, 22]])
    """
    x = _rows(x, 3)
    return np.stack([np.stack(row) for row in _on_ranks(collectives.pairwise_all_to_all, x, launch, traffic)])


@_record_of_rows(
    "parallel.collectives.broadcast",
    source=_thakur("section 4.2, binomial tree"),
    options={"root": ("first", "last")},
    edges=_EDGES,
    exact=True,
)
def broadcast(
    x: Array, /, *, root: int = 0, traffic: Traffic | None = None, launch: Launch = run_ranks
) -> Array:
    """Return the root's vector on every rank: a binomial tree.

    Parameters
    ----------
    x : ndarray, shape (R, n)
        Row `root` is what is sent; the others are not looked at.
    root : int
        Who sends.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray, shape (R, n)
        Equal rows.

    Raises
    ------
    ShapeError
        If `x` has no row or is not a matrix.
    OptionError
        If `root` is no rank.

    References
    ----------
    .. [1] Thakur et al. 2005, doi:10.1177/1094342005051521, section 4.2.

    Examples
    --------
    >>> broadcast(np.array([[1.0], [2.0], [3.0]]), root=1)[:, 0]
    array([2., 2., 2.])
    """
    x = _rows(x)
    return np.stack(_on_ranks(partial(collectives.tree_broadcast, root=root), x, launch, traffic))


@_record_of_rows(
    "parallel.collectives.reduce",
    source=_thakur("section 4.4, binomial tree"),
    options={"root": ("first", "last")},
    edges=_EDGES,
    terms=_root_terms,
)
def reduce(
    x: Array, /, *, root: int = 0, traffic: Traffic | None = None, launch: Launch = run_ranks
) -> Array:
    """Return the sum over ranks as the root has it: a binomial tree.

    Parameters
    ----------
    x : ndarray, shape (R, n)
        Row r is what rank r adds.
    root : int
        Who gets the sum.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray, shape (n,)
        The root's result; the other ranks have none.

    Raises
    ------
    ShapeError
        If `x` has no row or is not a matrix.
    OptionError
        If `root` is no rank.

    References
    ----------
    .. [1] Thakur et al. 2005, doi:10.1177/1094342005051521, section 4.4.

    Examples
    --------
    >>> reduce(np.array([[1.0], [2.0], [4.0]]))
    array([7.])
    """
    x = _rows(x)
    total = _on_ranks(partial(collectives.tree_reduce, root=root), x, launch, traffic)[root]
    return np.zeros(x.shape[1:], x.dtype) if total is None else total
