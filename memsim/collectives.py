"""What a collective sends and how long it takes: messages and bytes of each rank, and the α-β-γ time.

A message of b bytes takes ``α + b β`` seconds, adding b bytes to others ``b γ``; rounds follow one another.

>>> sent_by_rank("all_reduce", "ring", elements=10, itemsize=4, ranks=4)[0]
Sent(messages=6, bytes=72)
>>> one = {"elements": 2**30, "itemsize": 2, "ranks": 8}
>>> time = collectives(operation="all_reduce", algorithm="ring", byte_time=1e-10, **one)
>>> print(time.explain()[1])
transfer: 2*(p - 1)*ceil(n/p)*e*β = 2*(8 - 1)*ceil(1073741824/8)*2*0.0000000001 = 375.8 ms
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError
from refimpl.parallel.comm import Sent
from refimpl.registry import Case, Source, technique

__all__ = ["FORMULAS", "collectives", "sent_by_rank"]

Operation = Literal["reduce_scatter", "all_gather", "all_reduce", "broadcast", "reduce", "all_to_all"]
Algorithm = Literal["ring", "recursive", "doubling", "tree", "pairwise", "bruck"]
_THAKUR = "Thakur et al. 2005, doi:10.1177/1094342005051521"
# (operation, algorithm): seconds of latency, of transfer, of reduction, and the section of the source.
# p ranks, n elements of e bytes; q the largest power of two up to p, l = log2(q), f = 1 if q < p and else 0,
# k = ceil(log2(p)), o the ones in the binary digits of 1 to p - 1.
FORMULAS: dict[tuple[str, str], tuple[str, str, str, str]] = {
    ("reduce_scatter", "ring"): ("(p - 1)*α", "(p - 1)*ceil(n/p)*e*β", "(p - 1)*ceil(n/p)*e*γ", "4.4"),
    ("all_gather", "ring"): ("(p - 1)*α", "(p - 1)*ceil(n/p)*e*β", "", "4.1"),
    ("all_reduce", "ring"): ("2*(p - 1)*α", "2*(p - 1)*ceil(n/p)*e*β", "(p - 1)*ceil(n/p)*e*γ", "4.5"),
    ("all_reduce", "recursive"): (
        "(2l + 2f)*α",
        "(2*(q - 1)*ceil(n/q) + 2f*n)*e*β",
        "((q - 1)*ceil(n/q) + f*n)*e*γ",
        "4.5",
    ),
    ("all_reduce", "doubling"): ("(l + 2f)*α", "(l + 2f)*n*e*β", "(l + f)*n*e*γ", "4.5"),
    ("all_reduce", "tree"): ("2k*α", "2k*n*e*β", "k*n*e*γ", "4.4"),
    ("broadcast", "tree"): ("k*α", "k*n*e*β", "", "4.2"),
    ("reduce", "tree"): ("k*α", "k*n*e*β", "k*n*e*γ", "4.4"),
    ("all_to_all", "pairwise"): ("(p - 1)*α", "(p - 1)*ceil(n/p)*e*β", "", "4.3"),
    ("all_gather", "bruck"): ("k*α", "(p - 1)*ceil(n/p)*e*β", "", "4.1"),
    ("all_to_all", "bruck"): ("k*α", "o*ceil(n/p)*e*β", "", "4.3"),
}


def _known(operation: str, algorithm: str) -> None:
    if (operation, algorithm) not in FORMULAS:
        pairs = ", ".join(f"{a} by {b}" for a, b in FORMULAS)
        raise OptionError(f"algorithm: expected one of {pairs}; got {operation} by {algorithm}")


def sent_by_rank(
    operation: str, algorithm: str, *, elements: int, itemsize: int, ranks: int, root: int = 0
) -> list[Sent]:
    """Return the messages and bytes that each rank sends.

    Parameters
    ----------
    operation, algorithm : str
        One of the pairs in `FORMULAS`.
    elements : int
        Length of the vector that is reduced, gathered, broadcast, or that a rank holds for all others; what
        is cut among ranks is padded to a multiple of their number.
    itemsize : int
        Bytes an element.
    ranks : int
        Number of ranks.
    root : int
        Of a broadcast or reduction.

    Returns
    -------
    list of Sent
        In order of rank; equal to what `refimpl.parallel` counts, and of recursive doubling and Bruck's
        algorithms, which it has not, to what Open MPI sends (`memsim.mpi_collectives`).

    Raises
    ------
    OptionError
        If a number is out of range, or nobody has that operation by that algorithm.

    Examples
    --------
    >>> sent_by_rank("broadcast", "tree", elements=5, itemsize=2, ranks=3)
    [Sent(messages=2, bytes=20), Sent(messages=0, bytes=0), Sent(messages=0, bytes=0)]
    """
    _known(operation, algorithm)
    if elements < 0 or itemsize < 1 or not 0 <= root < ranks:
        raise OptionError(
            f"expected elements from 0, itemsize and ranks from 1, root below ranks; "
            f"got elements={elements}, itemsize={itemsize}, ranks={ranks}, root={root}"
        )
    whole = elements * itemsize
    chunk = -(-elements // ranks) * itemsize
    match operation, algorithm:
        case "all_reduce", "recursive":
            return _recursive(elements, itemsize, ranks)
        case "all_reduce", "doubling":
            return _doubling(whole, ranks)
        case _, "bruck":
            moved = ranks - 1 if operation == "all_gather" else _ones(ranks)
            return [Sent((ranks - 1).bit_length(), moved * chunk)] * ranks
        case "all_reduce", "tree":
            up, down = ([tree(place, ranks) for place in range(ranks)] for tree in (_ups, _downs))
            return [Sent(u + d, (u + d) * whole) for u, d in zip(up, down, strict=True)]
        case (("broadcast" | "reduce"), _):
            tree = _downs if operation == "broadcast" else _ups
            counts = [tree((rank - root) % ranks, ranks) for rank in range(ranks)]
            return [Sent(count, count * whole) for count in counts]
    messages = (2 if operation == "all_reduce" else 1) * (ranks - 1)
    return [Sent(messages, messages * chunk)] * ranks


def _ups(place: int, _ranks: int) -> int:
    """Return how many messages a rank sends towards the root: each but the root sends one."""
    return int(place > 0)


def _downs(place: int, ranks: int) -> int:
    """Return how many messages a rank sends in a broadcast: one for each power of two below its lowest."""
    lowest = place & -place if place else 1 << (ranks - 1).bit_length()
    return sum(1 for bit in range(lowest.bit_length() - 1) if place + (1 << bit) < ranks)


def _recursive(elements: int, itemsize: int, ranks: int) -> list[Sent]:
    power = 1 << (ranks.bit_length() - 1)
    messages = 2 * (power.bit_length() - 1)
    core = 2 * (power - 1) * -(-elements // power) * itemsize
    whole, folded = elements * itemsize, 2 * (ranks - power)
    kinds = Sent(messages, core), Sent(1, whole), Sent(messages + 1, core + whole)
    return [kinds[0 if rank >= folded else 1 + rank % 2] for rank in range(ranks)]


def _doubling(whole: int, ranks: int) -> list[Sent]:
    """Return the whole vector in each round; beyond a power of two, even ranks leave it to odd ones."""
    power = 1 << (ranks.bit_length() - 1)
    rounds, folded = power.bit_length() - 1, 2 * (ranks - power)
    counts = [rounds if rank >= folded else rank % 2 * rounds + 1 for rank in range(ranks)]
    return [Sent(count, count * whole) for count in counts]


def _ones(ranks: int) -> int:
    """Return how many blocks Bruck's exchange moves: block i in each round that is a digit of i."""
    return sum(block.bit_count() for block in range(1, ranks))


