"""Arithmetic on codes inside kernels, the same on a GPU and in the simulator.

A code is the nearest integer of a *rounded* product: contracted with an addition into one fused multiply-add
it would be another code where it ties.  Hence the product that is never contracted.

libdevice has float16 in one instruction, where bit operations need a dozen: kernels with 64 numbers a thread
need it short, or the compiler does not unroll their loops and puts the numbers into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda, device_function, types
from cuda_backend.formats import narrow, widen
from cuda_backend.ptx.assembly import instruction
from refimpl.quant.absmax import LIMIT

__all__ = ["dot_product", "magnitude", "nearest_code", "product", "reader", "writer"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_TOO_LARGE = np.float32(LIMIT + 0.5)  # the first number whose nearest even integer is no code


def _simulated_dot_product(left: int, right: int, total: int) -> np.int32:
    result = int(total)
    for shift in (0, 8, 16, 24):
        a, b = int(left) >> shift & 0xFF, int(right) >> shift & 0xFF
        result += (a - ((a & 0x80) << 1)) * (b - ((b & 0x80) << 1))
    return np.int32(result)


def _simulated_product(a: Any, b: Any) -> Any:
    return a * b


def _simulated_nearest(x: Any) -> Any:
    return int(np.rint(x))


@device_function
def _product(a: Any, b: Any) -> Any:
    return cuda.libdevice.fmul_rn(a, b)


@device_function
def _nearest(x: Any) -> Any:
    return cuda.libdevice.float2int_rn(x)


@device_function
def _half_to_float(bits: Any) -> Any:
    return cuda.libdevice.half2float(np.int16(bits))


@device_function
def _float_to_half(x: Any) -> Any:
    return np.uint16(cuda.libdevice.float2half_rn(x))


_dp4a = instruction(
    "dot_product",
    types.int32,
    {"left": types.uint32, "right": types.uint32, "total": types.int32},
    "dp4a.s32.s32 $0, $1, $2, $3;",
    "=r,r,r,r",
    'PTX ISA, "Integer Arithmetic Instructions: dp4a".',
    pure=True,
)

# Four products of int8, in two words of four, added to a total.
dot_product: Any = _simulated_dot_product if SIMULATOR else _dp4a
# a * b rounded to float32, whatever is added to it.
product: Any = _simulated_product if SIMULATOR else _product
# The nearest integer, halves to even.
nearest: Any = _simulated_nearest if SIMULATOR else _nearest


def reader(kind: str) -> Callable[..., Any]:
    """Return the device function from a stored number of format `kind` to float32."""
    return _half_to_float if kind == "float16" and not SIMULATOR else widen(kind)


def writer(kind: str) -> Callable[..., Any]:
    """Return the device function from float32 to a stored number of format `kind`."""
    return _float_to_half if kind == "float16" and not SIMULATOR else narrow(kind)


@device_function
def magnitude(x: Any) -> Any:
    """Return the bits of float32 |x|: ordered as the numbers are, with infinity and then NaN above them."""
    return np.uint32(np.uint32(x.view(np.uint32)) & _MAGNITUDE)


@device_function
def nearest_code(x: Any, scale: Any) -> Any:
    """Return ``rint(x * scale)``, halves to even, and 0 where that is no code in [-127, 127]."""
    steps = product(x, scale)
    if abs(steps) < _TOO_LARGE:
        return np.int32(nearest(steps))
    return np.int32(0)
