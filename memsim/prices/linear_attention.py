"""What linear attention costs: HBM traffic, FLOPs and carried state, from shapes and options alone.

Each price equals, counter by counter, what the reference counts as it runs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.registry import Case, prices

__all__ = ["chunked_flops", "chunked_hbm", "chunked_state", "flops", "hbm", "state"]


class _Work(NamedTuple):
    """Heads of queries and of keys in all sequences, their widths, and how many of each are read."""

    query_heads: int
    key_heads: int
    D: int
    Dv: int
    Tq: int
    queries: int
    keys: int
    diagonal: int  # queries and keys that meet along the causal border
    itemsize: int
    masked: bool


def _work(case: Case) -> _Work:
    q, v = np.asarray(case.args[0]), np.asarray(case.args[2])
    B, Tq, Hq, D = q.shape
    Tk, Hkv, Dv = v.shape[1:]
    causal = case.kwargs.get("causal", False)
    offset = Tk - Tq if causal == "bottom_right" else 0
    sighted = Tq - max(-offset, 0)
    diagonal = min(sighted, Tk - max(offset, 0)) if causal else 0
    keys = max(offset, 0) + diagonal if causal else Tk
    masked = case.kwargs.get("key_mask") is not None
    queries = sighted if causal else Tq
    return _Work(B * Hq, B * Hkv, D, Dv, Tq, queries, keys, diagonal, q.dtype.itemsize, masked)


@prices("attention.linear", counts="hbm")
def hbm(case: Case) -> dict[str, int]:
    """Return the four counters: every operand moves once, because the state stays on chip."""
    w = _work(case)
    read = w.query_heads * w.queries * w.D + w.key_heads * w.keys * (w.D + w.Dv)
    mask = w.key_heads * w.keys if w.masked else 0
    written = w.query_heads * w.Tq * w.Dv
    return {
        "elements_read": read + mask,
        "elements_written": written,
        "bytes_read": read * w.itemsize + mask,
        "bytes_written": written * w.itemsize,
    }


@prices("attention.linear_chunked", counts="hbm")
def chunked_hbm(case: Case) -> dict[str, int]:
    """Return the four counters of the chunked form: those of the recurrent one, whatever the chunk."""
    return hbm(case)


@prices("attention.linear", counts="flops")
def flops(case: Case) -> dict[str, int]:
    """Return ``2 D Dv`` for each key and ``2 D (Dv + 1)`` for each query."""
    w = _work(case)
    keys = w.key_heads * w.keys * w.D * w.Dv
    return {"flops": 2 * (keys + w.query_heads * w.queries * w.D * (w.Dv + 1))}


@prices("attention.linear_chunked", counts="flops")
def chunked_flops(case: Case) -> dict[str, int]:
    """Return the products with the state and, for each chunk, two with its square of scores."""
    from refimpl.attention.linear_chunked import CHUNK

    w, size = _work(case), case.kwargs.get("chunk_size", CHUNK)
    whole, rest = divmod(w.diagonal, size)
    squares = whole * size**2 + rest**2
    with_state = w.D * (w.Dv + 1) * (w.key_heads * w.keys + w.query_heads * w.queries)
    return {"flops": 2 * (with_state + w.query_heads * squares * (w.D + w.Dv + 1))}


@prices("attention.linear", counts="state")
def state(case: Case) -> dict[str, int]:
    """Return the elements of S and z, ``D (Dv + 1)`` a key head: no length in it."""
    w = _work(case)
    return {"state_elements": w.key_heads * w.D * (w.Dv + 1)}


@prices("attention.linear_chunked", counts="state")
def chunked_state(case: Case) -> dict[str, int]:
    """Return the elements of the state of the chunked form, which are those of the recurrent one."""
    return state(case)
