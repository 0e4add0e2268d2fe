"""Exact products of int8 codes on a GPU, and their epilogue: what callers see."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_backend.arrays import View, absent, is_host, view
from cuda_backend.int8 import gemm_portable
from cuda_backend.int8.memory import allocated, transposed_view, words
from cuda_backend.int8.operands import (
    check_format,
    check_inner,
    codes_matrix,
    described,
    one_library,
    supported,
)
from cuda_backend.int8.variant_portable import Variant, choose
from cuda_backend.launch import launch, stream_of
from refimpl.validation import bind_axes

__all__ = ["dequantize_product", "int8_matmul", "multiplied"]


def int8_matmul(a: Any, b: Any, /, *, stream: Any = None) -> Any:
    """Return the int32 product of two int8 matrices, exactly.

    Parameters
    ----------
    a, b : array of int8, shapes (M, K) and (K, N)
        Codes in [-127, 127].  Both NumPy arrays, or both arrays of one GPU library, with any strides; they
        are read fastest where K is a multiple of 4 and contiguous: `a` in C order, `b` in Fortran order.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `a` works on.

    Returns
    -------
    array of int32, shape (M, N)
        In the library of `a`.

    Raises
    ------
    ShapeError, DTypeError
        As `refimpl.quant.int8_matmul`; DTypeError also if the arrays are of several libraries.
    OptionError
        If K exceeds 133,144, or a NumPy array holds -128.  Codes on the GPU are not looked at: with -128
        among them the product is exact for K up to 131,071.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 2.

    Examples
    --------
    >>> import cuda_backend
    >>> a = np.full((1, 4), 127, np.int8)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert int8_matmul(a, a.T).item() == 4 * 127**2
    """
    one_library({"a": a, "b": b})
    left, right = codes_matrix("a", a), codes_matrix("b", b)
    size = bind_axes({"a": (left, "M K"), "b": (right, "K N")})
    check_inner(size["K"])
    supported("int8_matmul", "float32", size["M"], size["N"])
    on = stream_of(a, stream)
    out, result = allocated((size["M"], size["N"]), "int32", a, on)
    multiplied(Variant("codes", "int32"), out, on, a=view("a", a, on), b=transposed_view("b", b, on))
    return result()


def dequantize_product(
    product: Any,
    x_absmax: Any,
    weight_absmax: Any,
    /,
    *,
    dtype: Any,
    bias: Any = None,
    stream: Any = None,
) -> Any:
    """Return ``product * c_x * c_w / 127² + bias``, rounded to `dtype`: the epilogue by itself.

    Parameters
    ----------
    product : array of int32, shape (T, N)
        As from `int8_matmul`.
    x_absmax, weight_absmax : array of float32, shapes (T,) and (N,)
        As from `quantize_rows` and `quantize_columns`.
    dtype : dtype
        Of the result: float32, float16 or bfloat16.
    bias : array of `dtype`, shape (N,), optional
        Added before rounding.
    stream : int or stream object, optional
        As for `int8_matmul`.

    Returns
    -------
    array, shape (T, N)
        Equal to that of `refimpl.quant.dequantize_product` bit for bit.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit.
    UnsupportedError
        If `dtype` is float64.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    References
    ----------
    .. [1] bitsandbytes @12297f3, csrc/cuda/int8.cu, ``kdequant_mm_int32_fp16``.

    Examples
    --------
    >>> import cuda_backend
    >>> product, one = np.array([[16129]], np.int32), np.ones(1, np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert dequantize_product(product, one, one, dtype=np.float32).item() == 1.0
    """
    arrays = {"product": product, "x_absmax": x_absmax, "weight_absmax": weight_absmax}
    if bias is not None:
        arrays["bias"] = bias
    one_library(arrays)
    found = {name: described(name, value) for name, value in arrays.items()}
    axes = {"product": "T N", "x_absmax": "T", "weight_absmax": "N", "bias": "N"}
    size = bind_axes({name: (value, axes[name]) for name, value in found.items()})
    kind = str(getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    supported("dequantize_product", kind, size["T"], size["N"])
    for name, expected in (("product", "int32"), ("x_absmax", "float32"), ("weight_absmax", "float32")):
        check_format(name, arrays[name], expected)
    on = stream_of(product, stream)
    like = np.empty(0, dtype) if is_host(product) else product
    out, result = allocated((size["T"], size["N"]), kind, like, on)
    views = {name: view(name, value, on) for name, value in arrays.items()}
    multiplied(Variant("product", kind, bias=bias is not None), out, on, **views)
    return result()


def multiplied(
    variant: Variant,
    out: View,
    on: int,
    *,
    a: View | None = None,
    b: View | None = None,
    product: View | None = None,
    x_absmax: View | None = None,
    weight_absmax: View | None = None,
    bias: View | None = None,
    x: View | None = None,
    weight: View | None = None,
    indices: View | None = None,
    count: View | None = None,
) -> None:
    """Launch the kernel on the arrays that it reads: codes a [M, K] and b [N, K], and what follows them."""
    M, N = out.shape
    left, right = (None if codes is None else words(codes) for codes in (a, b))
    variant = choose(
        variant._replace(
            a_words=left is None or left.dtype == "uint32", b_words=right is None or right.dtype == "uint32"
        ),
        M,
        N,
    )
    blocks = -(-M // variant.BM) * -(-N // variant.BN)
    if blocks == 0:
        return
    number = "float32" if variant.kind == "int32" else variant.kind
    launch(
        gemm_portable.build(variant),
        [
            left or absent("uint32", 2),
            right or absent("uint32", 2),
            np.int64(0 if a is None else a.shape[1]),
            product or absent("int32", 2),
            x_absmax or absent("float32", 1),
            weight_absmax or absent("float32", 1),
            bias or absent(number, 1),
            x or absent(number, 2),
            weight or absent(number, 2),
            indices or absent("int64", 1),
            count or absent("int64", 1),
            out,
        ],
        blocks=blocks,
        threads=variant.threads,
        shared_bytes=variant.shared_bytes,
        stream=on,
    )
