"""Collectives in two levels against flat ones, bounds, and a count of what crosses between nodes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.collectives import collectives
from memsim.hierarchy import PHASES, Level, hierarchical, sent_in_two_levels
from refimpl.errors import OptionError
from refimpl.parallel.array_collectives import all_gather, all_reduce, all_to_all, broadcast, reduce_scatter
from refimpl.parallel.comm import Traffic

OTHERS = {"all_to_all": "pairwise", "broadcast": "tree", "reduce": "tree"}
FLAT = OTHERS | dict.fromkeys(("all_reduce", "reduce_scatter", "all_gather"), "ring")
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


@pytest.mark.parametrize("operation", ["all_reduce", "all_to_all", "broadcast"])
@pytest.mark.parametrize(("g", "k", "each"), [(2, 3, 4), (3, 2, 1), (4, 1, 5), (1, 4, 2)])
def test_ranks_that_run_the_phases_send_as_much(operation: str, g: int, k: int, each: int) -> None:
    """The collectives of `refimpl.parallel` one after the other, in nodes and across, counted."""
    n = g * k * each
    x = np.arange(g * k * n, dtype=np.int16).reshape(k, g, n)
    counted = np.zeros((k, g, 2), int)

    def run(function: Callable[..., Any], rows: Any, where: Any) -> Any:
        traffic = Traffic()
        found = function(rows, traffic=traffic)
        counted[where] += [traffic.sent(rank) for rank in range(len(rows))]
        return found

    if operation == "all_reduce":
        parts = np.stack([run(reduce_scatter, x[node], node) for node in range(k)])
        parts = np.stack([run(all_reduce, parts[:, place], np.s_[:, place]) for place in range(g)], 1)
        found = np.stack([run(all_gather, parts[node], node) for node in range(k)])
        assert (found.reshape(g * k, n) == x.sum((0, 1), dtype=x.dtype)).all()
    elif operation == "all_to_all":
        # Blocks for rank (node, place): first to the place within the node, then to the node.
        blocks = x.reshape(k, g, k, g, each)
        inside = np.moveaxis(blocks, 3, 2).reshape(k, g, g, k * each)
        inside = np.stack([run(all_to_all, inside[node], node) for node in range(k)])
        across = np.moveaxis(inside.reshape(k, g, g, k, each), 3, 2).reshape(k, g, k, g * each)
        found = np.stack([run(all_to_all, across[:, place], np.s_[:, place]) for place in range(g)], 1)
        wanted = np.moveaxis(x.reshape(g * k, g * k, each), 1, 0)
        assert (found.reshape(g * k, g * k, each) == wanted).all()
    else:
        x[:, 0] = run(broadcast, x[:, 0], np.s_[:, 0])
        found = np.stack([run(broadcast, x[node], node) for node in range(k)])
        assert (found == x[0, 0]).all()
    model = sent_in_two_levels(operation, elements=n, node_size=g, nodes=k, itemsize=2)
    assert [tuple(row) for row in counted.reshape(g * k, 2)] == [tuple(one) for one in model]


@given(st.sampled_from(list(PHASES)), SIZES, SIZES, st.integers(1, 50))
def test_time_is_that_of_what_the_busiest_rank_sends(operation: str, g: int, k: int, each: int) -> None:
    """In rings and exchanges, whose ranks all send alike: a second a message, then a second a byte."""
    if operation in ("broadcast", "reduce"):
        return
    shape: Any = {"elements": g * k * each, "node_size": g, "nodes": k}
    sent = sent_in_two_levels(operation, **shape)
    assert len(set(sent)) == 1
    for level, count in ((Level(latency=1), sent[0].messages), (Level(byte_time=1), sent[0].bytes)):
        assert hierarchical(operation, inside=level, across=level, **shape).total == count


def test_trees_in_two_levels_send_the_vector_to_everybody_once() -> None:
    for operation in ("broadcast", "reduce"):
        sent = sent_in_two_levels(operation, elements=5, node_size=4, nodes=3)
        assert sum(one.bytes for one in sent) == 11 * 5
        one: Any = {"elements": 5, "node_size": 4, "nodes": 3}
        assert hierarchical(operation, **one, inside=Level(byte_time=1)).total == 2 * 5
        assert hierarchical(operation, **one, across=Level(byte_time=1)).total == 2 * 5


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match="expected one of all_reduce"):
        sent_in_two_levels("scan", elements=1, node_size=1, nodes=1)
    with pytest.raises(OptionError, match="expected one of all_reduce"):
        hierarchical("scan", elements=1, node_size=1, nodes=1)
    for bad in ({"elements": 1.5}, {"node_size": 0}, {"nodes": -1}):
        with pytest.raises(OptionError):
            hierarchical("all_reduce", **{"elements": 4, "node_size": 2, "nodes": 2, **bad})
