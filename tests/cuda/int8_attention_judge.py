"""One call of attention in int8 against its record, blocks of scales and all."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_backend.arrays import poisoned_outputs
from refimpl import registry
from refimpl.attention.int8_attention import sample_int8_attention
from refimpl.registry import Case
from refimpl.tolerances import baseline_limits, cast, mismatch
from tests.cuda.judge import DTYPES

AXES = {"B": 1, "Tq": 9, "Tk": 13, "Hkv": 1, "group": 2, "D": 6, "Dv": 5}
OPTIONS = {"causal": False, "smooth": True, "blocks": "4x3", "offset": True, "extra": "none"}


def case_of(dtype: str, seed: int = 0, **changes: Any) -> Case:
    """Return a call with arrays of `dtype`."""
    options: dict[str, Any] = {**AXES, **OPTIONS, **changes}
    return cast(sample_int8_attention(np.random.default_rng(seed), **options), DTYPES[dtype])


def int8_difference(f: Any, case: Case, dtype: str) -> str | None:
    """Return how `f` differs from the definition, outputs filled with NaN before; None if it does not."""
    record = registry.get("attention.int8")
    truth, baseline, limits, invalid = baseline_limits(record, case, DTYPES[dtype])
    # Of many codes one or the other rounds to its neighbour in float32: the cap on the baseline, which judges
    # single draws, says nothing then; its error remains the limit.
    if invalid and dtype != "float32":
        return invalid
    with poisoned_outputs():
        found = np.asarray(case.call(f))
    if found.dtype != baseline["output"].dtype:
        return f"expected {baseline['output'].dtype}, got {found.dtype}"
    return mismatch(found, truth["output"], limits["output"])
