"""What ranks send in an MPI library's collectives: its algorithms, block by block.

`memsim.collectives` counts the collectives of `refimpl.parallel`, which pad what does not divide and fold
whole vectors where ranks are no power of two.  A library does neither: its blocks are uneven, and pairs of
ranks split a vector before one of them takes part for both.  These are Open MPI's algorithms, of which its
monitoring component counted the same messages and bytes (tests/parallel/test_monitored.py).

>>> [sum(sizes) for sizes in mpi_messages("all_reduce", "ring", elements=10, ranks=4)]
[15, 16, 15, 14]
>>> mpi_messages("all_reduce", "rabenseifner", elements=8, ranks=3)
[[4, 4, 4, 8], [4, 4], [4, 4]]
"""

from __future__ import annotations

from collections.abc import Callable

from refimpl.errors import OptionError

__all__ = ["ALGORITHMS", "mpi_messages"]

Messages = list[list[int]]  # for each rank the elements of each message that it sends


def mpi_messages(operation: str, algorithm: str, *, elements: int, ranks: int) -> Messages:
    """Return the elements of every message that each rank sends.

    Parameters
    ----------
    operation, algorithm : str
        One of the pairs in `ALGORITHMS`.
    elements : int
        Length of the vector that is reduced, gathered, sent, or that a rank holds for all others.  All but an
        all-reduce, a broadcast and a reduction need a multiple of `ranks`, as MPI's calls do.
    ranks : int
        Number of ranks; rank 0 is the root.

    Returns
    -------
    list of list of int

    Raises
    ------
    OptionError
        If nobody has that operation by that algorithm, or a number is out of range.

    References
    ----------
    .. [1] Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.
    .. [2] Open MPI 5.0, ompi/mca/coll/base: coll_base_allreduce.c, coll_base_reduce_scatter.c.

    Examples
    --------
    >>> mpi_messages("broadcast", "binomial", elements=5, ranks=4)
    [[5, 5], [5], [], []]
    """
    if (operation, algorithm) not in ALGORITHMS:
        pairs = ", ".join(f"{a} by {b}" for a, b in ALGORITHMS)
        raise OptionError(f"algorithm: expected one of {pairs}; got {operation} by {algorithm}")
    if ranks < 1 or elements < ranks:
        raise OptionError(f"expected ranks from 1 and at least as many elements; got {ranks} and {elements}")
    if operation not in ("all_reduce", "broadcast", "reduce") and elements % ranks:
        raise OptionError(f"elements: expected a multiple of {ranks} ranks; got {elements}")
    return ALGORITHMS[operation, algorithm](elements, ranks)


