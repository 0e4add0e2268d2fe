"""Attention on a GPU: what callers see, and what stands between them and a kernel."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import numpy as np

from cuda_backend.arrays import (
    View,
    absent,
    broadcast,
    dtype_name,
    empty,
    is_host,
    library_of,
    stub,
    view,
)
from cuda_backend.attention import forward_portable
from cuda_backend.attention.variant_portable import LARGEST_WIDTH, Features, choose
from cuda_backend.formats import FORMATS
from cuda_backend.launch import launch, shared_memory_bytes, stream_of
from refimpl.attention import AttentionOutput
from refimpl.attention.scores import AttentionOptions, ScoreRule, score_rule
from refimpl.errors import DTypeError, UnsupportedError
from refimpl.numerics import widen
from refimpl.random import drop_threshold
from refimpl.validation import floating

__all__ = ["flash_attention", "scaled_dot_product_attention", "supports"]

MOST_BLOCKS = 2**31 - 1
TAKEN = {
    "bias": FORMATS,
    "alibi_slopes": ("float32",),
    "q_lengths": ("int32", "int64"),
    "k_lengths": ("int32", "int64"),
}
ARRAYS = ("attn_mask", "bias", "alibi_slopes", "q_lengths", "k_lengths", "dropout_mask")


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    return_lse: bool = False,
    block_sizes: tuple[int, int] | None = None,
    sram: int | None = None,
    stream: Any = None,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Return scaled dot-product attention, computed tile by tile in shared memory.

    Parameters
    ----------
    q, k, v : array of float32, float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `refimpl.attention.flash_attention`; D and Dv up to 256.  All three NumPy arrays, which are
        copied to the GPU and back, or all three PyTorch, CuPy, JAX or Numba arrays on the current GPU, which
        are read where they lie, with any strides.
    return_lse : bool
        Also return the log-sum-exp of each row, float32, shape (B, Hq, Tq).
    block_sizes : tuple of int, optional
        (Br, Bc), queries and keys in a tile, each from 1 to 128.
    sram : int, optional
        Floats of shared memory for all tiles together; sets the block sizes as in Algorithm 1, line 1, halved
        until Q, K or V, P and the row maxima fit.  Default: 64 x 64, if the GPU has room for it; 8 x 8 in the
        simulator, which has no limit.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `q` works on.
    **options
        Those of `refimpl.attention.scaled_dot_product_attention`.  Arrays among them may lie on the host or
        beside `q`.  Lengths on the GPU are clamped to [0, T] rather than checked.

    Returns
    -------
    array or AttentionOutput
        As the reference, in `q`'s dtype and library.  GPU arrays are returned before the kernel has ended, as
        is usual on a stream.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; DTypeError also if the inputs are of several libraries or devices.
    CapacityError
        If tiles of `block_sizes` exceed the GPU's shared memory, or one query and key exceed `sram`.
    UnsupportedError
        With the reasons of `supports`.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    Sums and the softmax are in float32, P is never rounded to `q`'s dtype, and exp is the accurate one.
    Results repeat bit for bit.  **Special cases**: tiles after the last key that the causal mask or a length
    allows are not read, so NaN there stays unseen.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, Algorithm 1; Dao, 2023, arXiv:2307.08691, Algorithm 1.

    Examples
    --------
    >>> import cuda_backend
    >>> x = np.ones((1, 3, 2, 4), np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert flash_attention(x, x, x, causal=True).shape == (1, 3, 2, 4)
    """
    call = _call(q, k, v, options)
    reasons = _reasons(call)
    if reasons:
        raise UnsupportedError("flash_attention: " + "; ".join(reasons))
    on = stream_of(q, stream)
    shape = call.rule.shape
    features, arrays = _features(call, return_lse, on)
    memory = shared_memory_bytes()
    variant = choose(
        call.dtype,
        shape.D,
        shape.Dv,
        features,
        block_sizes=block_sizes,
        sram=sram,
        capacity=None if memory is None else memory // 4,
    )
    inputs = [view(name, array, on) for name, array in zip("qkv", call.tensors, strict=True)]
    out, out_result = empty((shape.B, shape.Tq, shape.Hq, shape.Dv), call.dtype, call.tensors[0], on)
    lse, lse_result = absent("float32", 3), None
    if return_lse:
        lse, lse_result = empty((shape.B, shape.Hq, shape.Tq), "float32", call.tensors[0], on)
    blocks = shape.B * shape.Hq * -(-shape.Tq // variant.Br)
    if blocks:
        rule = call.rule
        numbers = (
            np.float32(rule.scale),
            np.float32(rule.softcap or 0.0),
            np.uint64(rule.seed),
            np.uint64(drop_threshold(rule.dropout_p)),
            np.float32(1.0 / (1.0 - rule.dropout_p)),
        )
        launch(
            forward_portable.build(variant),
            [*inputs, out, lse, *arrays, *numbers],
            blocks=blocks,
            threads=variant.threads,
            shared_bytes=variant.shared_bytes,
            stream=on,
        )
    return out_result() if lse_result is None else AttentionOutput(out_result(), lse_result())


def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    return_lse: bool = False,
    stream: Any = None,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Return ``softmax(scale * q kᵀ + bias) v`` for each head: `flash_attention` with tiles of its choice.

    Parameters
    ----------
    q, k, v : array of float32, float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `flash_attention`.
    return_lse : bool
        Also return the log-sum-exp of each row, float32, shape (B, Hq, Tq).
    stream : int or stream object, optional
        As for `flash_attention`.
    **options
        Those of `refimpl.attention.scaled_dot_product_attention`.

    Returns
    -------
    array or AttentionOutput
        As `flash_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `flash_attention`.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, eq. 1.

    Examples
    --------
    >>> import cuda_backend
    >>> q, k = np.ones((1, 1, 1, 8), np.float32), np.ones((1, 2, 1, 8), np.float32)
    >>> v = np.array([2, 4], np.float32).reshape(1, 2, 1, 1)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert scaled_dot_product_attention(q, k, v).item() == 3.0
    """
    return flash_attention(q, k, v, return_lse=return_lse, stream=stream, **options)


def supports(q: Any, k: Any, v: Any, /, **options: Unpack[AttentionOptions]) -> list[str]:
    """Return the reasons why `flash_attention` refuses a valid call; none if it takes it.

    Parameters
    ----------
    q, k, v : array
        As for `flash_attention`.
    **options
        As for `flash_attention`.

    Returns
    -------
    list of str
        Reasons in words.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the reference would refuse the call too.

    Examples
    --------
    >>> x = np.ones((1, 3, 2, 4))
    >>> supports(x, x, x)
    ['inputs are float64; the kernel takes float32, float16, bfloat16']
    """
    if options.get("rng") is not None:  # asking must not draw from a generator
        options = {**options, "rng": 0}
    return _reasons(_call(q, k, v, options))


class _Call(NamedTuple):
    """A validated call: q, k, v, their dtype, the options as given and as the reference reads them."""

    tensors: tuple[Any, Any, Any]
    dtype: str
    rule: ScoreRule
    options: AttentionOptions


def _call(q: Any, k: Any, v: Any, options: AttentionOptions) -> _Call:
    """Check a call as the reference does, GPU arrays by their shapes alone."""
    tensors = {"q": q, "k": k, "v": v}
    given = {name: library_of(value) for name, value in tensors.items()}
    if len(set(given.values())) > 1:
        raise DTypeError(f"q, k and v: expected arrays of one library, got {given}")
    checked: dict[str, Any] = {}
    for name, value in options.items():
        on_gpu = name in ARRAYS and value is not None and not is_host(value)
        if on_gpu and library_of(value) != given["q"]:
            taken = " or ".join(sorted({"numpy", given["q"]}))
            raise DTypeError(f"{name}: expected an array of {taken}, got one of {library_of(value)}")
        checked[name] = stub(name, value) if on_gpu else value
    if is_host(q):
        arrays = floating(**tensors)
        dtype = arrays[0].dtype.name
        return _Call((arrays[0], arrays[1], arrays[2]), dtype, score_rule(*arrays, **checked), options)
    stubs = [stub(name, value) for name, value in tensors.items()]
    dtypes = {dtype_name(name, value) for name, value in tensors.items()}
    if len(dtypes) > 1:
        raise DTypeError(f"q, k and v: expected one dtype, got {', '.join(sorted(dtypes))}")
    return _Call((q, k, v), dtypes.pop(), score_rule(*stubs, **checked), options)


def _reasons(call: _Call) -> list[str]:
    shape, found = call.rule.shape, []
    if call.dtype not in FORMATS:
        found.append(f"inputs are {call.dtype}; the kernel takes {', '.join(FORMATS)}")
    for axis, width in (("D", shape.D), ("Dv", shape.Dv)):
        if width > LARGEST_WIDTH:
            found.append(f"{axis} is {width}; the kernel takes up to {LARGEST_WIDTH}")
    for name, taken in TAKEN.items():
        value = call.options.get(name)
        if value is not None and not is_host(value) and dtype_name(name, value) not in taken:
            found.append(
                f"{name} on the GPU is {dtype_name(name, value)}; the kernel takes {', '.join(taken)}"
            )
    if shape.B * shape.Hq * shape.Tq > MOST_BLOCKS:
        found.append(f"B * Hq * Tq exceeds {MOST_BLOCKS}")
    return found


def _features(call: _Call, return_lse: bool, stream: int) -> tuple[Features, list[View]]:
    """Return what the kernel must handle, and its optional arrays in the order of its signature."""
    rule, options = call.rule, call.options
    full = (rule.shape.B, rule.shape.Hq, rule.shape.Tq, rule.shape.Tk)

    def option(name: str, kind: str, ndim: int, host: Any) -> tuple[str, View]:
        """Return the dtype of an optional array, "" if it is absent, and the array as the kernel sees it."""
        value = options.get(name)
        if value is None:
            return "", absent(kind, ndim)
        given = view(name, host if is_host(value) else value, stream)
        return given.dtype, broadcast(given, full) if ndim == 4 else given

    mask, mask_view = option("attn_mask", "bool", 4, options.get("attn_mask"))
    bias, bias_view = option("bias", "float32", 4, _as_float32(options.get("bias")))
    alibi, slopes_view = option("alibi_slopes", "float32", 1, rule.slopes)
    q_lengths, q_view = option("q_lengths", "int64", 1, rule.q_lengths)
    k_lengths, k_view = option("k_lengths", "int64", 1, rule.k_lengths)
    kept, kept_view = option("dropout_mask", "bool", 4, options.get("dropout_mask"))
    features = Features(
        causal=("bottom_right" if options.get("causal") == "bottom_right" else "top_left") * rule.causal,
        mask=bool(mask),
        bias=bias,
        alibi=bool(alibi),
        softcap=rule.softcap is not None,
        q_lengths=q_lengths,
        k_lengths=k_lengths,
        dropout="mask" if kept else "philox" if rule.dropout_p else "",
        lse=return_lse,
    )
    return features, [mask_view, bias_view, slopes_view, q_view, k_view, kept_view]


def _as_float32(bias: Any) -> Any:
    """Return a bias on the host as float32, before it is broadcast."""
    if bias is None or not is_host(bias):
        return bias
    (array,) = floating(bias=bias)
    return widen(array).astype(np.float32, copy=False)
