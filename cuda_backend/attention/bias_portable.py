"""The gradient of a bias: that of the scores, summed over the axes along which the bias was repeated."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, kernel, types
from cuda_backend.attention.tiles_portable import INDEX
from cuda_backend.formats import narrow, storage_type

__all__ = ["THREADS", "build", "signature", "source"]

THREADS = 128


def signature(kind: str) -> Any:
    """Return the argument types: dscores (B, Hq, Tq, Tk) in float32, dbias of four axes in format `kind`."""
    return types.void(types.Array(types.float32, 4, "A"), types.Array(storage_type(kind), 4, "A"))


@functools.cache
def build(kind: str) -> Any:
    """Return the compiled kernel for a bias gradient of format `kind`; a thread owns one of its entries."""
    return kernel(signature(kind))(source(kind))


def source(kind: str) -> Any:
    """Return the kernel as a Python function."""
    store = narrow(kind)

    def sum_to_bias(dscores: Any, dbias: Any) -> None:
        entry = (cuda.blockIdx.x & INDEX) * THREADS + (cuda.threadIdx.x & (THREADS - 1))
        _, heads, rows, columns = dbias.shape
        if entry >= dbias.size:
            return
        j = (entry % columns) & INDEX
        rest = entry // columns
        i = (rest % rows) & INDEX
        rest = rest // rows
        h = (rest % heads) & INDEX
        b = (rest // heads) & INDEX
        # An axis of the bias is as long as that of the scores, or 1.
        b_end, h_end, i_end, j_end = b + 1, h + 1, i + 1, j + 1
        if dbias.shape[0] == 1:
            b_end = dscores.shape[0]
        if heads == 1:
            h_end = dscores.shape[1]
        if rows == 1:
            i_end = dscores.shape[2]
        if columns == 1:
            j_end = dscores.shape[3]
        total = np.float64(0)  # up to B Hq Tq terms, one after another
        for s in range(b, b_end):
            for t in range(h, h_end):
                for u in range(i, i_end):
                    for w in range(j, j_end):
                        total += np.float64(dscores[s & INDEX, t & INDEX, u & INDEX, w & INDEX])
        dbias[b, h, i, j] = store(np.float32(total))

    return sum_to_bias
