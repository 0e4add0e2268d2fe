"""Calling the Hopper forward kernels with arrays of any library, with little time on the host."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from cuda_backend.arrays import View, empty, empty_tensor, library_of, refuse_gradient, view
from cuda_backend.attention.call_dropout_hopper import attention_with_dropout
from cuda_backend.attention.padding import aligned_rows
from cuda_backend.attention.plan_hopper import COLUMNS, MISALIGNED, Plan, enqueue, make_plan, reasons
from cuda_backend.attention.variant_hopper import Variant
from cuda_backend.context import current_device
from cuda_backend.launch import stream_of, torch_stream, wait_for
from refimpl.attention import AttentionOutput
from refimpl.attention.scores import Causal
from refimpl.errors import DTypeError, UnsupportedError

__all__ = ["flash_attention_hopper", "launch_hopper", "refuse", "supports_hopper"]

# Options of `flash_attention` that the kernel lacks, at their defaults; without dropout `rng` says nothing.
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("attn_mask", "bias", "alibi_slopes", "softcap", "q_lengths", "k_lengths")),
    **dict.fromkeys(("dropout_mask", "rng", "block_sizes", "sram")),
    "dropout_p": 0.0,
}


def flash_attention_hopper(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    causal: Causal = False,
    scale: float | None = None,
    return_lse: bool = False,
    stream: Any = None,
    dropout_p: float = 0.0,
    rng: Any = None,
    **others: Any,
) -> Any:
    """Return attention of GPU arrays in float16 or bfloat16, on the tensor cores of a Hopper GPU.

    Parameters
    ----------
    q, k, v : array of float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        PyTorch, CuPy, JAX or Numba arrays, read where they lie; NumPy arrays are copied.  Hkv divides Hq; D
        and Dv are at most 256.  The last axis is contiguous; other strides are multiples of 8, or the array
        is contiguous.
    causal : {False, True, "top_left", "bottom_right"}
        As for `refimpl.attention.scaled_dot_product_attention`.
    scale : float, optional
        Factor of the scores, > 0.  Default: ``D ** -0.5``.
    return_lse : bool
        Also return the log-sum-exp of each row, natural logarithm, float32, shape (B, Hq, Tq).
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `q` works on.
    dropout_p, rng
        As for `refimpl.attention.flash_attention`: probability, and seed or generator of the dropout, which
        drops the same weights as the reference; a backward pass needs the seed.
    **others
        Further options of `cuda_backend.flash_attention`, at their defaults: the kernel has none of them.

    Returns
    -------
    array or AttentionOutput
        Shape (B, Tq, Hq, Dv), in `q`'s dtype and library; a row without keys is 0 with log-sum-exp -inf.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; DTypeError also if the inputs are of several libraries or devices.
    UnsupportedError
        With the reasons of `supports_hopper`; if a tensor requires a gradient, which is not recorded here.
    BackendUnavailableError
        If there is no GPU.

    Notes
    -----
    P is rounded to `q`'s dtype before P V, unnormalised; sums are in float32.  Results repeat bit for bit.
    **Any width**: tiles are filled with zeros to a multiple of 64.  Where D is no multiple of 8, the copy
    engine cannot take the rows of a contiguous array: they are copied first, on the GPU, which costs their
    size in memory and traffic.  Where Dv is none, the result is a view of an array with longer rows.

    References
    ----------
    .. [1] Shah et al., 2024, arXiv:2407.08608, Algorithms 1 and 2.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cuda") is None:
    ...     import numpy as np
    ...     x = np.ones((1, 3, 2, 8), np.float16)
    ...     assert flash_attention_hopper(x, x, x, causal=True).shape == x.shape
    """
    if others:
        refuse(others)
    if not dropout_p and library_of(q) == "torch" and type(q) is type(k) is type(v):
        # By far the most calls: no views, which would take as long as the driver.
        if q.requires_grad or k.requires_grad or v.requires_grad:
            refuse_gradient(q, k, v)
        device = current_device()
        on = torch_stream(q) if stream is None else stream_of(q, stream)
        plan = _plan_of_tensors(
            q.shape, q.stride(), q.dtype, q.get_device(), k.shape, k.stride(), k.dtype, k.get_device(),
            v.shape, v.stride(), v.dtype, v.get_device(), causal, scale, on, device,
        )  # fmt: skip
        if plan is not None:
            out = empty_tensor(None if plan.out_is_like_q else plan.out_shape, q.dtype, q, on)
            lse = empty_tensor(plan.lse_shape, "float32", q, on) if return_lse else None
            addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
            enqueue(plan, addresses, out.data_ptr(), 0 if lse is None else lse.data_ptr())
            return out if lse is None else AttentionOutput(out, lse)
    libraries = {"q": library_of(q), "k": library_of(k), "v": library_of(v)}
    if len(set(libraries.values())) > 1:
        raise DTypeError(f"q, k and v: expected arrays of one library, got {libraries}")
    on = stream_of(q, stream)
    if dropout_p:
        drop: dict[str, Any] = {"dropout_p": dropout_p, "rng": rng, "return_lse": return_lse}
        return attention_with_dropout(q, k, v, causal=causal, scale=scale, stream=on, **drop)
    views = [view(name, array, on) for name, array in zip("qkv", (q, k, v), strict=True)]
    wait_for(views, on)
    with ExitStack() as copies:
        aligned = [copies.enter_context(aligned_rows(given, on)) for given in views]
        layouts = aligned[0].layout, aligned[1].layout, aligned[2].layout
        plan = make_plan(*layouts, causal, scale, on, current_device())
        out, out_result = empty(plan.out_shape, plan.dtype, q, on)
        lse, lse_result = empty(plan.lse_shape, "float32", q, on) if return_lse else (None, None)
        addresses = aligned[0].address, aligned[1].address, aligned[2].address
        enqueue(plan, addresses, out.address, 0 if lse is None else lse.address)
    columns = views[2].shape[3]
    result = out_result() if columns == plan.out_shape[3] else out_result()[..., :columns]
    return result if lse_result is None else AttentionOutput(result, lse_result())


@functools.lru_cache(maxsize=1024)
def _plan_of_tensors(
    q_shape: Any, q_stride: Any, q_dtype: Any, q_device: int, k_shape: Any, k_stride: Any, k_dtype: Any,
    k_device: int, v_shape: Any, v_stride: Any, v_dtype: Any, v_device: int,
    causal: Causal, scale: float | None, stream: int, device: int,
) -> Plan | None:  # fmt: skip
    """Return the plan of a call with PyTorch's tensors; None if a width is odd, and rows may need a copy."""
    if any(shape[-1:] and shape[-1] % COLUMNS for shape in (q_shape, k_shape, v_shape)):
        return None
    q, k = (q_shape, q_stride, q_dtype, q_device), (k_shape, k_stride, k_dtype, k_device)
    return make_plan(q, k, (v_shape, v_stride, v_dtype, v_device), causal, scale, stream, device)


