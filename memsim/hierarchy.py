"""Collectives in two levels, first among the ranks of a node, then among nodes, or the other way round.

Every phase is a ring or a tree of `memsim.collectives` with the costs of its level.  What crosses between
nodes is divided among the ranks of a node, each with its own share of the network.

>>> inside, across = Level(latency=2e-6, byte_time=1 / 300e9), Level(latency=5e-6, byte_time=1 / 25e9)
>>> two = {"node_size": 8, "nodes": 8, "inside": inside, "across": across}
>>> time = hierarchical("all_reduce", elements=2**30, itemsize=2, **two)
>>> [term.name for term in time.terms][:2], float(time.total) < 0.04
(['reduce_scatter inside: latency', 'reduce_scatter inside: transfer'], True)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from memsim.collectives import collectives, sent_by_rank
from memsim.estimate import Estimate, estimate
from memsim.training_memory import positive_values
from memsim.units import Quantity
from refimpl.errors import OptionError
from refimpl.parallel.comm import Sent

__all__ = ["PHASES", "Level", "hierarchical", "sent_in_two_levels"]


class Level(NamedTuple):
    """Seconds a message, a byte sent and a byte added, among the ranks of a level."""

    latency: Quantity = 0
    byte_time: Quantity = 0
    reduce_time: Quantity = 0


# Operation: its phases, each with an algorithm, the level it runs on, and whether it handles the whole vector
# or one rank's part of a node's.  Of an all-gather and a reduce-scatter the vector is the whole one.
PHASES: dict[str, tuple[tuple[str, str, str, bool], ...]] = {
    "all_reduce": (
        ("reduce_scatter", "ring", "inside", True),
        ("all_reduce", "ring", "across", False),
        ("all_gather", "ring", "inside", True),
    ),
    "reduce_scatter": (
        ("reduce_scatter", "ring", "inside", True),
        ("reduce_scatter", "ring", "across", False),
    ),
    "all_gather": (("all_gather", "ring", "across", False), ("all_gather", "ring", "inside", True)),
    "all_to_all": (("all_to_all", "pairwise", "inside", True), ("all_to_all", "pairwise", "across", True)),
    "broadcast": (("broadcast", "tree", "across", True), ("broadcast", "tree", "inside", True)),
    "reduce": (("reduce", "tree", "inside", True), ("reduce", "tree", "across", True)),
}


def hierarchical(
    operation: str,
    *,
    elements: Quantity,
    node_size: Quantity,
    nodes: Quantity,
    itemsize: Quantity = 1,
    inside: Level = Level(),  # noqa: B008 (immutable)
    across: Level = Level(),  # noqa: B008
) -> Estimate:
    """Return the time of a collective in two levels.

    Parameters
    ----------
    operation : str
        A key of `PHASES`.
    elements, itemsize : int
        As for `memsim.collectives.collectives`: of all ranks' vector.
    node_size, nodes : int
        Ranks of a node, and nodes.
    inside, across : Level
        Costs among the ranks of a node, and among one rank of each node.

    Returns
    -------
    Estimate
        In seconds, a term for each cost of each phase.

    Raises
    ------
    OptionError
        If nobody has that operation, or a number is out of range.

    Notes
    -----
    An all-to-all first gathers on each rank what its node has for that rank's peers on other nodes, then
    crosses in messages of a node's size: ``(g - 1)/g`` and ``(k - 1)/k`` of a rank's vector.

    References
    ----------
    .. [1] Thakur et al. 2005, section 4; Rajbhandari et al. 2022, arXiv:2201.05596, section 5.2 (all-to-all).

    Examples
    --------
    >>> one = hierarchical("all_reduce", elements=64, node_size=8, nodes=1, inside=Level(byte_time=1))
    >>> ring = {"operation": "all_reduce", "algorithm": "ring", "elements": 64, "ranks": 8}
    >>> one.total == collectives(**ring, byte_time=1).total
    True
    """
    if operation not in PHASES:
        raise OptionError(f"operation: expected one of {', '.join(PHASES)}; got {operation!r}")
    sizes = positive_values(n=elements, g=node_size, k=nodes)
    if not all(isinstance(size, int) for size in sizes.values()):
        raise OptionError(f"elements, node_size, nodes: expected whole numbers; got {sizes}")
    n, g, k = (int(size) for size in sizes.values())
    terms = []
    for phase, algorithm, level, whole in PHASES[operation]:
        one: Any = {"operation": phase, "algorithm": algorithm, "itemsize": itemsize}
        costs = inside if level == "inside" else across
        found = collectives(
            **one, elements=n if whole else -(-n // g), ranks=g if level == "inside" else k, **costs._asdict()
        )
        terms += [replace(item, name=f"{phase} {level}: {item.name}") for item in found.terms]
    return estimate(
        f"{operation} in two levels",
        terms,
        leaves_out="contention, overlap of the levels, overlap with computation",
    )


def sent_in_two_levels(
    operation: str, *, elements: int, node_size: int, nodes: int, itemsize: int = 1
) -> list[Sent]:
    """Return the messages and bytes that each rank sends, node by node.

    Parameters
    ----------
    operation, elements, node_size, nodes, itemsize
        As for `hierarchical`; rank 0 is the root of a broadcast or reduction, whose ranks across are the
        first of each node.

    Raises
    ------
    OptionError
        If nobody has that operation, or a number is out of range.

    Examples
    --------
    >>> sent_in_two_levels("all_reduce", elements=64, node_size=4, nodes=2)[0]
    Sent(messages=8, bytes=112)
    """
    if operation not in PHASES:
        raise OptionError(f"operation: expected one of {', '.join(PHASES)}; got {operation!r}")
    totals = [[0, 0] for _ in range(node_size * nodes)]
    for phase, algorithm, level, whole in PHASES[operation]:
        size = elements if whole else -(-elements // node_size)
        ranks = node_size if level == "inside" else nodes
        sent = sent_by_rank(phase, algorithm, elements=size, itemsize=itemsize, ranks=ranks)
        for rank, total in enumerate(totals):
            node, place = divmod(rank, node_size)
            if level == "inside" or place == 0 or operation not in ("broadcast", "reduce"):
                one = sent[place if level == "inside" else node]
                total[0] += one.messages
                total[1] += one.bytes
    return [Sent(*total) for total in totals]
