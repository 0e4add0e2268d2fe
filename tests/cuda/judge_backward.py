"""One call of a backward kernel against the reference in float64: the policy's three times for gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention import scaled_dot_product_attention
from refimpl.numerics import round_to
from refimpl.registry import Case
from tests.cuda.judge import DTYPES, difference


def backward_of(forward: Case, dtype: str, seed: int = 0) -> Case:
    """Return the backward call of a forward call in `dtype`: its output, its float32 log-sum-exp, a dO."""
    untiled = forward.without("block_sizes", "sram", "return_lse")
    out = untiled.replace(return_lse=True).call(scaled_dot_product_attention)
    do = round_to(np.random.default_rng([seed, 1]).standard_normal(out.out.shape), DTYPES[dtype])
    args = *forward.args[:3], out.out, out.lse, do
    return forward.without("return_lse").replace(*args)


def gradient_difference(f: Any, case: Case, dtype: str) -> str | None:
    """Return how `f` differs from the reference on a backward call; None if it does not."""
    return difference(f, case, dtype, technique="attention.flash_backward")