def _sample(rng: np.random.Generator, *, kind: str, **axes: int) -> Case:
    operation, _, algorithm = kind.partition(" ")
    costs = {name: int(rng.integers(1, 100)) for name in ("latency", "byte_time", "reduce_time")}
    options: dict[str, Any] = {"operation": operation, "algorithm": algorithm, **axes, **costs}
    return Case((), options)


_EDGES: list[dict[str, Any]] = [
    {"kind": " ".join(pair), **shape}
    for pair in FORMULAS
    for shape in ({"ranks": 1}, {"ranks": 7, "elements": 3}, {"ranks": 8, "elements": 64})
]


@technique(
    "cost.collectives",
    entries=(92,),
    kind="cost",
    source=Source("Thakur et al. 2005", "doi:10.1177/1094342005051521", "section 4"),
    axes={"elements": (1, 10**9), "itemsize": (1, 8), "ranks": (1, 300)},
    options={"kind": tuple(" ".join(pair) for pair in FORMULAS)},
    sample=_sample,
    edges=_EDGES,
    exact=True,
)
def collectives(
    *,
    operation: Operation,
    algorithm: Algorithm,
    elements: Quantity,
    ranks: Quantity,
    itemsize: Quantity = 1,
    latency: Quantity = 0,
    byte_time: Quantity = 0,
    reduce_time: Quantity = 0,
) -> Estimate:
    """Return the time of a collective in synchronous rounds, each as long as its largest message takes.

    Parameters
    ----------
    operation : {"reduce_scatter", "all_gather", "all_reduce", "broadcast", "reduce", "all_to_all"}
        What is done.
    algorithm : {"ring", "recursive", "doubling", "tree", "pairwise", "bruck"}
        How; `FORMULAS` lists the pairs there are.  "recursive" is halving, then doubling of what is left;
        "doubling" exchanges whole vectors.
    elements : int
        n: length of the vector that is reduced, gathered, broadcast, or that a rank holds for all others.
    ranks : int
        p.
    itemsize : int
        e, bytes an element.
    latency, byte_time, reduce_time : int, float or Fraction
        α in seconds a message, β and γ in seconds a byte sent and a byte added.

    Returns
    -------
    Estimate
        In seconds, exact.

    Raises
    ------
    OptionError
        If a number is out of range, or nobody has that operation by that algorithm.

    Notes
    -----
    Without padding and reductions these are the textbook's ``2(p-1)α + 2((p-1)/p)Nβ`` for a ring and
    ``2 lg p α`` with the same transfer for recursive halving and doubling, which costs two more messages of
    the whole vector where p is no power of two.

    References
    ----------
    .. [1] Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.

    Examples
    --------
    >>> collectives(operation="broadcast", algorithm="tree", elements=10, ranks=5, latency=1).total
    3
    """
    _known(operation, algorithm)
    values = positive_values(n=elements, p=ranks, e=itemsize)
    if not all(isinstance(value, int) for value in values.values()):
        raise OptionError(
            f"elements, ranks, itemsize: expected whole numbers; got {elements!r}, {ranks!r}, {itemsize!r}"
        )
    p = int(values["p"])
    power = 1 << (p.bit_length() - 1)
    values |= {
        "q": power,
        "l": power.bit_length() - 1,
        "f": int(power < p),
        "k": (p - 1).bit_length(),
        "o": _ones(p),
    }
    values |= _costs(α=latency, β=byte_time, γ=reduce_time)
    *formulas, section = FORMULAS[operation, algorithm]
    names, symbols = ("latency", "transfer", "reduction"), "αβγ"
    terms = [
        term(name, formula, values, "s", f"{_THAKUR}, section {section}")
        for name, formula, symbol in zip(names, formulas, symbols, strict=True)
        if formula and (symbol != "γ" or values["γ"])
    ]
    return estimate(
        f"{operation} by {algorithm}", terms, leaves_out="contention, overlap with computation, topology"
    )


def _costs(**quantities: Quantity) -> dict[str, Number]:
    values = {name: exact(value, name) for name, value in quantities.items()}
    for name, value in values.items():
        if value < 0:
            raise OptionError(f"{name}: expected a number from 0; got {quantities[name]!r}")
    return values
