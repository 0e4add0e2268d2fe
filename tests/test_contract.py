"""Every reference and every NumPy implementation obeys its record, under hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import registry
from refimpl.testing import Report, check

registry.load()

RECORDS = sorted(registry.TECHNIQUES.values(), key=lambda record: record.name)
IMPLEMENTATIONS = [item for item in registry.IMPLEMENTATIONS if "numpy" in item.backends]


def _assert_ok(report: Report) -> None:
    assert not report.failed, "\n".join(
        f"{outcome.check}: {outcome.detail}\n  {outcome.reproducer}" for outcome in report.failed
    )
    assert report.counts()["passed"] > 0


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_edge_cases(record: registry.Technique) -> None:
    if record.edges:
        _assert_ok(check(record.name, examples=0))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_reference(record: registry.Technique) -> None:
    axes = {name: st.integers(low, high) for name, (low, high) in record.axes.items()}
    options = {name: st.sampled_from(choices) for name, choices in record.options.items()}

    @given(shape=st.fixed_dictionaries({**axes, **options}), seed=st.integers(0, 2**32 - 1))
    def run(shape: dict[str, registry.Option], seed: int) -> None:
        _assert_ok(check(record.name, seed=seed, axes=shape))

    run()


@pytest.mark.parametrize("item", IMPLEMENTATIONS, ids=lambda item: f"{item.technique}-{item.target}")
def test_implementation(item: registry.Implementation) -> None:
    _assert_ok(check(item.technique, item.load(), examples=8))
