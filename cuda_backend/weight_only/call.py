"""Calling the decoding kernels: what callers pass, and where it lies."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cuda_backend._numba import SIMULATOR
from cuda_backend.arrays import Layout, empty_tensor, is_host, library_of, torch_layout, view
from cuda_backend.context import current_device
from cuda_backend.int8.memory import allocated
from cuda_backend.int8.operands import described, one_format, one_library
from cuda_backend.launch import stream_of, torch_stream, wait_for
from cuda_backend.weight_only.operands import stored_weight
from cuda_backend.weight_only.plan import Plan, address_of, plan_of
from cuda_backend.weight_only.prepared import (
    PreparedInt8,
    PreparedNF4,
    prepare_int8_groups,
    prepare_nf4,
)
from cuda_backend.weight_only.variant import MOST_TOKENS, deep
from refimpl.errors import UnsupportedError
from refimpl.quant import Int8Groups, NF4Weight, nf4_quantize, quantize_groups
from refimpl.validation import bind_axes, floating

__all__ = ["int8_linear_decode", "nf4_linear_decode"]

KINDS = {"float16": "f16", "bfloat16": "bf16"}


def int8_linear_decode(
    x: Any, weight: Any, /, *, bias: Any = None, group_size: int = 128, stream: Any = None
) -> Any:
    """Return ``x @ dequantised(weight) + bias`` for up to 16 tokens, the weight widened in registers.

    Parameters
    ----------
    x : array of float16 or bfloat16, shape (M, K)
        Tokens, 1 to 16: NumPy's, or of a GPU library on the current GPU; rows are whole and begin at
        multiples of 8 bytes.
    weight : PreparedInt8, Int8Groups, or a NumPy array, shape (K, N)
        As `prepare_int8_groups` makes it, in the library of `x`; constant, as
        `cuda_backend.weight_only.prepared` says.  Any other, which `cuda_backend.int8_weight_linear` takes
        too, is prepared in every call, and waited for.
    bias : array like `x`, shape (N,), optional
        Added in float32.
    group_size : int
        Of a weight that is not prepared yet.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `x` works on.

    Returns
    -------
    array, shape (M, N)
        In the dtype and library of `x`, rounded once; any output repeats bit for bit.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, or are of several libraries.
    OptionError
        As the reference.
    UnsupportedError
        For other formats, more tokens, or rows that lie elsewhere; as `prepare_int8_groups`.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    Codes are exact in both formats, products are summed in float32, and scales multiply sums.

    References
    ----------
    .. [1] Yao et al., 2022, arXiv:2206.01861, section 4.1.

    Examples
    --------
    >>> import cuda_backend
    >>> from cuda_backend.weight_only.prepared import prepare_int8_groups
    >>> from refimpl.quant import quantize_groups
    >>> if cuda_backend.availability("cudasim") is None:
    ...     weight = prepare_int8_groups(quantize_groups(np.eye(128, dtype=np.float32)))
    ...     x = np.arange(128, dtype=np.float16)[None]
    ...     assert np.abs(int8_linear_decode(x, weight) - x).max() < 0.07
    """
    if not isinstance(weight, PreparedInt8):
        weight = _int8_prepared(weight, group_size, stream)
    groups = -(-weight.shape[0] // weight.group_size)
    share = max(1, -(-weight.group_size // deep("int8")))
    return _decode("int8", x, weight.shape, [weight.codes, weight.scale], groups, share, bias, stream)


def nf4_linear_decode(
    x: Any,
    weight: Any,
    /,
    *,
    bias: Any = None,
    block_size: int = 64,
    scale_block_size: int = 256,
    stream: Any = None,
) -> Any:
    """Return ``x @ doubleDequant(weight) + bias`` for up to 16 tokens, the weight looked up in registers.

    Parameters
    ----------
    x, bias, stream
        As for `int8_linear_decode`.
    weight : PreparedNF4, NF4Weight, or a NumPy array, shape (K, N)
        As `prepare_nf4` makes it; otherwise as for `int8_linear_decode`.
    block_size, scale_block_size : int
        Of a weight that is not stored yet.

    Returns
    -------
    array, shape (M, N)
        In the dtype and library of `x`; any output repeats bit for bit.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `int8_linear_decode`, and as `prepare_nf4`.

    Notes
    -----
    Levels are rounded to the dtype of `x`, where the reference rounds level times absmax; absmax multiply
    sums in float32.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, eq. 5 and 6.

    Examples
    --------
    >>> import cuda_backend
    >>> from cuda_backend.weight_only.prepared import prepare_nf4
    >>> from refimpl.quant import nf4_quantize
    >>> if cuda_backend.availability("cudasim") is None:
    ...     weight = prepare_nf4(nf4_quantize(np.eye(256, dtype=np.float32)))
    ...     x = np.arange(256, dtype=np.float16)[None]
    ...     assert np.array_equal(nf4_linear_decode(x, weight), x)
    """
    if not isinstance(weight, PreparedNF4):
        weight = _nf4_prepared(weight, block_size, scale_block_size, stream)
    share = weight.scale_block_size.bit_length() - 1
    parts = [weight.codes, weight.absmax_codes, weight.scale, weight.offset]
    return _decode("nf4", x, weight.shape, parts, 0, share, bias, stream)


def _int8_prepared(weight: Any, group_size: int, stream: Any) -> PreparedInt8:
    stored = stored_weight(
        "int8_linear_decode", weight, Int8Groups, lambda w: quantize_groups(w, group_size=group_size)
    )
    return prepare_int8_groups(stored, group_size=group_size, stream=stream)


def _nf4_prepared(weight: Any, block_size: int, scale_block_size: int, stream: Any) -> PreparedNF4:
    sizes = {"block_size": block_size, "scale_block_size": scale_block_size}
    return prepare_nf4(
        stored_weight("nf4_linear_decode", weight, NF4Weight, lambda w: nf4_quantize(w, **sizes)),
        stream=stream,
    )


def _decode(
    kind: str,
    x: Any,
    shape: tuple[int, int],
    parts: list[Any],
    groups: int,
    share: int,
    bias: Any,
    stream: Any,
) -> Any:
    if stream is None and type(x) is type(parts[0]) is type(parts[1]) and library_of(x) == "torch":
        # By far the most calls: what their layouts say is looked up, and the rest is addresses.
        device = current_device()
        plan = _plan_of_tensors(
            kind, shape, groups, share, torch_layout(x), None if bias is None else torch_layout(bias),
            tuple([torch_layout(part) for part in parts]), device,
        )  # fmt: skip
        address = x.data_ptr()
        if plan is not None and address % 8 == 0:
            out = empty_tensor((x.shape[0], shape[1]), x.dtype, x, on := torch_stream(x))
            stored = [part.data_ptr() for part in parts] + [0] * (4 - len(parts))
            added = 0 if bias is None else bias.data_ptr()
            plan.enqueue(on, [*stored, *plan.tables, address, added, out.data_ptr()])
            return out
    caller = f"{kind}_linear_decode"
    floats = {"x": x} if bias is None else {"x": x, "bias": bias}
    one_library({**floats, **{f"weight part {i}": part for i, part in enumerate(parts)}})
    found = {name: described(name, value) for name, value in floats.items()}
    size = bind_axes({name: (value, {"x": "M K", "bias": "N"}[name]) for name, value in found.items()})
    weight = np.broadcast_to(np.int8(0), shape)
    bind_axes({"x": (found["x"], "M K"), "weight": (weight, "K N")})
    bind_axes({"weight": (weight, "K N"), **({} if bias is None else {"bias": (found["bias"], "N")})})
    if is_host(x):
        floats = dict(zip(found, floating(**found), strict=True))
        dtype = floats["x"].dtype.name
    else:
        dtype = one_format(floats)
    M, (K, N) = size["M"], shape
    if dtype not in KINDS:
        raise UnsupportedError(f"{caller}: inputs are {dtype}; the kernel takes {', '.join(KINDS)}")
    if M > MOST_TOKENS:
        raise UnsupportedError(f"{caller}: {M} tokens; the kernel takes up to {MOST_TOKENS}")
    on = stream_of(x, stream)
    out, result = allocated((M, N), dtype, x, on)
    if 0 in (M, N):
        return result()
    if K == 0:
        raise UnsupportedError(f"{caller}: K is 0")
    views = [view("weight", part, on) for part in parts]
    tokens = view("x", np.ascontiguousarray(floats["x"]) if is_host(x) else x, on)
    pitch = tokens.strides[0] if M > 1 else 2 * K
    if tokens.strides[1] != 2 or pitch % 8 or not 0 < pitch < 2**31 or tokens.address % 8:
        raise UnsupportedError(
            f"{caller}: x has strides of {tokens.strides} bytes: rows must be whole, at 8s"
        )
    added = 0
    if bias is not None:
        given = view("bias", np.ascontiguousarray(floats["bias"]) if is_host(x) else bias, on)
        if given.strides != (2,):
            raise UnsupportedError(f"{caller}: bias has strides of {given.strides} bytes; expected (2,)")
        wait_for([given], on)
        added = address_of(given)
    wait_for([*views, tokens], on)
    stored = [*map(address_of, views), 0, 0][:4]
    plan = plan_of(kind, KINDS[dtype], M, K, N, pitch, groups, share, 0 if SIMULATOR else current_device())
    plan.enqueue(on, [*stored, *plan.tables, address_of(tokens), added, address_of(out)])
    return result()


@functools.lru_cache(maxsize=1024)
def _plan_of_tensors(
    kind: str, shape: tuple[int, int], groups: int, share: int, x: Layout, bias: Layout | None,
    parts: tuple[Layout, ...], device: int,
) -> Plan | None:  # fmt: skip
    """Return the plan of a call with PyTorch's tensors; None if the general way has to say what is wrong."""
    sizes, strides, dtype, _ = x
    (K, N), format_ = shape, KINDS.get(str(dtype).removeprefix("torch."))
    given = (x, *parts) if bias is None else (x, bias, *parts)
    if any(layout[3] != device for layout in given) or format_ is None:
        return None
    if len(sizes) != 2 or not 0 < sizes[0] <= MOST_TOKENS or sizes[1] != K or 0 in shape or strides[1] != 1:
        return None
    if bias is not None and (tuple(bias[0]) != (N,) or bias[1] != (1,) or bias[2] != dtype):
        return None
    M = sizes[0]
    pitch = 2 * (strides[0] if M > 1 else K)
    if pitch % 8 or not 0 < pitch < 2**31:
        return None
    return plan_of(kind, format_, M, K, N, pitch, groups, share, device)
