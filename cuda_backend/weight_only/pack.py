"""A stored weight in the order in which the decoding kernel reads it: done once, ahead, to the same bytes.

The lanes of a warp, g = lane // 4 and t = lane % 4, read vectors of 16 bytes that lie side by side::

    int8   [tile][chunk of 128][2 x 64][2 x 8 rows][g][t][step][4 codes]       k = 16 step + 4 t + ...
    nf4    [tile][chunk of 256][2 x 128][2 x 8 rows][g][t][step][2 bytes]      k = 16 step + 4 t + ...
    scales [tile][group][16]        codes of absmax [tile][chunk][16][4]

A tile has 16 output features; what is missing to a whole one repeats the last feature and is never stored.
Codes of int8 are moved up by 128, so that they are bytes without a sign.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda, kernel, types
from cuda_backend.arrays import View, view
from cuda_backend.int8.memory import allocated
from cuda_backend.launch import launch
from cuda_backend.weight_only.variant import ROWS, deep

__all__ = [
    "Order", "absmax_order", "int8_order", "moved", "mover", "nf4_order", "scale_order", "signature",
]  # fmt: skip

AXES = 8
THREADS, MOST_BLOCKS = (16, 1) if SIMULATOR else (256, 8192)
_INDEX = 0x7FFFFFFFFFFFFFFF


class Order(NamedTuple):
    """Where each unit of a packed array comes from: sizes of its axes, and for each the steps in the source.

    ``features`` says how many output features a step along an axis is, ``within`` how many units along one.
    """

    sizes: tuple[int, ...]
    features: tuple[int, ...]
    within: tuple[int, ...]


def int8_order(K: int, N: int) -> Order:
    """Return the order of codes, a byte each, of a weight with K input and N output features."""
    chunk = deep("int8")
    return Order(
        (-(-N // ROWS), K // chunk, 2, 2, 8, 4, 4, 4),
        (ROWS, 0, 0, 8, 1, 0, 0, 0),
        (0, chunk, 64, 0, 0, 4, 16, 1),
    )


def nf4_order(K: int, N: int) -> Order:
    """Return the order of pairs of bytes, four codes each."""
    chunk = deep("nf4") // 4
    return Order(
        (-(-N // ROWS), K // deep("nf4"), 2, 2, 8, 4, 8, 1),
        (ROWS, 0, 0, 8, 1, 0, 0, 0),
        (0, chunk, 32, 0, 0, 1, 4, 0),
    )


def scale_order(groups: int, N: int) -> Order:
    """Return the order of the scales of groups."""
    return Order((1,) * 5 + (-(-N // ROWS), groups, ROWS), (0,) * 5 + (ROWS, 0, 1), (0,) * 5 + (0, 1, 0))


def absmax_order(K: int, N: int) -> Order:
    """Return the order of the codes of absmax, four for the 256 weights of a chunk."""
    sizes = (-(-N // ROWS), K // deep("nf4"), ROWS, 4)
    return Order((1,) * 4 + sizes, (0,) * 4 + (ROWS, 0, 1, 0), (0,) * 4 + (0, 4, 0, 1))


def moved(source: View, order: Order, like: Any, stream: int, *, features: int, flip: int = 0) -> Any:
    """Return a contiguous array of the units of `source` [features, units] in another order.

    Parameters
    ----------
    source : View
        Units of one, two or four bytes, any strides.
    order : Order
        Of the result.
    like : array
        Beside which the result is allocated.
    stream : int
        A CUstream.
    features : int
        Output features; a row beyond them repeats the last.
    flip : int
        Bits that are turned over in every unit.
    """
    size = math.prod(order.sizes)
    out, result = allocated((size,), source.dtype, like, stream)
    if size:
        table = view("order", np.array(order, np.int64), stream)
        launch(
            _build(source.dtype),
            [source, out, table, np.int64(size), np.int64(features), np.int64(flip)],
            blocks=min(MOST_BLOCKS, -(-size // THREADS)),
            threads=THREADS,
            shared_bytes=0,
            stream=stream,
        )
    return result()


def signature(dtype: str) -> Any:
    """Return the argument types of the kernel: source [features, units], out, order, and three numbers."""
    unit, order = getattr(types, dtype), types.Array(types.int64, 2, "A")
    return types.void(types.Array(unit, 2, "A"), types.Array(unit, 1, "A"), order, *[types.int64] * 3)


@functools.cache
def _build(dtype: str) -> Any:
    return kernel(signature(dtype))(mover(dtype))


def mover(dtype: str) -> Callable[..., None]:
    """Return the kernel that moves units of `dtype` as a Python function."""
    number = getattr(np, dtype)

    def move(source: Any, out: Any, order: Any, size: Any, features: Any, flip: Any) -> None:
        for place in range(cuda.blockIdx.x * THREADS + cuda.threadIdx.x, size, cuda.gridDim.x * THREADS):
            rest, row, column = place, 0, 0
            for axis in range(AXES):
                i = AXES - 1 - axis
                count = order[0, i]
                step = rest % count
                rest = rest // count
                row += step * order[1, i]
                column += step * order[2, i]
            row = min(row, features - 1)
            out[place & _INDEX] = number(source[row & _INDEX, column & _INDEX] ^ number(flip))

    return move
