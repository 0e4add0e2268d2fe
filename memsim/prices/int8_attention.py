"""The HBM traffic of attention in int8: the passes before it, and attention with every array once.

What a row block reads again of K and V, a kernel finds in the L2 cache: `memsim.attention_io` prices that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.prices.moves import Move, counted
from refimpl.numerics import wide_dtype
from refimpl.registry import Case, prices

__all__ = ["int8_attention"]

_MEAN = (
    Move("mean", "read", "K", "B*Tk*Hkv*D", "e"),
    Move("mean", "write", "K mean", "B*Hkv*D", "s"),
    Move("codes", "read", "K mean", "B*Hkv*D", "s"),
)
_CODES = (
    Move("codes", "read", "Q", "B*Tq*Hq*D", "e"),
    Move("codes", "write", "Q codes", "B*Tq*Hq*D", "1"),
    Move("codes", "write", "Q scale", "B*Hq*nq", "s"),
    Move("codes", "read", "K", "B*Tk*Hkv*D", "e"),
    Move("codes", "write", "K codes", "B*Tk*Hkv*D", "1"),
    Move("codes", "write", "K scale", "B*Hkv*nk", "s"),
)
_ATTENTION = (
    Move("attention", "read", "Q codes", "B*Tq*Hq*D", "1"),
    Move("attention", "read", "Q scale", "B*Hq*nq", "s"),
    Move("attention", "read", "K codes", "B*Tk*Hkv*D", "1"),
    Move("attention", "read", "K scale", "B*Hkv*nk", "s"),
    Move("attention", "read", "V", "B*Tk*Hkv*Dv", "e"),
    Move("attention", "write", "O", "B*Tq*Hq*Dv", "e"),
)


@prices("attention.int8", counts="hbm")
def int8_attention(case: Case) -> dict[str, int]:
    """Return the four counters of ``int8_attention(q, k, v, ...)``."""
    from refimpl.attention.int8_attention import DEFAULT_BLOCKS

    q, k, v = (np.asarray(array) for array in case.args)
    rows, columns = case.kwargs.get("block_sizes", DEFAULT_BLOCKS)
    B, Tq, Hq, D = q.shape
    values: dict[str, Any] = {
        "B": B, "Tq": Tq, "Hq": Hq, "D": D, "Tk": k.shape[1], "Hkv": k.shape[2], "Dv": v.shape[3],
        "nq": -(-Tq // rows), "nk": -(-k.shape[1] // columns),
        "e": q.dtype.itemsize, "s": wide_dtype(q.dtype).itemsize,
    }  # fmt: skip
    moves = (*(_MEAN if case.kwargs.get("smooth", True) else ()), *_CODES, *_ATTENTION)
    return counted(moves, values)
