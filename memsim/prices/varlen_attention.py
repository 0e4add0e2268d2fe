"""The HBM traffic of attention over packed sequences: every token of a sequence once, padding never."""

from __future__ import annotations

import numpy as np

from refimpl.numerics import wide_dtype
from refimpl.registry import Case, prices

__all__ = ["hbm"]


@prices("attention.varlen", counts="hbm")
def hbm(case: Case) -> dict[str, int]:
    """Return the four counters of ``varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, ...)``."""
    q, _, v, starts, key_starts = (np.asarray(array) for array in case.args)
    (_, Hq, D), (_, Hkv, Dv) = q.shape, v.shape
    queries, keys = int(starts[-1]), int(key_starts[-1])
    read, written = queries * Hq * D + keys * Hkv * (D + Dv), queries * Hq * Dv
    statistics = queries * Hq * bool(case.kwargs.get("return_lse"))
    return {
        "elements_read": read,
        "elements_written": written + statistics,
        "bytes_read": read * q.dtype.itemsize,
        "bytes_written": written * q.dtype.itemsize + statistics * wide_dtype(q.dtype).itemsize,
    }
