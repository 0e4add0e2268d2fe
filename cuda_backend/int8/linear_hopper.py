"""LLM.int8() on Hopper: weights prepared once, a layer in one or two kernels, with little time on the host.

A quantiser, and a product that sees to the outliers itself: set aside beside the product of many rows
(`gemm_hopper`, `aside_hopper`), in shared memory for few (`gemm_narrow_hopper`, `outliers_few_hopper`).  The
fewest rows take one kernel where that was measured to be faster (`layer_few_hopper`,
`variant_hopper.one_kernel_wins`).  The paper's convention reads x once more.  Who asks for the codes of x
gets them from a kernel in between, which makes outliers' 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuda_backend.arrays import empty_tensor, is_host, library_of, torch_layout, view
from cuda_backend.capture import refuse_capture
from cuda_backend.context import current_device
from cuda_backend.int8.call_hopper import Kept, outlier_indices
from cuda_backend.int8.memory import allocated, transposed, transposed_view
from cuda_backend.int8.memory_hopper import padded
from cuda_backend.int8.operands import (
    check_inner,
    check_threshold,
    codes_matrix,
    described,
    one_format,
    one_library,
)
from cuda_backend.int8.plan_hopper import linear_plan
from cuda_backend.int8.product_hopper import NOTHING, copied
from cuda_backend.int8.quantize import quantize_columns, quantized_columns
from cuda_backend.launch import stream_of, wait_for
from refimpl.errors import OptionError
from refimpl.quant import Int8Columns, Int8Linear
from refimpl.quant.absmax import Convention
from refimpl.quant.epilogue import linear_operands, stored_weight

__all__ = ["PreparedWeight", "llm_int8_linear_hopper", "prepare_weight"]


class PreparedWeight(NamedTuple):
    """A weight as the Hopper kernels read it fastest: codes [K, N], absmax [N], and the weight or None."""

    codes: Any
    absmax: Any
    given: Any


def prepare_weight(weight: Any, /, *, keep: bool = False, stream: Any = None) -> PreparedWeight:
    """Return a weight quantised by columns, its codes laid out for the Hopper kernels: once, ahead.

    Parameters
    ----------
    weight : array of float32, float16 or bfloat16, shape (K, N), or Int8Columns
        Used as ``x @ weight``, on a GPU or on the host, whence it is copied; or its codes.
    keep : bool
        Hold the weight as given too, which outliers meet under the paper's convention.
    stream : int or stream object, optional
        As for `int8_matmul_hopper`.

    Returns
    -------
    PreparedWeight
        The codes of a column begin at multiples of 16 bytes, whatever K is.

    Raises
    ------
    OptionError
        If `weight` holds NaN or infinity, or is Int8Columns and to be kept.
    ShapeError, DTypeError, UnsupportedError, BackendUnavailableError
        As `cuda_backend.quantize_columns`.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.1.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     assert prepare_weight(np.ones((3, 5), np.float16)).codes.shape == (3, 5)
    """
    if isinstance(weight, Int8Columns):
        if keep:
            raise OptionError("keep: the weight is given as codes already; there is nothing to keep")
        columns = weight
    else:
        columns = quantize_columns(weight, stream=stream)
    codes = columns.codes
    if codes.shape[0] % 16:
        codes = _roomy(codes, stream)
    return PreparedWeight(codes, columns.absmax, weight if keep else None)


def _roomy(codes: Any, stream: Any) -> Any:
    """Return codes [K, N] whose columns begin at multiples of 16 bytes."""
    K, N = codes.shape
    if is_host(codes):
        memory = np.zeros((N, padded(K)), np.int8)
        memory[:, :K] = codes.T
        return memory[:, :K].T
    on = stream_of(codes, stream)
    given, result = allocated((N, padded(K)), "int8", codes, on)
    source = transposed_view("codes", codes, on)
    copied(source, given.address, on)
    return result()[:, :K].T


def llm_int8_linear_hopper(
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
    x : array of float16 or bfloat16, shape (T, K)
        Tokens by features; the last axis is contiguous.  All arrays are NumPy's, which are copied to the GPU
        and back, or all of one GPU library on the current GPU.
    weight : PreparedWeight, Int8Columns, or array like `x` of shape (K, N)
        Prepared: nothing is to be done.  Int8Columns are copied in every call if TMA cannot read them as they
        lie.  A weight in floating point is quantised by every call, which waits to know that it is finite.
    bias, threshold, convention, return_parts, stream
        As for `cuda_backend.llm_int8_linear_fused`.

    Returns
    -------
    array or Int8Linear
        As the reference, in the dtype and library of `x`, rounded once.

    Raises
    ------
    ShapeError, DTypeError, OptionError, BackendUnavailableError
        As `cuda_backend.llm_int8_linear_fused`.
    UnsupportedError
        If the GPU is no Hopper, for other dtypes, strides and addresses, for the paper's convention with a
        prepared weight that does not keep the weight, or on a stream under capture with `return_parts` or a
        weight that has no codes.

    Notes
    -----
    The number of outlier columns stays on the device, and no call but with `return_parts` waits for it.  With
    many rows up to 1024 outlier columns are multiplied by tensor cores, with few rows the first 32 lie in
    shared memory; further ones follow number by number.  Any output repeats bit for bit; without outliers it
    equals the reference's.

    A CUDA graph may be captured of calls with PyTorch's tensors and codes or a prepared weight, without
    `return_parts`.  Graphs that were captured on one stream share the memory between kernels: none may run
    beside another.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3, eq. 8; the fusion is ours.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     x, weight = np.array([[0.02, 60.0]], np.float16), np.eye(2, dtype=np.float16)
    ...     assert llm_int8_linear_hopper(x, weight).round(3).tolist() == x.round(3).tolist()
    """
    if not return_parts and _all_torch(x, weight, bias, convention):
        return _torch_call(x, weight, bias, threshold, convention, stream)
    check_threshold(threshold, convention)
    weight, floats = _parts(x, weight, bias, threshold, convention)
    host = is_host(x)
    if host:
        x, bias = floats["x"], floats.get("bias")
    on = stream_of(x, stream)
    if return_parts or weight.codes is None:
        waits = (
            "return_parts waits for outliers" if return_parts else "a weight that has no codes is waited for"
        )
        refuse_capture("llm_int8_linear_hopper", on, waits)
    row = view("x", x, on)
    given, stored = floats.get("weight", weight.given), weight
    if weight.codes is None:
        quantised = quantized_columns(given, row.dtype, on)
        codes, absmax = transposed(quantised.codes), quantised.absmax
    else:
        codes = transposed(transposed_view("weight codes", weight.codes, on))
        absmax = view("weight absmax", weight.absmax, on)
    met = (
        view("weight", given, on)
        if convention == "paper" and threshold is not None and given is not None
        else None
    )
    shift = None if bias is None else view("bias", bias, on)
    wait_for([each for each in (row, codes, absmax, met, shift) if each is not None], on)
    layouts = [None if each is None else each.layout for each in (met, absmax, shift)]
    plan = linear_plan(row.layout, codes.layout, *layouts, threshold, convention, on, current_device())
    out, result = allocated(plan.shape, row.dtype, x, on)
    kept = Kept(row.shape, x, on) if return_parts else None
    after = NOTHING
    if 0 not in plan.shape or return_parts:
        after = plan.run(
            row.address,
            codes.address,
            absmax.address,
            0 if met is None else met.address,
            0 if shift is None else shift.address,
            out.address,
            None if kept is None else kept.addresses,
        )
    if kept is None:
        return result()
    if weight.codes is None:
        stored = PreparedWeight(quantised.codes_result().T, quantised.absmax_result(), None)
    return Int8Linear(
        result(), kept.codes(), kept.absmax(), stored.codes, stored.absmax, outlier_indices(after, x, on)
    )


