"""Every kernel obeys the record of its technique: a few cases in the simulator, all of them on a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from zlib import crc32

import numpy as np
import pytest

from refimpl import registry
from refimpl.testing import LOW_PRECISION, Report, check, draw

registry.load()

KERNELS = [item for item in registry.IMPLEMENTATIONS if {"cuda", "cudasim"} & set(item.backends)]
NAMES = [f"{item.technique}-{item.target}-{item.tier}" for item in KERNELS]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill outputs on the device with NaN before a kernel runs: what it does not write shows."""
    from cuda_backend.arrays import poisoned_outputs

    with poisoned_outputs():
        yield


def _assert_ok(report: Report) -> None:
    assert not report.failed, "\n".join(f"{o.check}: {o.detail}\n  {o.reproducer}" for o in report.failed)
    assert report.counts()["passed"] > 0


@pytest.mark.parametrize("item", KERNELS, ids=NAMES)
def test_it_is_called_as_the_reference(item: registry.Implementation) -> None:
    """With every case of the record, whether it takes the shape or refuses it: no keyword is unknown."""
    record, signature = registry.get(item.technique), inspect.signature(item.load())
    assert record.sample is not None
    shapes = [{**draw(record, index), **edge} for index, edge in enumerate(record.edges)]
    for seed, shape in enumerate([*shapes, *(draw(record, seed) for seed in range(8))]):
        case = record.sample(np.random.default_rng(seed), **shape)
        signature.bind(*case.args, **case.kwargs)


@pytest.mark.cudasim
@pytest.mark.parametrize("item", KERNELS, ids=NAMES)
def test_in_the_simulator(item: registry.Implementation) -> None:
    if "cudasim" not in item.backends:
        pytest.skip(f"{item.tier} kernels need a GPU")
    for index, dtype in enumerate(LOW_PRECISION):
        seed = crc32(f"{item.target} {dtype}".encode()) % 10_000  # another case for each
        _assert_ok(
            check(
                item.technique,
                item.load(),
                backend="cudasim",
                seed=seed,
                examples=2 - min(index, 1),
                dtypes=[dtype],
                edges=False,
            )
        )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("item", KERNELS, ids=NAMES)
def test_on_the_gpu(item: registry.Implementation, dtype: str) -> None:
    if item.tier != "portable" and dtype == "float32":
        pytest.skip("tensor cores multiply 16-bit formats; float32 is refused")
    _assert_ok(check(item.technique, item.load(), backend="cuda", examples=6, dtypes=[dtype]))