def refuse(options: Mapping[str, Any]) -> None:
    """Raise for an option of `flash_attention` that the kernel lacks, unless it is at its default.

    Raises
    ------
    UnsupportedError
        With the names.
    TypeError
        If `flash_attention` has no such option either.
    """
    unknown = sorted(set(options) - set(DEFAULTS))
    if unknown:
        raise TypeError(f"flash_attention: no such option: {', '.join(unknown)}")
    given = [name for name, value in options.items() if name != "rng" and value is not None]
    if options.get("dropout_p") == DEFAULTS["dropout_p"]:
        given.remove("dropout_p")
    if given:
        raise UnsupportedError(f"flash_attention_hopper: the kernel has no {', '.join(sorted(given))}")


def supports_hopper(
    q: View, k: View, v: View, /, *, causal: Causal = False, scale: float | None = None
) -> list[str]:
    """Return the reasons why the Hopper kernels refuse a valid call; none if they take it.

    Parameters
    ----------
    q, k, v : View
        As `cuda_backend.arrays.view` returns them.
    causal, scale
        As for `flash_attention_hopper`.

    Returns
    -------
    list of str
        Reasons in words.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the reference would refuse the call too.
    """
    found = reasons(q, k, v, causal=causal, scale=scale)
    return [*found, MISALIGNED] if (q.address | k.address | v.address) % 16 else found


def launch_hopper(
    q: View,
    k: View,
    v: View,
    out: View,
    lse: View | None,
    /,
    *,
    causal: Causal,
    scale: float | None,
    stream: int,
    variant: Variant | None = None,
) -> None:
    """Queue one attention on `stream`, into memory of the caller's; nothing waits.

    Parameters
    ----------
    q, k, v : View
        To which `supports_hopper` has no objection.
    out : View
        Contiguous (B, Tq, Hq, Dv), of the same dtype.
    lse : View or None
        Contiguous (B, Hq, Tq), float32.
    causal, scale
        As for `flash_attention_hopper`.
    stream : int
        A CUstream of the current context.
    variant : Variant, optional
        In place of `choose`'s.
    """
    plan = make_plan(q.layout, k.layout, v.layout, causal, scale, stream, current_device(), variant)
    enqueue(plan, (q.address, k.address, v.address), out.address, 0 if lse is None else lse.address)
