"""A product with a quantised weight for every CUDA GPU and the simulator, any number of tokens.

A block owns a tile of the output, in registers.  Tiles of both operands come to shared memory as float32, the
weight dequantised on the way and rounded to the format of the activations where the reference rounds it::

    out = x W + factor * t B + bias

t B, of low rank, is that of LoRA, in the same pass.  The weight may be read in either order, so the gradient
of x is the same kernel with the axes of the weight exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda, device_function, kernel, types
from cuda_backend.formats import storage_type
from cuda_backend.int8.arithmetic import reader, writer

__all__ = ["Variant", "build", "signature", "source"]

_INDEX, _PLACE = 0x7FFFFFFF, 0x7FFFFFFFFFFFFFFF
_ZERO = np.float32(0)


class Variant(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    weight
        ``"int8"``, ``"nf4"``, or ``"float"`` for a weight as it is.
    kind, weight_kind, out_kind
        Formats of activations, of a weight as it is (and of B), and of the output.
    turned
        int8: whether the axes of the weight are exchanged, its groups then lie along the output.
    low_rank, bias
        What is added.
    """

    weight: str
    kind: str
    weight_kind: str
    out_kind: str
    turned: bool = False
    low_rank: bool = False
    bias: bool = False

    @property
    def tile(self) -> int:
        """Rows and columns of a tile of the output."""
        return 4 if SIMULATOR else 64

    @property
    def depth(self) -> int:
        """Terms of a tile of an operand."""
        return 4 if SIMULATOR else 16

    @property
    def side(self) -> int:
        """Threads along a side of a tile, a power of two."""
        return 2 if SIMULATOR else 16

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.side * self.side

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: both tiles, their columns one apart."""
        return 4 * 2 * self.depth * (self.tile + 1)


def signature(variant: Variant) -> Any:
    """Return the argument types of the kernel; arrays may have any strides, absent ones are never read."""

    def array(dtype: Any, ndim: int) -> Any:
        return types.Array(dtype, ndim, "A")

    number, given, result = (storage_type(k) for k in (variant.kind, variant.weight_kind, variant.out_kind))
    codes = {"int8": array(types.int8, 2), "nf4": array(types.uint8, 1), "float": array(given, 2)}
    return types.void(
        array(number, 2), codes[variant.weight],                # x [M, K]; weight [K, N], or bytes
        array(types.float32, 2),                                # int8: scales [groups, N]
        array(types.uint8, 1), array(types.float32, 1), array(types.float32, 1),  # nf4: absmax, scale, offset
        array(types.float32, 1), array(types.float32, 1),       # levels of NF4, of absmax codes
        types.int64, types.int64, types.int64, types.int64,     # steps along K and N; block or group; inner
        array(types.float32, 2), array(given, 2), types.float32,  # t [M, R], B [R, N], factor
        array(number, 1), array(result, 2),                     # bias [N], out [M, N]
    )  # fmt: skip


@functools.cache
def build(variant: Variant) -> Any:
    """Return the compiled kernel of `variant`."""
    return kernel(signature(variant))(source(variant))


def source(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant` as a Python function; the constants of its closure shape the code."""
    TILE, DEPTH, SIDE, THREADS = variant.tile, variant.depth, variant.side, variant.threads
    PITCH, OWN = TILE + 1, TILE // SIDE
    CELLS, RIGHT = OWN * OWN, DEPTH * (TILE + 1)
    FLOAT, LOW_RANK, BIAS = variant.weight == "float", variant.low_rank, variant.bias
    load, load_given, store = reader(variant.kind), reader(variant.weight_kind), writer(variant.out_kind)
    value_of = _value(variant)

    def weight_product(
        x: Any, weight: Any, scales: Any, absmax: Any, scale: Any, offset: Any, levels: Any, map_levels: Any,
        along_k: Any, along_n: Any, block: Any, inner: Any, t: Any, b: Any, factor: Any, bias: Any, out: Any,
    ) -> None:  # fmt: skip
        tiles = cuda.shared.array(0, types.float32)  # of x, then at RIGHT that of the weight
        total = cuda.local.array(CELLS, types.float32)
        thread = cuda.threadIdx.x & (THREADS - 1)
        j0, i0 = thread & (SIDE - 1), thread // SIDE
        across = (out.shape[1] + TILE - 1) // TILE
        row = (cuda.blockIdx.x & _INDEX) // across * TILE
        column = (cuda.blockIdx.x & _INDEX) % across * TILE
        M, N, K = out.shape[0], out.shape[1], x.shape[1]
        rank = t.shape[1] if LOW_RANK else 0

        for cell in range(CELLS):
            total[cell] = _ZERO
        for start in range(0, K, DEPTH):
            for e in range(thread, TILE * DEPTH, THREADS):
                k, i = (e & _INDEX) % DEPTH, (e & _INDEX) // DEPTH
                left, right = _ZERO, _ZERO
                if start + k < K:
                    if row + i < M:
                        left = load(x[(row + i) & _INDEX, (start + k) & _INDEX])
                    if column + i < N:
                        right = value_of(
                            weight, scales, absmax, scale, offset, levels, map_levels,
                            along_k, along_n, block, inner, start + k, column + i,
                        )  # fmt: skip
                tiles[k * PITCH + i] = left
                tiles[RIGHT + k * PITCH + i] = right
            cuda.syncthreads()
            for e in range(DEPTH):
                k = e & _INDEX
                for i in range(OWN):
                    left = tiles[k * PITCH + i0 + i * SIDE]
                    for j in range(OWN):
                        total[i * OWN + j] += left * tiles[RIGHT + k * PITCH + j0 + j * SIDE]
            cuda.syncthreads()
        if LOW_RANK:
            for start in range(0, rank, DEPTH):
                for e in range(thread, TILE * DEPTH, THREADS):
                    k, i = (e & _INDEX) % DEPTH, (e & _INDEX) // DEPTH
                    left, right = _ZERO, _ZERO
                    if start + k < rank:
                        if row + i < M:
                            left = factor * t[(row + i) & _INDEX, (start + k) & _INDEX]
                        if column + i < N:
                            right = load_given(b[(start + k) & _INDEX, (column + i) & _INDEX])
                    tiles[k * PITCH + i] = left
                    tiles[RIGHT + k * PITCH + i] = right
                cuda.syncthreads()
                for e in range(DEPTH):
                    k = e & _INDEX
                    for i in range(OWN):
                        left = tiles[k * PITCH + i0 + i * SIDE]
                        for j in range(OWN):
                            total[i * OWN + j] += left * tiles[RIGHT + k * PITCH + j0 + j * SIDE]
                cuda.syncthreads()
        for i in range(OWN):
            m = (row + i0 + i * SIDE) & _INDEX
            for j in range(OWN):
                n = (column + j0 + j * SIDE) & _INDEX
                if m < M and n < N:
                    y = total[i * OWN + j]
                    if FLOAT:
                        y *= factor
                    if BIAS:
                        y += load(bias[n])
                    out[m, n] = store(y)

    return weight_product


