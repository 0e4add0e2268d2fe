"""Small calls of attention with every option, drawn by Hypothesis."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl.attention.samples import EXTRAS, sample_attention
from refimpl.registry import Case
from refimpl.tolerances import cast
from tests.cuda.judge import DTYPES

__all__ = ["calls"]


@st.composite
def calls(draw: st.DrawFn, /, group: int, **options: Any) -> tuple[Case, str, int]:
    """Return a call, the name of its format, and its seed; up to `group` query heads share a key head."""
    seed = draw(st.integers(0, 2**32))
    tq, tk = draw(st.integers(0, 18)), draw(st.integers(0, 18))
    d, dv = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    hkv, shared = draw(st.sampled_from([(1, 1), (1, group), (2, 1)]))
    blocks = draw(st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    causal: Any = draw(st.sampled_from([False, "top_left", "bottom_right"]))
    extra, dtype = draw(st.sampled_from(EXTRAS)), draw(st.sampled_from(sorted(DTYPES)))
    axes: Any = {"B": 1, "Tq": tq, "Tk": tk, "Hkv": hkv, "group": shared, "D": d, "Dv": dv}
    drawn = sample_attention(np.random.default_rng(seed), **axes, causal=causal, extra=extra, **options)
    return cast(drawn.replace(block_sizes=blocks), DTYPES[dtype]), dtype, seed
