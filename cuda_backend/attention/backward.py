"""The gradients of attention on a GPU: what callers see."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from cuda_backend.arrays import View, empty, is_host, view
from cuda_backend.attention import backward_portable, bias_portable
from cuda_backend.attention.call import Call, beside, features, numbers, prepare, reasons, wrong_format
from cuda_backend.attention.tiers import Tier, by_tier
from cuda_backend.attention.variant_backward import BackwardVariant
from cuda_backend.attention.variant_portable import Features, choose
from cuda_backend.launch import launch, shared_memory_bytes, stream_of
from cuda_backend.scratch import UNWRITTEN, ZERO, scratch
from refimpl.attention import AttentionGradients
from refimpl.attention.scores import AttentionOptions, backward_rule
from refimpl.errors import CapacityError, UnsupportedError
from refimpl.numerics import widen
from refimpl.validation import bind_axes, floating

__all__ = ["backward_variant", "flash_attention_vjp", "prepare_backward", "queue_backward", "supports"]


def flash_attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    do: Any,
    /,
    *,
    block_sizes: tuple[int, int] | None = None,
    sram: int | None = None,
    stream: Any = None,
    tier: Tier = "portable",
    deterministic: bool = False,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of attention, tile by tile, from what the forward pass returned.

    Parameters
    ----------
    q, k, v : array of float32, float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `cuda_backend.flash_attention`.
    o : array, shape (B, Tq, Hq, Dv)
        Its output, after dropout.
    lse : array of float, shape (B, Hq, Tq)
        Its log-sum-exp, natural logarithm, -inf where a query attends to no key; on the GPU float32.
    do : array, shape (B, Tq, Hq, Dv)
        Gradient of the output.  `o` and `do` have the dtype and library of `q`.
    block_sizes : tuple of int, optional
        (Br, Bc), queries and keys in a tile, each from 1 to 128.
    sram : int, optional
        As for `flash_attention`; Q, dO, K, V, P, dS and two statistics must fit.
    stream : int or stream object, optional
        As for `flash_attention`.
    tier : {"portable", "hopper", "auto"}
        Which kernels, as for `flash_attention`: those of any GPU, which take every option and float32, those
        of `flash_attention_vjp_hopper`, with `causal`, `scale`, `dropout_p` and an integer `rng` only, or the
        latter where they take the call.
    deterministic : bool
        Whether gradients must repeat bit for bit; the portable kernels' always do.
    **options
        Those of the forward call; with dropout the same integer seed or mask, which regenerates what was
        dropped.

    Returns
    -------
    AttentionGradients
        dq, dk, dv, and dbias if a bias was given, in the shapes of q, k, v and the bias, in `q`'s dtype and
        library.  GPU arrays are returned before the kernels have ended.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; DTypeError also if the inputs are of several libraries or devices.
    CapacityError
        If tiles of `block_sizes` exceed the GPU's shared memory.
    UnsupportedError
        With the reasons of `supports`, or if one query and one key exceed `sram`.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    Sums are in float32, P and dS are never rounded, and gradients repeat bit for bit: dK and dV of a key head
    are summed over its queries and query heads by one block, in order.  Q Kᵀ and dO Vᵀ are computed twice for
    that: ``14 B Hq Tq Tk D`` FLOPs for D = Dv in place of 10.  On the GPU the call needs ``B Hq Tq`` floats
    for itself, and with a bias ``B Hq Tq Tk``.  **Special cases**: rows with log-sum-exp -inf have no
    gradient; rows and keys beyond the lengths have none either, and are not read.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, appendix B.4, Algorithm 4.
    .. [2] Dao, 2023, arXiv:2307.08691, section 3.1.2: the log-sum-exp alone is enough.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> x = np.ones((1, 2, 1, 4), np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     out, lse = cuda_backend.flash_attention(x, x, x, return_lse=True)
    ...     assert flash_attention_vjp(x, x, x, out, lse, x).dv[0, :, 0, 0].tolist() == [1, 1]
    """

    def hopper() -> AttentionGradients:
        from cuda_backend.attention.call_backward_hopper import flash_attention_vjp_hopper

        further: dict[str, Any] = {**options, "deterministic": deterministic}
        if block_sizes is not None or sram is not None:
            further |= {"block_sizes": block_sizes, "sram": sram}
        return flash_attention_vjp_hopper(q, k, v, o, lse, do, stream=stream, **further)

    def portable() -> AttentionGradients:
        call, sums = prepare_backward(q, k, v, o, lse, do, options)
        refused = _reasons(call, sums)
        if refused:
            raise UnsupportedError("flash_attention_vjp: " + "; ".join(refused))
        on = stream_of(q, stream)
        wanted, optional = features(call, on, lse=False)
        variant = backward_variant(call, wanted, block_sizes, sram)
        inputs = {name: view(name, array, on) for name, array in call.tensors.items()}
        inputs["lse"] = view("lse", _as_float32(sums), on)
        like = call.tensors["q"]
        results = {name: empty(inputs[name].shape, call.dtype, like, on) for name in "qkv"}
        bias_axes = _bias_axes(call)
        if bias_axes is not None:
            results["bias"] = empty(bias_axes, call.dtype, like, on)
        outputs = {name: given for name, (given, _) in results.items()}
        queue_backward(call, variant, inputs, outputs, [*optional, *numbers(call.rule)], on)
        gradients = [result() for _, result in results.values()]
        if bias_axes is not None:
            bias: Any = call.options["bias"]
            gradients[3] = gradients[3].reshape(tuple(np.shape(bias)))
        return AttentionGradients(*gradients)

    return by_tier(tier, q, hopper, portable)


