"""Collectives, built on send and recv alone: rings, recursive halving and doubling, trees, pairwise exchange.

Every rank calls the same function with its own data.  Reductions add in a fixed order, so a result depends on
the values and the number of ranks, never on timing, and it is equal bit for bit on all ranks:

- ring: chunk k starts on rank k + 1 and gathers an addend a hop, ``((x[k+1] + x[k+2]) + ...) + x[k]``;
- recursive halving: pairs at half the distance each time, a balanced tree of sums;
- binomial tree: relative rank r adds what r + 1, r + 2, r + 4, ... send it, in this order.

A vector that does not divide into chunks is padded with zeros: in each phase of a ring a rank sends
``(N - 1) * ceil(n / N)`` elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import Array, is_bfloat16, round_to, widen
from refimpl.parallel.comm import Comm
from refimpl.validation import as_array

__all__ = [
    "chunk_length",
    "padded",
    "pairwise_all_to_all",
    "recursive_all_reduce",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_reduce_scatter",
    "sum_pair",
    "tree_all_reduce",
    "tree_broadcast",
    "tree_reduce",
]


def chunk_length(n: int, ranks: int) -> int:
    """Return how long each of `ranks` equal chunks of `n` elements is, the last one padded.

    Examples
    --------
    >>> chunk_length(10, 4), chunk_length(0, 4)
    (3, 0)
    """
    return -(-n // ranks)


def padded(x: Array, ranks: int) -> Array:
    """Return `x` flat, with zeros behind it up to a multiple of `ranks`; a copy.

    Examples
    --------
    >>> padded(np.ones(3), 2)
    array([1., 1., 1., 0.])
    """
    whole = np.zeros(ranks * chunk_length(x.size, ranks), x.dtype)
    whole[: x.size] = x.ravel()
    return whole


def sum_pair(a: Array, b: Array) -> Array:
    """Return a + b rounded once to their dtype; NumPy's own bfloat16 arithmetic is not trusted.

    Examples
    --------
    >>> sum_pair(np.float16([1.0]), np.float16([2.0]))
    array([3.], dtype=float16)
    """
    return round_to(widen(a) + widen(b), a.dtype) if is_bfloat16(a.dtype) else a + b


def ring_reduce_scatter(comm: Comm, x: Array, combine: Callable[[Array, Array], Array] = sum_pair) -> Array:
    """Return chunk ``comm.rank`` of the sum over ranks: N - 1 steps around a ring.

    Parameters
    ----------
    comm : Comm
        This rank.
    x : ndarray, any shape
        This rank's addend; the same shape and dtype on all ranks.
    combine : callable
        What takes the place of the sum of two ranks, such as their maximum.

    Returns
    -------
    ndarray, shape (ceil(x.size / N),)
        A copy.  Chunks past the end of `x` hold zeros.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 7.1; Thakur et al. 2005,
       "Optimization of collective communication operations in MPICH", section 4.4.
    """
    size, rank = comm.size, comm.rank
    chunks = padded(as_array("x", x), size).reshape(size, -1)
    total = chunks[(rank - 1) % size]
    for step in range(size - 1):
        comm.send((rank + 1) % size, total)
        total = combine(comm.recv((rank - 1) % size), chunks[(rank - 2 - step) % size])
    return np.array(total)


def ring_all_gather(comm: Comm, chunk: Array) -> Array:
    """Return the chunks of all ranks one behind the other, along the first axis: N - 1 steps around a ring.

    Parameters
    ----------
    comm : Comm
        This rank.
    chunk : ndarray, shape (c, ...)
        This rank's part; the same shape and dtype on all ranks.

    Returns
    -------
    ndarray, shape (N * c, ...)
        Equal on all ranks.

    References
    ----------
    .. [1] Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.1.
    """
    size, rank = comm.size, comm.rank
    chunk = np.atleast_1d(as_array("chunk", chunk))
    parts = {rank: chunk}
    for step in range(size - 1):
        comm.send((rank + 1) % size, parts[(rank - step) % size])
        parts[(rank - step - 1) % size] = comm.recv((rank - 1) % size)
    return np.concatenate([parts[k] for k in range(size)])


def ring_all_reduce(comm: Comm, x: Array, combine: Callable[[Array, Array], Array] = sum_pair) -> Array:
    """Return the sum over ranks: a reduce-scatter, then an all-gather.

    Parameters
    ----------
    comm : Comm
        This rank.
    x : ndarray, any shape
        This rank's addend; the same shape and dtype on all ranks.
    combine : callable
        What takes the place of the sum of two ranks, such as their maximum.

    Returns
    -------
    ndarray
        Shape of `x`; equal on all ranks.  A rank sends ``2 (N - 1) ceil(n / N)`` elements, in 2 (N - 1)
        messages.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 7.1.
    """
    x = as_array("x", x)
    return ring_all_gather(comm, ring_reduce_scatter(comm, x, combine))[: x.size].reshape(x.shape)


def recursive_all_reduce(comm: Comm, x: Array) -> Array:
    """Return the sum over ranks: recursive halving, then recursive doubling (Rabenseifner's algorithm).

    Parameters
    ----------
    comm : Comm
        This rank.
    x : ndarray, any shape
        This rank's addend; the same shape and dtype on all ranks.

    Returns
    -------
    ndarray
        Shape of `x`; equal on all ranks.

    Notes
    -----
    With q the largest power of two up to N, the first 2 (N - q) ranks fold: an even one sends `x` to its odd
    neighbour, which takes part for both and sends the result back.  The q ranks that take part send
    ``2 (q - 1) ceil(n / q)`` elements in 2 log2(q) messages.

    References
    ----------
    .. [1] Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.5.
    """
    x = as_array("x", x)
    power = 1 << (comm.size.bit_length() - 1)
    folded = 2 * (comm.size - power)
    if comm.rank < folded and comm.rank % 2 == 0:
        comm.send(comm.rank + 1, x)
        return comm.recv(comm.rank + 1)
    if comm.rank < folded:
        x = sum_pair(comm.recv(comm.rank - 1), x)
    place = comm.rank // 2 if comm.rank < folded else comm.rank - folded // 2

    def rank_at(place: int) -> int:
        return 2 * place + 1 if place < folded // 2 else place + folded // 2

    total = padded(x, power)
    distance = power // 2
    while distance:  # halving: keep the half of the chunks in which this place lies
        halves = np.split(total, 2)
        upper = bool(place & distance)
        partner = rank_at(place ^ distance)
        comm.send(partner, halves[not upper])
        total = sum_pair(halves[upper], comm.recv(partner))
        distance //= 2
    distance = 1
    while distance < power:  # doubling: the way back
        partner = rank_at(place ^ distance)
        comm.send(partner, total)
        other = comm.recv(partner)
        total = np.concatenate([other, total] if place & distance else [total, other])
        distance *= 2
    result = total[: x.size].reshape(x.shape)
    if comm.rank < folded:
        comm.send(comm.rank - 1, result)
    return np.array(result)


def tree_reduce(comm: Comm, x: Array, root: int = 0) -> Array | None:
    """Return the sum over ranks on rank `root`, and None on the others: a binomial tree.

    Parameters
    ----------
    comm : Comm
        This rank.
    x : ndarray, any shape
        This rank's addend; the same shape and dtype on all ranks.
    root : int
        Where the sum is wanted.

    Returns
    -------
    ndarray or None
        Shape of `x`.  Every rank but the root sends `x.size` elements once; ceil(log2 N) rounds.

    References
    ----------
    .. [1] Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.4.
    """
    place = _place(comm, root)
    total = np.array(as_array("x", x))
    distance = 1
    while distance < comm.size:
        if place & distance:
            comm.send((place - distance + root) % comm.size, total)
            return None
        if place + distance < comm.size:
            total = sum_pair(total, comm.recv((place + distance + root) % comm.size))
        distance *= 2
    return total


def tree_broadcast(comm: Comm, x: Array | None, root: int = 0) -> Array:
    """Return rank `root`'s array on every rank: a binomial tree.

    Parameters
    ----------
    comm : Comm
        This rank.
    x : ndarray or None
        What to send; looked at on the root only.
    root : int
        Who has it.

    Returns
    -------
    ndarray
        A copy.  N - 1 messages in all; ceil(log2 N) rounds, in which the root sends every time.

    References
    ----------
    .. [1] Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.2.
    """
    place = _place(comm, root)
    distance = 1
    while distance < comm.size and not place & distance:
        distance *= 2
    received = comm.recv((place - distance + root) % comm.size) if place else np.array(as_array("x", x))
    while distance > 1:
        distance //= 2
        if place + distance < comm.size:
            comm.send((place + distance + root) % comm.size, received)
    return received


def tree_all_reduce(comm: Comm, x: Array) -> Array:
    """Return the sum over ranks: a binomial tree to rank 0, and one back.

    Parameters
    ----------
    comm : Comm
        This rank.
    x : ndarray, any shape
        This rank's addend; the same shape and dtype on all ranks.

    Returns
    -------
    ndarray
        Shape of `x`; equal on all ranks.
    """
    return tree_broadcast(comm, tree_reduce(comm, x))


def pairwise_all_to_all(comm: Comm, blocks: Sequence[Array]) -> list[Array]:
    """Return what every rank has for this one: block s of the result is block ``comm.rank`` of rank s.

    Parameters
    ----------
    comm : Comm
        This rank.
    blocks : sequence of N ndarrays
        What this rank has for each rank, itself included; shapes may differ.

    Returns
    -------
    list of N ndarrays
        In order of the sending rank; N - 1 messages a rank.

    Raises
    ------
    ShapeError
        If there is not one block for each rank.

    References
    ----------
    .. [1] Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.3.
    """
    if len(blocks) != comm.size:
        raise ShapeError(f"blocks: expected one for each of {comm.size} ranks, got {len(blocks)}")
    received = {comm.rank: np.array(blocks[comm.rank])}
    for step in range(1, comm.size):
        dest, source = (comm.rank + step) % comm.size, (comm.rank - step) % comm.size
        comm.send(dest, blocks[dest])
        received[source] = comm.recv(source)
    return [received[rank] for rank in range(comm.size)]


def _place(comm: Comm, root: int) -> int:
    """Return this rank counted from `root`."""
    if not 0 <= root < comm.size:
        raise OptionError(f"root: expected a rank below {comm.size}, got {root}")
    return (comm.rank - root) % comm.size
