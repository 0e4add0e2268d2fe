"""Attention on a GPU: what callers see, and what stands between them and a kernel."""

from __future__ import annotations

from typing import Any, Unpack

from cuda_backend.arrays import absent, empty, view
from cuda_backend.attention import forward_portable
from cuda_backend.attention.call import Call, features, numbers, prepare, reasons
from cuda_backend.attention.tiers import Tier, by_tier
from cuda_backend.attention.variant_portable import Features, Variant, choose
from cuda_backend.launch import launch, shared_memory_bytes, stream_of
from refimpl.attention import AttentionOutput
from refimpl.attention.scores import AttentionOptions
from refimpl.errors import UnsupportedError

__all__ = [
    "flash_attention",
    "forward_variant",
    "run_forward",
    "scaled_dot_product_attention",
    "supports",
]


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
    tier: Tier = "portable",
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
    tier : {"portable", "hopper", "auto"}
        Which kernels.  "portable" ones run on any GPU, take every option and float32, and are slow; "hopper"
        are those of `flash_attention_hopper`, for the tensor cores of that GPU, with `causal`, `scale`,
        `dropout_p` and `rng` only; what a named tier cannot do is an error that says so.  "auto"
        is "hopper" for float16 and bfloat16 on such a GPU, where that takes the call, else "portable", with a
        `refimpl.errors.SlowPathWarning` that says why, once for each reason.
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
        With the reasons of `supports`, or those of the Hopper kernels.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    Of the portable kernels (`flash_attention_hopper` says what differs there): sums and the softmax are in
    float32, P is never rounded to `q`'s dtype, and exp is the accurate one.  Results repeat bit for bit.
    **Special cases**: tiles after the last key that the causal mask or a length allows are not read, so NaN
    there stays unseen.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, Algorithm 1; Dao, 2023, arXiv:2307.08691, Algorithm 1.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> x = np.ones((1, 3, 2, 4), np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert flash_attention(x, x, x, causal=True).shape == (1, 3, 2, 4)
    """

    def hopper() -> Any:
        from cuda_backend.attention.call_hopper import flash_attention_hopper

        further: dict[str, Any] = dict(options)
        if block_sizes is not None or sram is not None:
            further |= {"block_sizes": block_sizes, "sram": sram}
        return flash_attention_hopper(q, k, v, return_lse=return_lse, stream=stream, **further)

    def portable() -> Any:
        call = prepare({"q": q, "k": k, "v": v}, options)
        refused = reasons(call)
        if refused:
            raise UnsupportedError("flash_attention: " + "; ".join(refused))
        on = stream_of(q, stream)
        wanted, optional = features(call, on, lse=return_lse)
        variant = forward_variant(call, wanted, block_sizes, sram)
        return run_forward(call, variant, optional, on)

    return by_tier(tier, q, hopper, portable)


def forward_variant(
    call: Call, wanted: Features, block_sizes: tuple[int, int] | None, sram: int | None
) -> Variant:
    """Return the kernel for a call."""
    memory = shared_memory_bytes()
    return choose(
        call.dtype,
        call.rule.shape.D,
        call.rule.shape.Dv,
        wanted,
        block_sizes=block_sizes,
        sram=sram,
        capacity=None if memory is None else memory // 4,
    )


def run_forward(call: Call, variant: Variant, optional: list[Any], on: int) -> Any:
    """Queue the kernel on a stream; return the output, with the log-sum-exp if the variant has it."""
    shape, return_lse = call.rule.shape, variant.features.lse
    inputs = [view(name, array, on) for name, array in call.tensors.items()]
    like = call.tensors["q"]
    out, out_result = empty((shape.B, shape.Tq, shape.Hq, shape.Dv), call.dtype, like, on)
    lse, lse_result = absent("float32", 3), None
    if return_lse:
        lse, lse_result = empty((shape.B, shape.Hq, shape.Tq), "float32", like, on)
    blocks = shape.B * shape.Hq * -(-shape.Tq // variant.Br)
    if blocks:
        launch(
            forward_portable.build(variant),
            [*inputs, out, lse, *optional, *numbers(call.rule)],
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
    >>> import numpy as np, cuda_backend
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
    >>> import numpy as np
    >>> x = np.ones((1, 3, 2, 4))
    >>> supports(x, x, x)
    ['inputs are float64; the kernel takes float32, float16, bfloat16']
    """
    if options.get("rng") is not None:  # asking must not draw from a generator
        options = {**options, "rng": 0}
    return reasons(prepare({"q": q, "k": k, "v": v}, options))
