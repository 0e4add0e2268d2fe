"""Attention with masks, biases and a softcap as a PyTorch operator with a gradient, as in `autograd`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend.attention.attend import checked, forward_on_host, gradients, gradients_on_host
from cuda_backend.attention.attend import forward as on_gpu
from cuda_backend.attention.autograd import alike, as_array, as_tensor, statistic_of

__all__ = ["SCHEMA", "register"]

MASKS = "Tensor? attn_mask, Tensor? bias, Tensor? seed"
OPTIONS = "str causal, int? window, float? softcap, float? scale, float dropout_p"
SCHEMA = f"(Tensor q, Tensor k, Tensor v, {MASKS}, {OPTIONS}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor do, Tensor q, Tensor k, Tensor v, {MASKS}, Tensor out, Tensor lse, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@functools.cache
def register(torch: Any) -> Callable[..., Any]:
    """Register ``frugal::masked_attention`` and its backward operator; return the former.

    The operator takes q, k, v as [B, T, H, D], a mask of truth values and a bias, `causal` as "" for no mask,
    a window of keys, and the seed of the dropout, a tensor that `torch.compile` need not read; it returns the
    output and the log-sum-exp, which has no gradient.
    """

    def forward(q: Any, k: Any, v: Any, mask: Any, bias: Any, seed: Any, *options: Any) -> Any:
        alike(q, k, v)
        chosen = checked(q, k, _chosen(mask, bias, seed, *options))
        if q.is_cuda:
            found = on_gpu(q, k, v, chosen)
            return found.out.contiguous(), found.lse.contiguous()
        given = _as_arrays(torch, chosen)
        out, lse = forward_on_host(as_array(torch, q), as_array(torch, k), as_array(torch, v), given)
        lse = torch.from_numpy(np.ascontiguousarray(lse)).to(statistic_of(torch, q))
        return as_tensor(torch, out, q), lse

    def backward(do: Any, q: Any, k: Any, v: Any, mask: Any, bias: Any, seed: Any, *rest: Any) -> Any:
        out, lse, *options = rest
        chosen = checked(q, k, _chosen(mask, bias, seed, *options))
        tensors = q, k, v, out, lse, do.contiguous()
        nothing = q.new_empty(0)
        if q.is_cuda:
            found = gradients(tensors, chosen)
            dbias = nothing if found.dbias is None else found.dbias.contiguous()
            return (*(x.contiguous() for x in found[:3]), dbias)
        arrays = tuple(as_array(torch, x) for x in tensors)
        found = gradients_on_host(arrays, _as_arrays(torch, chosen))
        dbias = nothing if found.dbias is None else as_tensor(torch, found.dbias, bias)
        return (*(as_tensor(torch, x, q) for x in found[:3]), dbias)

    def forward_shapes(q: Any, _k: Any, v: Any, *_others: Any) -> Any:
        batch, tq, heads, _ = q.shape
        lse = q.new_empty((batch, heads, tq), dtype=statistic_of(torch, q))
        return q.new_empty((batch, tq, heads, v.shape[3])), lse

    def backward_shapes(_do: Any, q: Any, k: Any, v: Any, _mask: Any, bias: Any, *_others: Any) -> Any:
        dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
        return (*(x.new_empty(x.shape) for x in (q, k, v)), dbias)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, mask, bias, seed, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, mask, bias, seed, *output)
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx: Any, do: Any, _dlse: Any) -> Any:
        *found, dbias = backward_operator(do, *ctx.saved_tensors, *ctx.options)
        bias = dbias if ctx.needs_input_grad[4] else None
        return (*found, None, bias, None, *[None] * len(ctx.options))

    custom = torch.library.custom_op
    operator = custom("frugal::masked_attention", forward, mutates_args=(), schema=SCHEMA)
    backward_operator = custom(
        "frugal::masked_attention_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA
    )
    operator.register_fake(forward_shapes)
    backward_operator.register_fake(backward_shapes)
    operator.register_autograd(gradient, setup_context=keep)
    registered: Callable[..., Any] = operator
    return registered


def _chosen(
    mask: Any,
    bias: Any,
    seed: Any,
    causal: str,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    dropout_p: float,
) -> dict[str, Any]:
    """Return options as the reference takes them, those that are there."""
    chosen = {
        "attn_mask": mask, "bias": bias, "causal": causal or None, "window": window, "softcap": softcap,
        "scale": scale,
    }  # fmt: skip
    if dropout_p:
        chosen |= {"dropout_p": dropout_p, "rng": int(seed) % 2**64}
    return {name: value for name, value in chosen.items() if value is not None}


def _as_arrays(torch: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {name: as_array(torch, x) if hasattr(x, "is_cuda") else x for name, x in options.items()}
