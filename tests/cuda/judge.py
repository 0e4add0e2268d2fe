"""One call of a kernel against the reference in float64, under the policy of `refimpl.tolerances`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cuda_backend.arrays import poisoned_outputs
from refimpl import registry
from refimpl.registry import Case
from refimpl.tolerances import baseline_limits, cast, mismatch, outputs

INVALID = "the case says nothing"  # the baseline itself is useless there
DTYPES = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def arrays(shape: tuple[int, ...], dtype: str, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return q, k, v of shape (B, Tq, Tk, Hq, Hkv, D, Dv), drawn from `seed`, rounded to `dtype`."""
    B, Tq, Tk, Hq, Hkv, D, Dv = shape
    rng = np.random.default_rng(seed)
    sizes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
    q, k, v = cast(Case(tuple(rng.standard_normal(size) for size in sizes)), DTYPES[dtype]).args
    return q, k, v


def difference(f: Any, case: Case, dtype: str, *, technique: str = "attention.dense") -> str | None:
    """Return how `f` differs from the reference on `case`, whose arrays are of `dtype`; None if it does not.

    Outputs are filled with NaN before the kernel writes them; shape and dtype are compared first.
    """
    reference = case.without("block_sizes", "sram", "stream")
    record = registry.get(technique)
    if technique == "attention.flash_backward":  # one tile: the baseline rounds dQ once
        reference = reference.replace(
            block_sizes=(max(1, case.args[0].shape[1]), max(1, case.args[1].shape[1]))
        )
    truth, baseline, limits, invalid = baseline_limits(record, reference, DTYPES[dtype])
    if invalid:
        return f"{INVALID}: {invalid}"
    with poisoned_outputs():
        found = outputs(case.call(f))
    assert list(found) == list(truth)
    for name, actual in found.items():
        if actual.dtype != baseline[name].dtype:
            return f"{name}: expected {baseline[name].dtype}, got {actual.dtype}"
        problem = mismatch(actual, truth[name], limits[name], name=name)
        if problem:
            return problem
    return None
