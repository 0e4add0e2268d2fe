"""The HBM traffic of linear layers whose weight alone is quantised, from shapes and sizes of groups.

Each price equals, counter by counter, what the reference moves through `refimpl.memory.Memory`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.prices.moves import Move, counted
from refimpl.numerics import wide_dtype
from refimpl.registry import Case, prices

__all__ = ["int8", "nf4"]

# Item sizes: e of x, bias and output, s of scales, 1 of codes.
_AROUND = (
    Move("", "read", "X", "M*K", "e"),
    Move("", "read", "bias", "b*N", "e"),
    Move("", "write", "Y", "M*N", "e"),
)
_INT8 = (
    Move("", "read", "W codes", "K*N", "1"),
    Move("", "read", "W scale", "groups*N", "s"),
)
_NF4 = (
    Move("", "read", "W codes", "pairs", "1"),
    Move("", "read", "W absmax codes", "blocks", "1"),
    Move("", "read", "W scale and offset", "scales + 1", "s"),
)


def _values(case: Case) -> dict[str, Any]:
    x, weight = case.args
    (M, K), N = np.shape(x), np.shape(weight)[1]
    e = np.asarray(x).dtype.itemsize
    bias = int(case.kwargs.get("bias") is not None)
    return {"M": M, "K": K, "N": N, "b": bias, "e": e, "s": wide_dtype(np.asarray(x).dtype).itemsize}


@prices("quant.weight_only_int8", counts="hbm")
def int8(case: Case) -> dict[str, int]:
    """Return the four counters of ``int8_weight_linear(x, weight, ...)``: a byte a weight, and scales."""
    values = _values(case)
    groups = -(-values["K"] // int(case.kwargs.get("group_size", 128)))
    return counted((*_AROUND, *_INT8), {**values, "groups": groups})


@prices("quant.weight_only_nf4", counts="hbm")
def nf4(case: Case) -> dict[str, int]:
    """Return the four counters of ``nf4_linear(x, weight, ...)``: half a byte a weight, a byte a block."""
    values = _values(case)
    weights = values["K"] * values["N"]
    blocks = -(-weights // int(case.kwargs.get("block_size", 64)))
    scales = -(-blocks // int(case.kwargs.get("scale_block_size", 256)))
    return counted(
        (*_AROUND, *_NF4), {**values, "pairs": -(-weights // 2), "blocks": blocks, "scales": scales}
    )
