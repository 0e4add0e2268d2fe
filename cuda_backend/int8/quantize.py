"""Absmax quantisation on a GPU: what callers see, and what stands between them and the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend.arrays import View, absent, dtype_name, is_host, view
from cuda_backend.formats import FORMATS
from cuda_backend.int8 import quantize_portable
from cuda_backend.int8.memory import allocated, packed, to_host, transposed_view
from cuda_backend.int8.operands import check_threshold, described, inlier_limit, supported
from cuda_backend.launch import launch, stream_of
from refimpl.errors import OptionError
from refimpl.quant.absmax import Convention, Int8Columns, Int8Rows
from refimpl.validation import bind_axes, floating

__all__ = ["Outliers", "Rows", "outlier_columns", "quantize_columns", "quantize_rows", "quantized"]

PACKED = {"float32": 2, "float16": 4, "bfloat16": 4}  # numbers in 8 bytes


class Outliers(NamedTuple):
    """Columns set aside: a mask [K], indices [K] of which the first `number` [1] count, and the result."""

    mask: View
    indices: View
    number: View
    result: Callable[[], Any]


class Rows(NamedTuple):
    """Codes [T, K] and absmax [T] as a kernel sees them, and functions that give them to the caller."""

    codes: View
    absmax: View
    outliers: Outliers
    codes_result: Callable[[], Any]
    absmax_result: Callable[[], Any]


def quantize_rows(
    x: Any,
    /,
    *,
    threshold: float | None = None,
    convention: Convention = "released",
    stream: Any = None,
) -> Int8Rows:
    """Return the int8 codes of every row of `x`, with 0 in the columns that hold outliers.

    Parameters
    ----------
    x : array of float32, float16 or bfloat16, shape (T, K)
        As for `refimpl.quant.quantize_rows`: a NumPy array, which is copied to the GPU and back, or a
        PyTorch, CuPy, JAX or Numba array on the current GPU, with any strides.
    threshold : float, optional
        Magnitude that makes a number an outlier.  Default: every column is quantised.
    convention : {"paper", "released"}
        As for the reference.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `x` works on.

    Returns
    -------
    Int8Rows
        Equal to the reference's bit for bit, in the library of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        If `x` is float64.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    With a threshold the call waits for the number of outlier columns, whose indices it returns;
    `llm_int8_linear` does not.  **Special cases**: those of the reference.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.1.

    Examples
    --------
    >>> import cuda_backend
    >>> x = np.array([[1.0, -2.0, 20.0], [0.0, 0.0, 0.0]], np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert quantize_rows(x, threshold=6.0).codes.tolist() == [[64, -127, 0], [0, 0, 0]]
    """
    x, dtype, on = _matrix("quantize_rows", "x", x, stream)
    check_threshold(threshold, convention)
    rows = quantized(view("x", x, on), dtype, x, on, threshold, convention)
    return Int8Rows(rows.codes_result(), rows.absmax_result(), rows.outliers.result())


def outlier_columns(
    x: Any, /, *, threshold: float | None = 6.0, convention: Convention = "released", stream: Any = None
) -> Any:
    """Return the columns of `x` that hold an outlier, in order; the call waits for their number.

    Parameters
    ----------
    x : array of float32, float16 or bfloat16, shape (T, K)
        As for `quantize_rows`.
    threshold : float or None
        Magnitude that makes a number an outlier; None: there are none.
    convention : {"paper", "released"}
        Strictly above the threshold, or from it on.
    stream : int or stream object, optional
        As for `quantize_rows`.

    Returns
    -------
    array of int64, shape (n,)
        Indices, in the library of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `quantize_rows`.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.2.

    Examples
    --------
    >>> import cuda_backend
    >>> x = np.array([[1.0, 6.0, 7.0], [0.0, 1.0, 0.0]], np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert outlier_columns(x).tolist() == [1, 2]
    """
    x, dtype, on = _matrix("outlier_columns", "x", x, stream)
    check_threshold(threshold, convention)
    return _outliers(view("x", x, on), dtype, x, on, threshold, convention).result()


def quantize_columns(weight: Any, /, *, stream: Any = None) -> Int8Columns:
    """Return the int8 codes of every column of a weight: quantise once, multiply often.

    Parameters
    ----------
    weight : array of float32, float16 or bfloat16, shape (K, N)
        Used as ``x @ weight``; arrays as for `quantize_rows`.
    stream : int or stream object, optional
        As for `quantize_rows`.

    Returns
    -------
    Int8Columns
        Equal to the reference's bit for bit, in the library of `weight`.  The codes are in Fortran order,
        which is how the products read them: an output's codes along K lie side by side.

    Raises
    ------
    OptionError
        If `weight` holds NaN or infinity; the call waits to know.
    ShapeError, DTypeError, UnsupportedError, BackendUnavailableError
        As `quantize_rows`.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.1.

    Examples
    --------
    >>> import cuda_backend
    >>> weight = np.array([[1.0, 0.0], [-0.5, 0.0]], np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert quantize_columns(weight).codes.tolist() == [[127, 0], [-64, 0]]
    """
    weight, dtype, on = _matrix("quantize_columns", "weight", weight, stream)
    columns = quantized_columns(weight, dtype, on)
    return Int8Columns(columns.codes_result().T, columns.absmax_result())


def quantized_columns(weight: Any, dtype: str, on: int) -> Rows:
    """Quantise the columns of a weight, as rows of its transpose; refuse what is not finite."""
    columns = quantized(transposed_view("weight", weight, on), dtype, weight, on, None, "released")
    absmax = to_host(columns.absmax, on)
    wrong = np.flatnonzero(~np.isfinite(absmax))
    if wrong.size:
        column = int(wrong[0])
        raise OptionError(f"weight: expected finite numbers, got {absmax[column]} in column {column}")
    return columns


def quantized(
    x: View, dtype: str, like: Any, on: int, threshold: float | None, convention: Convention
) -> Rows:
    """Launch the kernels that quantise the rows of `x`; nothing waits for them."""
    T, K = x.shape
    found = _outliers(x, dtype, like, on, threshold, convention)
    codes, codes_result = allocated((T, K), "int8", like, on)
    absmax, absmax_result = allocated((T,), "float32", like, on)
    aside = "" if threshold is None else "columns" if convention == "paper" else "cells"
    variant, numbers = _variant(x, dtype, aside)
    lanes = quantize_portable.read_types(variant)[1]
    if T:
        launch(
            quantize_portable.build(variant, "quantize"),
            [
                numbers,
                _lanes(found.mask, lanes) if aside else absent(lanes, 1),
                _lanes(codes, lanes),
                absmax,
                _limit(threshold, convention),
            ],
            blocks=T,
            threads=variant.threads,
            shared_bytes=4 * variant.threads,
            stream=on,
        )
    return Rows(codes, absmax, found, codes_result, absmax_result)


def _outliers(
    x: View, dtype: str, like: Any, on: int, threshold: float | None, convention: Convention
) -> Outliers:
    """Launch the kernels that find the outlier columns of `x`; without a threshold there are none."""
    T, K = x.shape
    if threshold is None:
        _, none = allocated((0,), "int64", like, on)
        return Outliers(absent("uint8", 1), absent("int64", 1), absent("int64", 1), none)
    mask, _ = allocated((K,), "uint8", like, on)
    indices, indices_result = allocated((K,), "int64", like, on)
    count, _ = allocated((1,), "int64", like, on)
    strips = min(quantize_portable.STRIPS, T)
    flags, _ = allocated((strips, K), "uint8", like, on)
    variant, numbers = _variant(x, dtype, "")
    blocks = strips * -(-numbers.shape[1] // variant.threads)
    if blocks:
        lanes = quantize_portable.read_types(variant)[1]
        launch(
            quantize_portable.build(variant, "flag"),
            [numbers, _lanes(flags, lanes), _limit(threshold, convention)],
            blocks=blocks,
            threads=variant.threads,
            shared_bytes=4 * variant.threads,
            stream=on,
        )
    launch(
        quantize_portable.build(variant, "gather"),
        [flags, mask, indices, count],
        blocks=1,
        threads=variant.scan_threads,
        shared_bytes=4 * variant.scan_threads,
        stream=on,
    )

    def result() -> Any:
        found = int(to_host(count, on)[0])
        return indices_result()[:found]

    return Outliers(mask, indices, count, result)


def _matrix(caller: str, name: str, value: Any, stream: Any) -> tuple[Any, str, int]:
    """Return a checked matrix, its format and the stream."""
    shape = described(name, value)
    if is_host(value):
        (value,) = floating(**{name: value})
        shape, dtype = value, value.dtype.name
    else:
        floating(**{name: shape})
        dtype = dtype_name(name, value)
    bind_axes({name: (shape, "T K" if name == "x" else "K N")})
    supported(caller, dtype, *shape.shape)
    return value, dtype, stream_of(value, stream)


def _variant(x: View, dtype: str, aside: str) -> tuple[quantize_portable.Variant, View]:
    """Return the variant for a matrix, and the matrix as that variant reads it."""
    wide = packed(x, "uint64") if dtype in FORMATS else None
    width = 1 if wide is None else PACKED[dtype]
    return quantize_portable.variant_for(dtype, width, aside), wide or x


def _lanes(given: View, dtype: str) -> View:
    """Return bytes as they are written beside the numbers read at once; as rows are whole, they can be."""
    return packed(given, dtype) or given._replace(dtype=dtype)  # None: it is empty


def _limit(threshold: float | None, convention: Convention) -> np.uint64:
    return np.uint64(0) if threshold is None else inlier_limit(threshold, convention)
