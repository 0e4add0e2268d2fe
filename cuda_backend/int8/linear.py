"""LLM.int8() on a GPU: a linear layer in int8, outliers found and multiplied without asking the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_backend.arrays import View, is_host, view
from cuda_backend.int8.gemm import multiplied
from cuda_backend.int8.memory import allocated, transposed_view
from cuda_backend.int8.operands import (
    check_format,
    check_inner,
    check_threshold,
    codes_matrix,
    described,
    one_format,
    one_library,
    supported,
)
from cuda_backend.int8.quantize import Rows, quantized, quantized_columns
from cuda_backend.int8.variant_portable import Variant
from cuda_backend.launch import stream_of
from refimpl.quant import Int8Columns, Int8Linear
from refimpl.quant.absmax import Convention
from refimpl.quant.epilogue import linear_operands, stored_weight

__all__ = ["llm_int8_linear", "llm_int8_linear_fused"]


def llm_int8_linear_fused(
    x: Any,
    weight: Any,
    /,
    *,
    bias: Any = None,
    threshold: float | None = 6.0,
    convention: Convention = "released",
    return_parts: bool = False,
    stream: Any = None,
) -> Any:
    """Return ``x @ weight + bias``, in int8 but for the columns of `x` that hold outliers, written once.

    Parameters
    ----------
    x : array of float32, float16 or bfloat16, shape (T, K)
        Tokens by features.  All arrays are NumPy's, which are copied to the GPU and back, or all of one GPU
        library on the current GPU, with any strides.
    weight : array like `x`, shape (K, N), or Int8Columns
        The weight, or its codes and absmax in float32 as `quantize_columns` stores them: a weight in
        floating point is quantised again by every call, which waits to know that it is finite.
    bias : array like `x`, shape (N,), optional
        Added in the epilogue.
    threshold : float or None
        Magnitude that makes a number an outlier and its column one of floating point; None: all int8.
    convention : {"paper", "released"}
        As for `refimpl.quant.llm_int8_linear`.
    return_parts : bool
        Return the codes, scales and outliers too; the call waits for the number of outliers.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `x` works on.

    Returns
    -------
    array or Int8Linear
        As the reference, in the dtype and library of `x`, rounded once.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; DTypeError also if the arrays are of several libraries.
    UnsupportedError
        If the arrays are float64.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    Outlier columns are found by the device and stay there: their number is read by the kernel that
    multiplies them, and the host learns it only with `return_parts`.  Without outliers the output equals the
    reference's bit for bit, and any output repeats.  **Special cases**: those of the reference.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3, eq. 8; the fusion is ours.

    Examples
    --------
    >>> import cuda_backend
    >>> import numpy as np
    >>> x, weight = np.array([[0.02, 60.0]], np.float32), np.eye(2, dtype=np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert llm_int8_linear_fused(x, weight).round(4).tolist() == x.round(4).tolist()
    """
    call = _call("llm_int8_linear_fused", x, weight, bias, threshold, convention, stream)
    outliers = "" if threshold is None else convention
    variant = Variant("codes", call.dtype, bias=call.bias is not None, outliers=outliers)
    out, result = allocated(call.shape, call.dtype, call.like, call.on)
    multiplied(
        variant,
        out,
        call.on,
        a=call.rows.codes,
        b=call.codes,
        x_absmax=call.rows.absmax,
        weight_absmax=call.absmax,
        bias=call.bias,
        x=call.x,
        weight=call.weight,
        indices=call.rows.outliers.indices,
        count=call.rows.outliers.number,
    )
    return _returned(call, result, return_parts)


def llm_int8_linear(
    x: Any,
    weight: Any,
    /,
    *,
    bias: Any = None,
    threshold: float | None = 6.0,
    convention: Convention = "released",
    return_parts: bool = False,
    stream: Any = None,
) -> Any:
    """Return `llm_int8_linear_fused` in the steps of the released code, each of which leaves its result.

    Parameters
    ----------
    x, weight, bias, threshold, convention, return_parts, stream
        As for `llm_int8_linear_fused`.

    Returns
    -------
    array or Int8Linear
        Rounded twice where there are outliers, as the reference.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `llm_int8_linear_fused`.

    Notes
    -----
    It is here to be compared with: the int32 product goes to memory and back, and so does the output.

    References
    ----------
    .. [1] bitsandbytes @0155ecc, backends/default/ops.py, ``int8_mixed_scaled_mm``.

    Examples
    --------
    >>> import cuda_backend
    >>> import numpy as np
    >>> x, weight = np.array([[0.02, 60.0]], np.float32), np.eye(2, dtype=np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert llm_int8_linear(x, weight, threshold=None).round(4).tolist() == [[0.0, 60.0]]
    """
    call = _call("llm_int8_linear", x, weight, bias, threshold, convention, stream)
    product, _ = allocated(call.shape, "int32", call.like, call.on)
    out, result = allocated(call.shape, call.dtype, call.like, call.on)
    multiplied(Variant("codes", "int32"), product, call.on, a=call.rows.codes, b=call.codes)
    multiplied(
        Variant("product", call.dtype, bias=call.bias is not None),
        out,
        call.on,
        product=product,
        x_absmax=call.rows.absmax,
        weight_absmax=call.absmax,
        bias=call.bias,
    )
    if threshold is not None:
        multiplied(
            Variant("output", call.dtype, outliers=convention),
            out,
            call.on,
            b=call.codes,
            weight_absmax=call.absmax,
            x=call.x,
            weight=call.weight,
            indices=call.rows.outliers.indices,
            count=call.rows.outliers.number,
        )
    return _returned(call, result, return_parts)


class _Call(NamedTuple):
    """A validated call with its activations and weight quantised; codes of the weight are [N, K]."""

    x: View
    like: Any
    dtype: str
    shape: tuple[int, int]
    on: int
    rows: Rows
    codes: View
    absmax: View
    weight: View | None
    bias: View | None
    stored: Rows | Int8Columns


def _call(
    caller: str, x: Any, weight: Any, bias: Any, threshold: float | None, convention: Convention, stream: Any
) -> _Call:
    """Check a call as the reference does, GPU arrays by their shapes alone, and quantise its operands."""
    check_threshold(threshold, convention)
    stored = isinstance(weight, Int8Columns)
    parts = dict(zip(("weight codes", "weight absmax"), weight, strict=True)) if stored else {}
    floats = {"x": x} if stored else {"x": x, "weight": weight}
    if bias is not None:
        floats["bias"] = bias
    one_library({**floats, **parts})
    found = {name: described(name, value) for name, value in floats.items()}
    given: Any = found.get("weight")
    if stored:
        codes, absmax = codes_matrix("weight codes", weight.codes), described("weight absmax", weight.absmax)
        check_format("weight absmax", weight.absmax, "float32")
        given = stored_weight(Int8Columns(codes, absmax), convention, threshold)
    operands = linear_operands(found["x"], given, found.get("bias"))
    if is_host(x):
        x, dtype = operands[0], operands[0].dtype.name
        weight, bias = operands[1:]
    else:
        dtype = one_format(floats)
    T, K = operands[0].shape
    N = (given.codes if stored else given).shape[1]
    check_inner(K)
    supported(caller, dtype, T, max(K, N))
    on = stream_of(x, stream)
    columns = None if stored else quantized_columns(weight, dtype, on)
    x_view = view("x", x, on)
    return _Call(
        x=x_view,
        like=x,
        dtype=dtype,
        shape=(T, N),
        on=on,
        rows=quantized(x_view, dtype, x, on, threshold, convention),
        codes=columns.codes if columns else transposed_view("weight codes", weight.codes, on),
        absmax=columns.absmax if columns else view("weight absmax", weight.absmax, on),
        weight=None if stored or convention == "released" else view("weight", weight, on),
        bias=None if bias is None else view("bias", bias, on),
        stored=columns or weight,
    )


def _returned(call: _Call, result: Callable[[], Any], return_parts: bool) -> Any:
    out = result()
    if not return_parts:
        return out
    rows, stored = call.rows, call.stored
    if isinstance(stored, Rows):
        stored = Int8Columns(stored.codes_result().T, stored.absmax_result())
    return Int8Linear(
        out,
        x_codes=rows.codes_result(),
        x_absmax=rows.absmax_result(),
        weight_codes=stored.codes,
        weight_absmax=stored.absmax,
        outliers=rows.outliers.result(),
    )