def backward_variant(
    call: Call, wanted: Features, block_sizes: tuple[int, int] | None, sram: int | None
) -> BackwardVariant:
    """Return the kernels for a call."""
    shape, memory = call.rule.shape, shared_memory_bytes()
    try:
        return choose(
            call.dtype,
            shape.D,
            shape.Dv,
            wanted,
            block_sizes=block_sizes,
            sram=sram,
            capacity=None if memory is None else memory // 4,
            form=BackwardVariant,
        )
    except CapacityError as error:
        if sram is None:
            raise
        # The reference only takes block sizes from it and goes on: the call is valid, and refused here.
        raise UnsupportedError(f"flash_attention_vjp: {error}") from None


def supports(
    q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, /, **options: Unpack[AttentionOptions]
) -> list[str]:
    """Return the reasons why `flash_attention_vjp` refuses a valid call; none if it takes it.

    Parameters
    ----------
    q, k, v, o, lse, do : array
        As for `flash_attention_vjp`.
    **options
        As for `flash_attention_vjp`.

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
    >>> x, lse = np.ones((1, 3, 2, 4)), np.zeros((1, 2, 3))
    >>> supports(x, x, x, x, lse, x)
    ['inputs are float64; the kernel takes float32, float16, bfloat16']
    """
    return _reasons(*prepare_backward(q, k, v, o, lse, do, options))


def prepare_backward(
    q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, options: AttentionOptions
) -> tuple[Call, Any]:
    """Check a call as the reference does; return it, and the log-sum-exp, on the host as an array."""
    call = prepare({"q": q, "k": k, "v": v, "o": o, "do": do}, options, backward_rule)
    statistic = beside("lse", lse, q)
    if is_host(lse):
        (lse,) = (statistic,) = floating(lse=lse)
    axes = {"q": "B Tq Hq D", "v": "B Tk Hkv Dv", "o": "B Tq Hq Dv", "do": "B Tq Hq Dv"}
    arrays = {name: (call.stubs[name], names) for name, names in axes.items()}
    bind_axes({**arrays, "lse": (statistic, "B Hq Tq")})
    return call, lse


def _reasons(call: Call, lse: Any) -> list[str]:
    return reasons(call) + wrong_format("lse", lse, ("float32",))


def _as_float32(lse: Any) -> Any:
    return widen(lse).astype(np.float32, copy=False) if is_host(lse) else lse


def _bias_axes(call: Call) -> tuple[int, ...] | None:
    """Return the shape of the bias with four axes, or None if there is no bias."""
    bias: Any = call.options.get("bias")
    if bias is None:
        return None
    axes = tuple(np.shape(bias))
    return (1,) * (4 - len(axes)) + axes


def queue_backward(
    call: Call,
    variant: BackwardVariant,
    inputs: dict[str, View],
    outputs: dict[str, View],
    options: list[Any],
    stream: int,
) -> None:
    """Queue the kernels: dQ and rowsum(dO ∘ O) before dK and dV, which read it, and the bias last."""
    shape = call.rule.shape
    rows, scores = (shape.B, shape.Hq, shape.Tq), (shape.B, shape.Hq, shape.Tq, shape.Tk)
    q, k, v, o, lse, do = (inputs[name] for name in ("q", "k", "v", "o", "lse", "do"))
    kernels = backward_portable.build(variant)
    resources = {"threads": variant.threads, "shared_bytes": variant.shared_bytes, "stream": stream}
    with (
        scratch(rows, stream, fill=UNWRITTEN) as delta,
        scratch(scores if "bias" in outputs else (0,) * 4, stream, fill=ZERO) as dscores,
    ):
        blocks = shape.B * shape.Hq * -(-shape.Tq // variant.Br)
        if blocks:
            arguments = [q, k, v, o, lse, do, outputs["q"], delta, dscores, *options]
            launch(kernels.queries, arguments, blocks=blocks, **resources)
        blocks = shape.B * shape.Hkv * -(-shape.Tk // variant.Bc)
        if blocks:
            arguments = [q, k, v, lse, do, delta, outputs["k"], outputs["v"], *options]
            launch(kernels.keys, arguments, blocks=blocks, **resources)
        if "bias" in outputs:
            _queue_bias(dscores, outputs["bias"], call.dtype, stream)


def _queue_bias(dscores: View, dbias: View, dtype: str, stream: int) -> None:
    threads = bias_portable.THREADS
    blocks = -(-int(np.prod(dbias.shape)) // threads)
    if blocks:
        arguments = [dscores, dbias]
        kernel = bias_portable.build(dtype)
        launch(kernel, arguments, blocks=blocks, threads=threads, shared_bytes=0, stream=stream)
