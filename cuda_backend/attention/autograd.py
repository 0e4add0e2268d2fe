"""Attention as a PyTorch operator with a gradient: `torch.compile` sees one operator, autograd another.

PyTorch is an argument here: `cuda_backend.torch_ops` alone imports it.  Tensors on the GPU go to the kernels,
those of the host to the simulator, if this process has it and it takes their format, or to the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import SIMULATOR
from cuda_backend.attention.tiers import known_tier
from cuda_backend.formats import FORMATS
from refimpl.errors import DTypeError

__all__ = [
    "SCHEMA",
    "alike",
    "as_array",
    "as_tensor",
    "register",
    "simulated",
    "statistic_of",
]

OPTIONS = "str causal, float? scale, float dropout_p, int seed, bool deterministic, str tier"
SAVED = "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
SCHEMA = f"(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = f"(Tensor do, {SAVED}, {OPTIONS}) -> (Tensor, Tensor, Tensor)"


@functools.cache
def register(torch: Any) -> Callable[..., Any]:
    """Register ``frugal::attention`` and ``frugal::attention_backward``; return the former.

    The operator takes q, k, v as [B, T, H, D] and `OPTIONS`, and returns the output and the log-sum-exp,
    which has no gradient.  `causal` is "" for no mask; without dropout `seed` says nothing.
    """

    def forward(q: Any, k: Any, v: Any, *options: Any) -> Any:
        from cuda_backend.attention.forward import flash_attention
        from refimpl.attention import flash_attention as reference

        chosen = _chosen(*options)
        known_tier(options[5])
        alike(q, k, v)
        if q.is_cuda:
            found: Any = flash_attention(q, k, v, return_lse=True, tier=options[5], **chosen)
            return found.out.contiguous(), found.lse
        arrays = [as_array(torch, x) for x in (q, k, v)]
        compute: Any = flash_attention if simulated(q) else reference
        out, lse = compute(*arrays, return_lse=True, **chosen)
        return as_tensor(torch, out, q), torch.from_numpy(np.ascontiguousarray(lse)).to(
            statistic_of(torch, q)
        )

    def backward(do: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *options: Any) -> Any:
        from cuda_backend.attention.backward import flash_attention_vjp
        from refimpl.attention import flash_attention_vjp as reference

        chosen, do = _chosen(*options), do.contiguous()
        if q.is_cuda:
            how: dict[str, Any] = {"deterministic": options[4], "tier": options[5]}
            found: Any = flash_attention_vjp(q, k, v, out, lse, do, **how, **chosen)
            return tuple(x.contiguous() for x in found[:3])
        arrays = [as_array(torch, x) for x in (q, k, v, out, lse, do)]
        compute: Any = flash_attention_vjp if simulated(q) else reference
        return tuple(as_tensor(torch, x, q) for x in compute(*arrays, **chosen)[:3])

    def forward_shapes(q: Any, _k: Any, v: Any, *options: Any) -> Any:
        known_tier(options[5])
        batch, tq, heads, _ = q.shape
        lse = q.new_empty((batch, heads, tq), dtype=statistic_of(torch, q))
        return q.new_empty((batch, tq, heads, v.shape[3])), lse

    def backward_shapes(_do: Any, q: Any, k: Any, v: Any, *_others: Any) -> Any:
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, *ctx.options = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)

    def gradient(ctx: Any, do: Any, _dlse: Any) -> Any:
        found = backward_operator(do, *ctx.saved_tensors, *ctx.options)
        return (*found, *[None] * len(ctx.options))

    custom = torch.library.custom_op
    operator = custom("frugal::attention", forward, mutates_args=(), schema=SCHEMA)
    backward_operator = custom(
        "frugal::attention_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA
    )
    operator.register_fake(forward_shapes)
    backward_operator.register_fake(backward_shapes)
    operator.register_autograd(gradient, setup_context=keep)
    registered: Callable[..., Any] = operator
    return registered


def _chosen(
    causal: str, scale: float | None, dropout_p: float, seed: int, _deterministic: bool, _tier: str
) -> dict[str, Any]:
    """Return options as the reference takes them."""
    chosen: dict[str, Any] = {"causal": causal or False, "scale": scale}
    if dropout_p:
        chosen |= {"dropout_p": dropout_p, "rng": seed % 2**64}
    return chosen


def alike(q: Any, k: Any, v: Any) -> None:
    """Check that tensors are of one floating format: the operators say that the output has that of `q`.

    Raises
    ------
    DTypeError
        If they are not.
    """
    found = {name: str(x.dtype).removeprefix("torch.") for name, x in zip("qkv", (q, k, v), strict=True)}
    for name, dtype in found.items():
        if dtype not in ("float64", *FORMATS):
            raise DTypeError(f"{name}: expected float64, {', '.join(FORMATS)}, got {dtype}")
    if len(set(found.values())) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
        raise DTypeError(f"q, k and v: expected one dtype, got {given}")


def simulated(tensor: Any) -> bool:
    """Return whether a tensor of the host goes to the simulator."""
    return SIMULATOR and str(tensor.dtype).removeprefix("torch.") in FORMATS


def statistic_of(torch: Any, q: Any) -> Any:
    """Return the format of the log-sum-exp."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def as_array(torch: Any, tensor: Any) -> Any:
    """Return a tensor of the host as an array."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        from refimpl.testing import dtype_named

        return tensor.contiguous().view(torch.int16).numpy().view(dtype_named("bfloat16"))
    return tensor.numpy()


def as_tensor(torch: Any, array: Any, like: Any) -> Any:
    """Return an array as a tensor of the host, in the format of `like`."""
    array = np.ascontiguousarray(array)
    if like.dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array).to(like.dtype)