def _ring_all_reduce(n: int, p: int) -> Messages:
    """Every block but one in each phase; the first n % p blocks hold an element more."""
    blocks = [n // p + (block < n % p) for block in range(p)]
    scatter = [[blocks[(rank - step) % p] for step in range(p - 1)] for rank in range(p)]
    gather = [[blocks[(rank + 1 - step) % p] for step in range(p - 1)] for rank in range(p)]
    return [first + second for first, second in zip(scatter, gather, strict=True)]


def _each_block_once(n: int, p: int) -> Messages:
    return [[n // p] * (p - 1)] * p


def _power(p: int) -> tuple[int, int]:
    """Return the largest power of two up to p, and how many ranks are beyond it."""
    power = 1 << (p.bit_length() - 1)
    return power, p - power


def _doubling_all_reduce(n: int, p: int) -> Messages:
    """The whole vector at each distance; beyond a power of two, even ranks leave it to odd ones."""
    power, beyond = _power(p)
    rounds = power.bit_length() - 1
    found = [[n] * rounds for _ in range(p)]
    for even in range(0, 2 * beyond, 2):
        found[even], found[even + 1] = [n], [n] * (rounds + 1)
    return found


def _rabenseifner_all_reduce(n: int, p: int) -> Messages:
    """Halving, then doubling; beyond a power of two, pairs split the vector and even ranks go on for both."""
    power, beyond = _power(p)
    found: Messages = []
    for rank in range(p):
        folded = rank < 2 * beyond
        if folded and rank % 2:
            found.append([n // 2, n - n // 2])
            continue
        place = rank // 2 if folded else rank - beyond
        sent, back, window, distance = [], [], n, 1
        while distance < power:
            lower = place < place ^ distance
            kept = window // 2 if lower else window - window // 2
            sent.append(window - kept)
            back.append(kept)
            window, distance = kept, 2 * distance
        core = sent + back[::-1]
        found.append([n - n // 2, *core, n] if folded else core)
    return found


def _halved(n: int, p: int, *, near_first: bool) -> tuple[Messages, list[int], list[list[int]]]:
    """Return messages of a halving among a power of two, which place is left with which part, and the parts.

    Beyond a power of two, even ranks leave their vector to odd ones, whose part then holds two blocks.
    """
    power, beyond = _power(p)
    parts = [[2 * place, 2 * place + 1] if place < beyond else [place + beyond] for place in range(power)]
    found: Messages = [[n] if rank < 2 * beyond and rank % 2 == 0 else [] for rank in range(p)]
    distances = [1 << k for k in range(power.bit_length() - 1)]
    left: list[int] = []
    for place in range(power):
        low, high = 0, power
        for distance in distances if near_first else reversed(distances):
            middle = (low + high) // 2
            upper = bool(place & distance)
            given = range(low, middle) if upper else range(middle, high)
            found[parts[place][-1]].append(sum(len(parts[part]) for part in given) * (n // p))
            low, high = (middle, high) if upper else (low, middle)
        left.append(low)
    return found, left, parts


def _halving_reduce_scatter(n: int, p: int) -> Messages:
    """Far partners first: each place is left with its own part; odd ranks send even ones their block."""
    found, left, parts = _halved(n, p, near_first=False)
    for place, part in enumerate(left):
        found[parts[place][-1]] += [n // p] * (len(parts[part]) - 1)
    return found


def _butterfly_reduce_scatter(n: int, p: int) -> Messages:
    """Near partners first: a place is left with the part of its mirrored bits; then each gets its own."""
    found, left, parts = _halved(n, p, near_first=True)
    for place, part in enumerate(left):
        own = parts[place][-1]
        found[own] += [n // p for block in parts[part] if block != own]
    return found


def _butterfly_of_blocks(n: int, p: int) -> Messages:
    """Of equal blocks, a power of two of ranks needs no exchange at the end."""
    return (_halving_reduce_scatter if p & (p - 1) == 0 else _butterfly_reduce_scatter)(n, p)


def _binomial_broadcast(n: int, p: int) -> Messages:
    """Rank r, once it has the vector, sends it to r + 2**k for each 2**k above r."""
    reach = [1 << k for k in range(p.bit_length())]
    return [[n for step in reach if rank < step and rank + step < p] for rank in range(p)]


def _binomial_reduce(n: int, p: int) -> Messages:
    return [[n] if rank else [] for rank in range(p)]


def _bruck_all_gather(n: int, p: int) -> Messages:
    """All that a rank has, to the rank as far below as it has blocks, until it has all."""
    held = [1 << k for k in range((p - 1).bit_length())]
    return [[min(blocks, p - blocks) * (n // p) for blocks in held]] * p


def _bruck_all_to_all(n: int, p: int) -> Messages:
    """In the round of each binary digit, the blocks whose distance has it."""
    digits = range((p - 1).bit_length())
    return [[sum(block >> k & 1 for block in range(p)) * (n // p) for k in digits]] * p


ALGORITHMS: dict[tuple[str, str], Callable[[int, int], Messages]] = {
    ("all_reduce", "ring"): _ring_all_reduce,
    ("all_reduce", "rabenseifner"): _rabenseifner_all_reduce,
    ("all_reduce", "recursive_doubling"): _doubling_all_reduce,
    ("all_gather", "ring"): _each_block_once,
    ("all_gather", "bruck"): _bruck_all_gather,
    ("reduce_scatter", "ring"): _each_block_once,
    ("reduce_scatter", "recursive_halving"): _halving_reduce_scatter,
    ("reduce_scatter", "butterfly"): _butterfly_reduce_scatter,
    ("reduce_scatter_block", "recursive_halving"): _halving_reduce_scatter,
    ("reduce_scatter_block", "butterfly"): _butterfly_of_blocks,
    ("all_to_all", "pairwise"): _each_block_once,
    ("all_to_all", "bruck"): _bruck_all_to_all,
    ("broadcast", "binomial"): _binomial_broadcast,
    ("reduce", "binomial"): _binomial_reduce,
}
