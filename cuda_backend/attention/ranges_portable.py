"""Which keys each query of packed sequences sees, on a GPU: `refimpl.attention.varlen.key_ranges`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from cuda_backend._numba import cuda, kernel, types
from cuda_backend.attention.arguments import array_type
from cuda_backend.attention.tiles_portable import INDEX

__all__ = ["RangesVariant", "build", "signature", "source"]


class RangesVariant(NamedTuple):
    """One compiled kernel: "", "top_left" or "bottom_right", the formats of both starts, threads."""

    causal: str
    queries: str
    keys: str
    threads: int


def signature(variant: RangesVariant) -> Any:
    """Return the argument types of the kernel."""
    starts = (array_type(getattr(types, kind), 1) for kind in (variant.queries, variant.keys))
    return types.void(*starts, array_type(types.int32, 1), array_type(types.int32, 1))


@functools.cache
def build(variant: RangesVariant) -> Any:
    """Return the compiled kernel."""
    return kernel(signature(variant))(source(variant))


def source(variant: RangesVariant) -> Any:
    """Return the kernel as a Python function; the constants of its closure shape the code."""
    THREADS = variant.threads
    CAUSAL, BOTTOM_RIGHT = variant.causal != "", variant.causal == "bottom_right"

    def key_ranges(starts: Any, key_starts: Any, first: Any, behind: Any) -> None:
        i = (cuda.blockIdx.x & INDEX) * THREADS + (cuda.threadIdx.x & (THREADS - 1))
        if i >= first.shape[0]:
            return
        # The last sequence that starts at i or before: empty ones at the same place come before it.
        low, high = 0, starts.shape[0]
        while high - low > 1:
            middle = (low + high) // 2
            if starts[middle] <= i:
                low = middle
            else:
                high = middle
        begin, end = 0, 0
        if low + 1 < starts.shape[0]:  # else it is padding
            begin, end = int(key_starts[low]), int(key_starts[low + 1])
            if CAUSAL:
                seen = begin + 1 + i - int(starts[low])
                if BOTTOM_RIGHT:
                    seen += end - begin - (int(starts[low + 1]) - int(starts[low]))
                end = max(begin, min(end, seen))
        first[i] = begin
        behind[i] = end

    return key_ranges
