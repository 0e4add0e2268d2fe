"""The price of collectives: every rank's messages and bytes, counted; the time, round by round; the laws."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import memsim.laws.collectives
from memsim.collectives import FORMULAS, collectives, sent_by_rank
from memsim.prices.collective import MODELS
from refimpl import registry
from refimpl.errors import OptionError
from refimpl.parallel.array_collectives import all_reduce
from refimpl.parallel.comm import Traffic
from refimpl.testing import check, draw

registry.load()
assert memsim.laws.collectives


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_what_is_counted(name: str) -> None:
    record = registry.get(name)
    assert record.sample is not None
    sample = record.sample
    axes = {axis: st.integers(low, high) for axis, (low, high) in record.axes.items()}
    options = {key: st.sampled_from(choices) for key, choices in record.options.items()}

    @given(shape=st.fixed_dictionaries({**axes, **options}), seed=st.integers(0, 2**32 - 1))
    def run(shape: dict[str, Any], seed: int) -> None:
        case = sample(np.random.default_rng(seed), **shape)
        traffic = Traffic()
        case.replace(traffic=traffic).call(record.function)
        assert MODELS[name](case) == traffic.totals()

    run()


@pytest.mark.parametrize("name", MODELS)
def test_edges_are_counted_exactly(name: str) -> None:
    record = registry.get(name)
    assert record.sample is not None
    for seed, edge in enumerate(record.edges):
        case = record.sample(np.random.default_rng(seed), **{**draw(record, seed), **edge})
        traffic = Traffic()
        case.replace(traffic=traffic).call(record.function)
        assert MODELS[name](case) == traffic.totals(), edge


def test_model_knows_the_dtype() -> None:
    traffic = Traffic()
    all_reduce(np.ones((3, 10), np.float16), traffic=traffic)
    assert (
        traffic.sent(2) == sent_by_rank("all_reduce", "ring", elements=10, itemsize=2, ranks=3)[2] == (4, 32)
    )


def test_record_of_the_time() -> None:
    report = check("cost.collectives", examples=30)
    assert report.ok, report.failed


def test_textbook_times() -> None:
    """Thakur et al.: the ring at p = 4, N = 4 MiB sends 6,291,456 bytes in 6 messages."""
    one = {"elements": 4 * 2**20, "ranks": 4}
    ring = collectives(operation="all_reduce", algorithm="ring", latency=1, byte_time=1, **one)
    assert (ring["latency"], ring["transfer"]) == (6, 6_291_456)
    recursive = collectives(operation="all_reduce", algorithm="recursive", latency=1, byte_time=1, **one)
    assert (recursive["latency"], recursive["transfer"]) == (4, 6_291_456)
    folded = collectives(operation="all_reduce", algorithm="recursive", elements=8, ranks=5, reduce_time=1)
    assert folded["reduction"] == 3 * 2 + 8
    assert ring.total == 6_291_462


def test_time_is_exact() -> None:
    time = collectives(operation="all_gather", algorithm="ring", elements=9, ranks=4, byte_time=0.1)
    assert time.total == Fraction(9, 10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"algorithm": "pairwise"}, "all_reduce by ring"),
        ({"elements": 0}, "elements|n: expected"),
        ({"ranks": 1.5}, "whole"),
        ({"latency": -1}, "from 0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], match: str) -> None:
    good: dict[str, Any] = {"operation": "all_reduce", "algorithm": "ring", "elements": 4, "ranks": 2}
    with pytest.raises(OptionError, match=match):
        collectives(**{**good, **options})


def test_every_pair_has_counts() -> None:
    for operation, algorithm in FORMULAS:
        assert len(sent_by_rank(operation, algorithm, elements=5, itemsize=2, ranks=6)) == 6
    with pytest.raises(OptionError, match="root"):
        sent_by_rank("reduce", "tree", elements=5, itemsize=2, ranks=3, root=3)