def _value(variant: Variant) -> Callable[..., Any]:
    """Return the device function that gives weight (k, n) as float32."""
    if variant.weight == "float":
        load = reader(variant.weight_kind)

        @device_function
        def as_given(
            weight: Any, scales: Any, absmax: Any, scale: Any, offset: Any, levels: Any, map_levels: Any,  # noqa: ARG001
            along_k: Any, along_n: Any, block: Any, inner: Any, k: Any, n: Any,  # noqa: ARG001
        ) -> Any:  # fmt: skip
            return load(weight[k & _INDEX, n & _INDEX])

        return as_given
    if variant.weight == "int8":
        TURNED = variant.turned

        @device_function
        def of_group(
            weight: Any, scales: Any, absmax: Any, scale: Any, offset: Any, levels: Any, map_levels: Any,  # noqa: ARG001
            along_k: Any, along_n: Any, block: Any, inner: Any, k: Any, n: Any,  # noqa: ARG001
        ) -> Any:  # fmt: skip
            code = np.float32(weight[k & _INDEX, n & _INDEX])
            if TURNED:
                return code * scales[(n // block) & _INDEX, k & _INDEX]
            return code * scales[(k // block) & _INDEX, n & _INDEX]

        return of_group
    load, store = reader(variant.kind), writer(variant.kind)

    @device_function
    def of_level(
        weight: Any, scales: Any, absmax: Any, scale: Any, offset: Any, levels: Any, map_levels: Any,  # noqa: ARG001
        along_k: Any, along_n: Any, block: Any, inner: Any, k: Any, n: Any,
    ) -> Any:  # fmt: skip
        place = k * along_k + n * along_n
        byte = np.uint32(weight[(place >> 1) & _PLACE])
        code = byte & np.uint32(15) if place & 1 else byte >> np.uint32(4)
        owner = (place & _PLACE) // block
        size = map_levels[np.uint32(absmax[owner])] * scale[owner // inner] + offset[0]
        return load(store(levels[code] * size))

    return of_level
