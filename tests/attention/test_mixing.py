"""BigBird's claim measured: random keys mix fast, a window does not, a hub is two steps from everything."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from refimpl.attention import bigbird_plan, diameter, rapid_mixing_sparse, spectral_gap
from refimpl.attention.bigbird_mixing import Mixing

LENGTHS = (64, 256, 1024, 4096)


def _band(N: int) -> Any:
    ones = [np.ones(N - abs(k), dtype=bool) for k in (-1, 0, 1)]
    return scipy.sparse.csr_array(scipy.sparse.diags_array(ones, offsets=[-1, 0, 1], dtype=bool))


def _random(N: int, r: int) -> Any:
    plan = bigbird_plan(N, heads=1, random_blocks=r, global_blocks=(), rng=0)[0]
    edges = np.repeat(np.arange(N), r), plan.ravel()
    return scipy.sparse.csr_array((np.ones(N * r, dtype=bool), edges), shape=(N, N))


def _hub(N: int) -> Any:
    edges = np.zeros(N, dtype=np.int64), np.arange(N)
    return scipy.sparse.csr_array((np.ones(N, dtype=bool), edges), shape=(N, N))


@functools.cache
def _measured(name: str, N: int) -> Mixing:
    """Return gap and diameter of a band, of random keys, or of both or a band and a hub."""
    graph = {
        "window": lambda: _band(N),
        "random": lambda: _random(N, 3),
        "window and random": lambda: _band(N) + _random(N, 3),
        "window and hub": lambda: _band(N) + _hub(N),
    }
    return rapid_mixing_sparse(graph[name]())


def test_a_window_mixes_ever_more_slowly() -> None:
    """Three keys: the gap falls as (π / N)² / 3, the diameter grows as N."""
    for N in LENGTHS:
        gap, far = _measured("window", N)
        assert gap == pytest.approx((math.pi / N) ** 2 / 3, rel=0.05)
        assert far == N - 1


def test_random_keys_keep_the_gap_open() -> None:
    """With three random keys besides the gap stays above a quarter, and the diameter grows as log N.

    A graph of degree d = 6 about has at least log N / log (d - 1) steps; twice that and one are enough here.
    """
    for N in LENGTHS:
        gap, far = _measured("window and random", N)
        assert gap > 0.25
        assert far <= 2 * math.log(N) / math.log(6 - 1) + 1
    assert far == 6.0


def test_a_global_token_is_two_steps_from_everything() -> None:
    for N in LENGTHS:
        gap, far = _measured("window and hub", N)
        assert gap == pytest.approx(0.25, abs=0.01)
        assert far == 2.0


def test_patterns_come_in_the_order_of_the_slide() -> None:
    """At N = 4096 the window alone is far below random keys; it takes 600 times as many steps to cross."""
    window, both = (_measured(name, 4096) for name in ("window", "window and random"))
    assert window.spectral_gap < 1e-6
    assert both.spectral_gap > 0.3
    assert window.diameter > 600 * both.diameter
    assert _measured("random", 1024).spectral_gap > 0.2  # random keys without a window, too


@pytest.mark.parametrize("graph", [_band(300), _band(300) + _hub(300), _band(300) + _random(300, 2)])
def test_many_tokens_from_the_edges_are_as_by_definition(graph: Any) -> None:
    mask = graph.toarray()
    gap, far = rapid_mixing_sparse(graph)
    assert gap == pytest.approx(spectral_gap(mask), abs=1e-11)
    assert far == diameter(mask)