def _parts(
    x: Any, weight: Any, bias: Any, threshold: float | None, convention: Convention
) -> tuple[PreparedWeight, dict[str, Any]]:
    """Return the weight's parts, codes None if it has none yet, and the floating operands, checked."""
    floats = {"x": x} if bias is None else {"x": x, "bias": bias}
    if isinstance(weight, PreparedWeight):
        parts = weight
    elif isinstance(weight, Int8Columns):
        parts = PreparedWeight(*weight, None)
    else:
        parts, floats = PreparedWeight(None, None, weight), {**floats, "weight": weight}
    one_library({**floats, **{name: each for name, each in parts._asdict().items() if each is not None}})
    found = {name: described(name, each) for name, each in floats.items()}
    given: Any = found.get("weight")
    if given is None:
        codes = codes_matrix("weight codes", parts.codes)
        given = Int8Columns(codes, described("weight absmax", parts.absmax))
        prepared = isinstance(weight, PreparedWeight)
        given = stored_weight(given, "released" if prepared else convention, threshold)
    x_given, weight_given, bias_given = linear_operands(found["x"], given, found.get("bias"))
    check_inner(x_given.shape[1])
    if not is_host(x):
        one_format(floats)
        return parts, floats
    checked_floats: dict[str, Any] = {"x": x_given}
    if bias_given is not None:
        checked_floats["bias"] = bias_given
    if "weight" in floats:
        checked_floats["weight"] = weight_given
    return parts, checked_floats


def _all_torch(x: Any, weight: Any, bias: Any, convention: Convention) -> bool:
    """Return whether a call has tensors only, and a weight that has its codes."""
    if not isinstance(weight, PreparedWeight) and not (
        isinstance(weight, Int8Columns) and convention == "released"
    ):
        return False
    tensors = (x, weight.codes) if bias is None else (x, weight.codes, bias)
    return all(library_of(each) == "torch" for each in tensors)


def _torch_call(
    x: Any,
    weight: PreparedWeight | Int8Columns,
    bias: Any,
    threshold: float | None,
    convention: Convention,
    stream: Any,
) -> Any:
    """Call with tensors: by far the most calls, which make no views and check layouts once."""
    on = stream_of(x, stream)
    codes: Any = weight.codes
    absmax: Any = weight.absmax
    met: Any = getattr(weight, "given", None) if convention == "paper" and threshold is not None else None
    plan = linear_plan(
        torch_layout(x),
        torch_layout(codes),
        None if met is None else torch_layout(met),
        torch_layout(absmax),
        None if bias is None else torch_layout(bias),
        threshold,
        convention,
        on,
        current_device(),
    )
    out = empty_tensor(plan.shape, x.dtype, x, on)
    if 0 not in plan.shape:
        plan.run(
            x.data_ptr(),
            codes.data_ptr(),
            absmax.data_ptr(),
            0 if met is None else met.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
    return out
