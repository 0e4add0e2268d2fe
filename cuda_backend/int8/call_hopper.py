"""Calling the Hopper kernels that multiply codes and quantise rows, with arrays of any library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cuda_backend.arrays import View, is_host, view
from cuda_backend.capture import refuse_capture
from cuda_backend.context import checked, current_device, driver
from cuda_backend.int8.memory import allocated, to_host, transposed, transposed_view
from cuda_backend.int8.memory_hopper import padded
from cuda_backend.int8.operands import check_inner, check_threshold, codes_matrix, described, one_library
from cuda_backend.int8.plan_hopper import product_plan, rows_plan
from cuda_backend.int8.product_hopper import After
from cuda_backend.int8.variant_hopper import Narrow, Wide
from cuda_backend.launch import stream_of, wait_for
from refimpl.errors import DTypeError, UnsupportedError
from refimpl.quant.absmax import Convention, Int8Rows
from refimpl.validation import bind_axes, floating

__all__ = ["Kept", "int8_matmul_hopper", "outlier_indices", "quantize_rows_hopper", "scaled_int8_matmul"]


def int8_matmul_hopper(a: Any, b: Any, /, *, stream: Any = None) -> Any:
    """Return the int32 product of two int8 matrices, exactly, on the tensor cores of a Hopper GPU.

    Parameters
    ----------
    a, b : array of int8, shapes (M, K) and (K, N)
        As for `cuda_backend.int8_matmul`.  Where rows of `a` and columns of `b` are contiguous and begin at
        multiples of 16 bytes they are read as they lie; other codes are copied first, in every call.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `a` works on.

    Returns
    -------
    array of int32, shape (M, N)
        In the library of `a`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, BackendUnavailableError
        As `cuda_backend.int8_matmul`.
    UnsupportedError
        If the GPU is no Hopper, or codes that are not copied start at no multiple of 16 bytes.

    References
    ----------
    .. [1] PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Instructions".

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     a = np.full((1, 4), 127, np.int8)
    ...     assert int8_matmul_hopper(a, a.T).item() == 4 * 127**2
    """
    return _product("int8_matmul_hopper", a, b, "int32", {}, stream)


def scaled_int8_matmul(
    a: Any, b: Any, /, *, a_absmax: Any, b_absmax: Any, dtype: Any, bias: Any = None, stream: Any = None
) -> Any:
    """Return ``dequantize_product(int8_matmul(a, b), ...)`` without the int32 product in memory.

    Parameters
    ----------
    a, b
        As for `int8_matmul_hopper`.
    a_absmax, b_absmax : array of float32, shapes (M,) and (N,)
        As from `quantize_rows` and `quantize_columns`.
    dtype : dtype
        Of the result, float16 or bfloat16: NumPy's or its name.
    bias : array of `dtype`, shape (N,), optional
        Added before rounding.
    stream : int or stream object, optional
        As for `int8_matmul_hopper`.

    Returns
    -------
    array of `dtype`, shape (M, N)
        Equal to that of the two functions bit for bit.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `int8_matmul_hopper`; UnsupportedError also for another dtype.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 2.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     a, one = np.full((1, 4), 127, np.int8), np.ones(1, np.float32)
    ...     scales = {"a_absmax": one, "b_absmax": one, "dtype": "float16"}
    ...     assert scaled_int8_matmul(a, a.T, **scales).item() == 4.0
    """
    kind = str(getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if kind not in ("float16", "bfloat16"):
        raise UnsupportedError(f"scaled_int8_matmul: dtype is {kind}; the kernel writes float16 or bfloat16")
    scales = {"a_absmax": a_absmax, "b_absmax": b_absmax}
    if bias is not None:
        scales["bias"] = bias
    return _product("scaled_int8_matmul", a, b, kind, scales, stream)


def quantize_rows_hopper(
    x: Any, /, *, threshold: float | None = None, convention: Convention = "released", stream: Any = None
) -> Int8Rows:
    """Return the int8 codes of every row of `x`, with 0 in the columns that hold outliers.

    Parameters
    ----------
    x : array of float16 or bfloat16, shape (T, K)
        As for `cuda_backend.quantize_rows`; the last axis is contiguous.
    threshold, convention, stream
        As for `cuda_backend.quantize_rows`.

    Returns
    -------
    Int8Rows
        Equal to the reference's bit for bit, in the library of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, BackendUnavailableError
        As `cuda_backend.quantize_rows`.
    UnsupportedError
        If the GPU is no Hopper, for other dtypes and strides, or with a threshold on a stream under capture.

    Notes
    -----
    Under "released" x is read once, under "paper" twice.  With a threshold the call waits for the number of
    outlier columns, whose indices it returns; `llm_int8_linear_hopper` does not.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.1.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     x = np.array([[1.0, -2.0, 20.0], [0.0, 0.0, 0.0]], np.float16)
    ...     assert quantize_rows_hopper(x, threshold=6.0).codes.tolist() == [[64, -127, 0], [0, 0, 0]]
    """
    (shape,) = floating(x=described("x", x))
    bind_axes({"x": (shape, "T K")})
    check_threshold(threshold, convention)
    x = shape if is_host(x) else x
    on = stream_of(x, stream)
    if threshold is not None:
        refuse_capture(
            "quantize_rows_hopper", on, "with a threshold it waits for how many outliers there are"
        )
    rows = view("x", x, on)
    wait_for([rows], on)
    kept = Kept(rows.shape, x, on)
    plan = rows_plan(rows.layout, threshold, convention, on, current_device())
    after = plan.run(rows.address, *kept.addresses)
    return Int8Rows(kept.codes(), kept.absmax(), outlier_indices(after, x, on))


class Kept:
    """Codes and absmax of rows [T, K] that the caller gets, as arrays of the library of `like`."""

    def __init__(self, shape: tuple[int, ...], like: Any, stream: int) -> None:
        T, self._width = shape
        codes, self._codes = allocated((T, padded(self._width)), "int8", like, stream)
        absmax, self.absmax = allocated((T,), "float32", like, stream)
        self.addresses = codes.address, absmax.address

    def codes(self) -> Any:
        """Return the codes without what pads their rows."""
        return self._codes()[:, : self._width]


def outlier_indices(after: After, like: Any, stream: int) -> Any:
    """Return the indices of outlier columns in the library of `like`; waits for their number."""
    number = 0
    if after.number:
        number = int(to_host(View((1,), (4,), "int32", after.number, None), stream)[0])
    found = np.empty(0, np.int32)
    if number:
        found = to_host(View((number,), (4,), "int32", after.indices, None), stream)
    indices = found.astype(np.int64)
    if is_host(like):
        return indices
    given, result = allocated(indices.shape, "int64", like, stream)
    if number:
        checked(driver.cuMemcpyHtoDAsync(given.address, indices.ctypes.data, indices.nbytes, stream))
    return result()


def _product(
    caller: str,
    a: Any,
    b: Any,
    kind: str,
    scales: Mapping[str, Any],
    stream: Any,
    variant: Wide | Narrow | None = None,
) -> Any:
    """Check the operands as the portable functions do, and queue the product."""
    one_library({"a": a, "b": b, **scales})
    left, right = codes_matrix("a", a), codes_matrix("b", b)
    axes = {"a_absmax": "M", "b_absmax": "N", "bias": "N"}
    found = {name: (described(name, value), axes[name]) for name, value in scales.items()}
    size = bind_axes({"a": (left, "M K"), "b": (right, "K N"), **found})
    check_inner(size["K"])
    on = stream_of(a, stream)
    like = a
    if is_host(a) and kind != "int32":
        like = np.empty(0, scales["bias"].dtype if "bias" in scales else kind)
    out, result = allocated((size["M"], size["N"]), kind, like, on)
    codes = view("a", a, on), transposed(transposed_view("b", b, on))
    views = {name: view(name, value, on) for name, value in scales.items()}
    wait_for([*codes, *views.values()], on)
    for name, value in views.items():
        expected = kind if name == "bias" else "float32"
        if value.dtype != expected:
            raise DTypeError(f"{name}: expected {expected}, got {value.dtype}")
        if value.shape[0] > 1 and value.strides[0] != {"float32": 4}.get(expected, 2):
            raise UnsupportedError(f"{caller}: {name} is not contiguous")
    plan = product_plan(codes[0].layout, codes[1].layout, kind, on, current_device(), variant)
    if size["M"] and size["N"]:
        addresses = {name: value.address for name, value in views.items()}
        plan.run(codes[0].address, codes[1].address, out.address, After(**addresses))
    return result()
