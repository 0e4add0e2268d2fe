"""The bytes of compressed weights as the references return them, from the shapes of what is compressed."""

from __future__ import annotations

import numpy as np

from refimpl.numerics import wide_dtype
from refimpl.registry import Case, prices

__all__ = ["double", "nf4"]


@prices("quant.nf4", counts="storage")
def nf4(case: Case) -> dict[str, int]:
    """Return half a byte a weight, the last byte filled, and the absmax of every block in the wide dtype."""
    x, block = np.asarray(case.args[0]), int(case.kwargs.get("block_size", 64))
    return {"bytes": -(-x.size // 2) + -(-x.size // block) * wide_dtype(x.dtype).itemsize}


@prices("quant.double", counts="storage")
def double(case: Case) -> dict[str, int]:
    """Return a byte an absmax, and in the wide dtype a scale for every block of them and one offset."""
    absmax, block = np.asarray(case.args[0]), int(case.kwargs.get("block_size", 256))
    return {"bytes": absmax.size + (-(-absmax.size // block) + 1) * wide_dtype(absmax.dtype).itemsize}
