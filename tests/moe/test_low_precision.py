"""Mixtures of experts in the formats of kernels: references and laws hold there too, not only in float64."""

from __future__ import annotations

import pytest

from refimpl import registry
from refimpl.testing import check

registry.load()

ENTRIES = {*range(39, 45), 46, 47, 48, 55, 56}
RECORDS = [
    name
    for name, record in registry.TECHNIQUES.items()
    if name.startswith("moe.") and ENTRIES & {*record.entries}
]


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_references_keep_their_laws(name: str, dtype: str) -> None:
    report = check(name, dtypes=(dtype,), examples=3, edges=False)
    assert report.ok, [(outcome.check, outcome.detail, outcome.reproducer) for outcome in report.failed]
