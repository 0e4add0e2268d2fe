"""What callers of the int8 functions may pass: arrays of one library, of one format, that fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuda_backend.arrays import dtype_name, is_host, library_of, stub
from cuda_backend.formats import FORMATS
from refimpl.errors import DTypeError, OptionError, UnsupportedError
from refimpl.numerics import Array
from refimpl.quant.absmax import Convention, outlier_columns
from refimpl.quant.integer_matmul import MAX_INNER
from refimpl.validation import as_array

__all__ = [
    "check_format",
    "check_inner",
    "check_threshold",
    "codes_matrix",
    "described",
    "inlier_limit",
    "one_format",
    "one_library",
    "supported",
]

MOST_BLOCKS = 2**31 - 1
_INFINITY = 0x7F800000


def one_library(arrays: Mapping[str, Any]) -> None:
    """Raise `DTypeError` unless all arrays are NumPy's, or all of the same GPU library."""
    found = {name: library_of(value) for name, value in arrays.items()}
    if len(set(found.values())) > 1:
        raise DTypeError(f"{', '.join(arrays)}: expected arrays of one library, got {found}")


def described(name: str, value: Any) -> Array:
    """Return `value` if it is on the host, or an array of its shape for the reference's checks."""
    return as_array(name, value) if is_host(value) else stub(name, value)


def check_format(name: str, value: Any, expected: str) -> None:
    """Raise `DTypeError` unless numbers are of this format; of a GPU array `described` does not tell."""
    found = as_array(name, value).dtype.name if is_host(value) else dtype_name(name, value)
    if found != expected:
        raise DTypeError(f"{name}: expected {expected}, got {found}")


def one_format(arrays: Mapping[str, Any]) -> str:
    """Return the one floating format of arrays on a GPU; raise `DTypeError` if there are several."""
    found = {name: dtype_name(name, value) for name, value in arrays.items()}
    if len(set(found.values())) > 1:
        raise DTypeError(f"{', '.join(arrays)}: expected one dtype, got {found}")
    return next(iter(found.values()))


def supported(caller: str, dtype: str, rows: int, columns: int) -> None:
    """Raise `UnsupportedError` for a format or a size that the kernels do not take."""
    if dtype not in FORMATS:
        raise UnsupportedError(f"{caller}: inputs are {dtype}; the kernel takes {', '.join(FORMATS)}")
    if max(rows, columns) > MOST_BLOCKS or rows * -(-columns // 32) > MOST_BLOCKS:
        raise UnsupportedError(f"{caller}: {rows} x {columns} outputs exceed {MOST_BLOCKS} blocks")


def codes_matrix(name: str, value: Any) -> Array:
    """Return codes as `described`; raise `DTypeError` unless int8, `OptionError` for -128 on the host."""
    codes = described(name, value)
    if codes.dtype != np.int8:
        raise DTypeError(f"{name}: expected int8, got {codes.dtype}")
    if is_host(value) and np.any(codes == -128):
        raise OptionError(f"{name}: expected codes in [-127, 127], got -128")
    return codes


def check_inner(K: int) -> None:
    """Raise `OptionError` for more terms than int32 always holds."""
    if K > MAX_INNER:
        raise OptionError(f"K: expected at most {MAX_INNER}, beyond which int32 may overflow; got {K}")


def check_threshold(threshold: float | None, convention: Convention) -> None:
    """Raise `OptionError` as the reference does."""
    with np.errstate(
        over="ignore"
    ):  # a threshold beyond float32 is infinite, and finite numbers are below it
        outlier_columns(np.zeros((0, 0), np.float32), threshold=threshold, convention=convention)


def inlier_limit(threshold: float, convention: Convention) -> np.uint64:
    """Return the integer below which the bits of |x| in float32 are those of a number that is no outlier.

    Examples
    --------
    >>> hex(inlier_limit(1.0, "released")), hex(inlier_limit(1.0, "paper"))
    ('0x3f800000', '0x3f800001')
    """
    with np.errstate(over="ignore"):
        bits = int(np.float32(threshold).view(np.uint32))
    return np.uint64(min(bits + (convention == "paper"), _INFINITY))
