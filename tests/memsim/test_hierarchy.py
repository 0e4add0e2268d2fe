"""Collectives in two levels against flat ones, bounds, and a count of what crosses between nodes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.collectives import FORMULAS, collectives
from memsim.hierarchy import PHASES, Level, hierarchical
from refimpl.errors import OptionError

FLAT = {operation: algorithm for operation, algorithm in FORMULAS if algorithm != "recursive"} | {
    "all_reduce": "ring"
}
SIZES = st.integers(1, 12)
COSTS = st.builds(Level, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))


@given(st.sampled_from(list(PHASES)), SIZES, st.integers(1, 500), COSTS, COSTS)
def test_one_level_is_the_flat_collective(
    operation: str, ranks: int, n: int, level: Level, other: Level
) -> None:
    flat: Any = {"operation": operation, "algorithm": FLAT[operation], "elements": n, "ranks": ranks}
    expected = collectives(**flat, **level._asdict()).total
    node = hierarchical(operation, elements=n, node_size=ranks, nodes=1, inside=level, across=other)
    assert node.total == expected
    spread = hierarchical(operation, elements=n, node_size=1, nodes=ranks, inside=other, across=level)
    assert spread.total == expected


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 50))
def test_what_crosses_is_divided_among_the_ranks_of_a_node(g: int, k: int, each: int) -> None:
    """Bytes alone: a rank sends 2(k-1)/k of its g-th part across, and 2(g-1)/g of the whole inside."""
    n = g * k * each
    crossing = hierarchical("all_reduce", elements=n, node_size=g, nodes=k, across=Level(byte_time=1)).total
    assert crossing == 2 * Fraction(k - 1, k) * Fraction(n, g)
    within = hierarchical("all_reduce", elements=n, node_size=g, nodes=k, inside=Level(byte_time=1)).total
    assert within == 2 * Fraction(g - 1, g) * n
    # Together they are what a flat ring of all ranks sends, 2(p-1)/p of the vector: no byte more.
    assert crossing + within == 2 * Fraction(g * k - 1, g * k) * n


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 50), COSTS, COSTS)
def test_halves_make_an_all_reduce(g: int, k: int, each: int, inside: Level, across: Level) -> None:
    one: Any = {"elements": g * k * each, "node_size": g, "nodes": k, "inside": inside, "across": across}
    halves = sum(hierarchical(half, **one).total for half in ("reduce_scatter", "all_gather"))
    assert hierarchical("all_reduce", **one).total == halves


@given(st.integers(2, 8), st.integers(2, 8))
def test_fewer_rounds_than_a_flat_ring(g: int, k: int) -> None:
    level = Level(latency=1)
    two = hierarchical("all_reduce", elements=1, node_size=g, nodes=k, inside=level, across=level).total
    assert two == 2 * (g - 1) + 2 * (k - 1) <= 2 * (g * k - 1)


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match="expected one of all_reduce"):
        hierarchical("scan", elements=1, node_size=1, nodes=1)
    for bad in ({"elements": 1.5}, {"node_size": 0}, {"nodes": -1}):
        with pytest.raises(OptionError):
            hierarchical("all_reduce", **{"elements": 4, "node_size": 2, "nodes": 2, **bad})
