"""float16 and bfloat16 inside kernels: their bits travel as uint16, arithmetic is in float32.

Plain bit operations, the same on a GPU and in the simulator.  (Numba's own float16 arithmetic links CUDA C++
and needs NVRTC at run time.)  Both directions are those of IEEE 754: exact when widening, to nearest even
when narrowing, subnormals and infinities included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import device_function, types

__all__ = ["FORMATS", "narrow", "storage_type", "widen"]

FORMATS = ("float32", "float16", "bfloat16")

_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_ONE, _SIGN_SHIFT = np.uint32(1), np.uint32(16)
_HALF_SHIFT = np.uint32(13)  # 23 - 10 bits of significand
_HALF_MAGNITUDE, _HALF_SIGN = np.uint32(0x7FFF), np.uint32(0x8000)
_HALF_INFINITY = np.uint32(0x7C00 << 13)
_REBIAS = np.float32(2.0**112)  # exponents are biased by 127 and by 15
_HALF_REBIAS = np.uint32(112 << 23)
_HALF_NORMAL = np.uint32(0x38800000)  # 2**-14
_HALF_OVERFLOW = np.uint32(0x477FF000)  # 65520: halfway to the first number that does not exist
_HALF_TIE = np.uint32(0xFFF)
_DENORMALISER = np.float32(0.5)  # adding it rounds to a multiple of 2**-24, the least subnormal
_DENORMALISER_BITS = np.uint32(0x3F000000)
_BRAIN_TIE, _QUIET = np.uint32(0x7FFF), np.uint32(0x40)


def storage_type(kind: str) -> Any:
    """Return the Numba type in which numbers of format `kind` lie in memory."""
    return types.float32 if kind == "float32" else types.uint16


def widen(kind: str) -> Callable[..., Any]:
    """Return the device function from a stored number of format `kind` to float32."""
    return {"float32": _same, "float16": half_to_float, "bfloat16": brain_to_float}[kind]


def narrow(kind: str) -> Callable[..., Any]:
    """Return the device function from float32 to a stored number of format `kind`."""
    return {"float32": _same, "float16": float_to_half, "bfloat16": float_to_brain}[kind]


@device_function
def _same(x: Any) -> Any:
    return x


@device_function
def half_to_float(bits: Any) -> Any:
    """Return the float16 with these bits as float32."""
    wide = np.uint32(bits)
    magnitude = np.uint32((wide & _HALF_MAGNITUDE) << _HALF_SHIFT)
    sign = np.uint32((wide & _HALF_SIGN) << _SIGN_SHIFT)
    scaled = np.uint32((magnitude.view(np.float32) * _REBIAS).view(np.uint32))
    if magnitude >= _HALF_INFINITY:
        scaled = np.uint32(magnitude | _INFINITY)
    return np.uint32(scaled | sign).view(np.float32)


@device_function
def brain_to_float(bits: Any) -> Any:
    """Return the bfloat16 with these bits as float32."""
    return np.uint32(np.uint32(bits) << _SIGN_SHIFT).view(np.float32)


@device_function
def float_to_half(x: Any) -> Any:
    """Return the bits of float32 `x` rounded to float16."""
    bits = np.uint32(x.view(np.uint32))
    magnitude = np.uint32(bits & _MAGNITUDE)
    if magnitude > _INFINITY:
        half = np.uint32(0x7E00)
    elif magnitude >= _HALF_OVERFLOW:
        half = np.uint32(0x7C00)
    elif magnitude >= _HALF_NORMAL:
        odd = np.uint32((magnitude >> _HALF_SHIFT) & _ONE)
        half = np.uint32((magnitude - _HALF_REBIAS + _HALF_TIE + odd) >> _HALF_SHIFT)
    else:
        shifted = np.uint32((magnitude.view(np.float32) + _DENORMALISER).view(np.uint32))
        half = np.uint32(shifted - _DENORMALISER_BITS)
    return np.uint16(half | np.uint32((bits >> _SIGN_SHIFT) & _HALF_SIGN))


@device_function
def float_to_brain(x: Any) -> Any:
    """Return the bits of float32 `x` rounded to bfloat16."""
    bits = np.uint32(x.view(np.uint32))
    if np.uint32(bits & _MAGNITUDE) > _INFINITY:
        return np.uint16((bits >> _SIGN_SHIFT) | _QUIET)
    odd = np.uint32((bits >> _SIGN_SHIFT) & _ONE)
    return np.uint16((bits + _BRAIN_TIE + odd) >> _SIGN_SHIFT)
