"""Attention over packed sequences as a PyTorch operator with a gradient, in the manner of `autograd`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend.attention.autograd import alike, as_array, as_tensor, simulated, statistic_of

__all__ = ["SCHEMA", "register"]

STARTS, OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k",
    ("str causal, int left, int right, float? softcap, float? scale"),
)
SCHEMA = f"(Tensor q, Tensor k, Tensor v, {STARTS}, {OPTIONS}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor do, Tensor q, Tensor k, Tensor v, {STARTS}, Tensor out, Tensor lse, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor)"
)


@functools.cache
def register(torch: Any) -> Callable[..., Any]:
    """Register ``frugal::varlen_attention`` and its backward operator; return the former.

    The operator takes what `cuda_backend.varlen_attention` takes, `causal` as "" for no mask and the two
    sides of the window, and returns the output and the log-sum-exp, which has no gradient.
    """

    def forward(q: Any, k: Any, v: Any, starts: Any, key_starts: Any, *options: Any) -> Any:
        from cuda_backend.attention.varlen import varlen_attention
        from refimpl.attention import varlen_attention as reference

        chosen = _chosen(*options)
        alike(q, k, v)
        if q.is_cuda:
            found: Any = varlen_attention(q, k, v, starts, key_starts, return_lse=True, tier="auto", **chosen)
            return found.out.contiguous(), found.lse.contiguous()
        arrays = [as_array(torch, x) for x in (q, k, v, starts, key_starts)]
        compute: Any = varlen_attention if simulated(q) else reference
        out, lse = compute(*arrays, return_lse=True, **chosen)
        lse = torch.from_numpy(np.ascontiguousarray(lse)).to(statistic_of(torch, q))
        return as_tensor(torch, out, q), lse

    def backward(
        do: Any, q: Any, k: Any, v: Any, starts: Any, key_starts: Any, out: Any, lse: Any, *options: Any
    ) -> Any:
        from cuda_backend.attention.varlen import varlen_attention_vjp
        from refimpl.attention import varlen_attention_vjp as reference

        chosen, do = _chosen(*options), do.contiguous()
        if q.is_cuda:
            tensors = q, k, v, starts, key_starts, out, lse, do
            found: Any = varlen_attention_vjp(*tensors, tier="auto", **chosen)
            return tuple(x.contiguous() for x in found[:3])
        arrays: Any = [as_array(torch, x) for x in (q, k, v, starts, key_starts, do)]
        if simulated(q):
            arrays[5:] = (as_array(torch, x) for x in (out, lse, do))
            found = varlen_attention_vjp(*arrays, **chosen)
        else:
            found = reference(*arrays, **chosen)
        return tuple(as_tensor(torch, x, q) for x in found[:3])

    def forward_shapes(q: Any, _k: Any, v: Any, *_others: Any) -> Any:
        total, heads, _ = q.shape
        return q.new_empty((total, heads, v.shape[2])), q.new_empty(
            (heads, total), dtype=statistic_of(torch, q)
        )

    def backward_shapes(_do: Any, q: Any, k: Any, v: Any, *_others: Any) -> Any:
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        tensors, ctx.options = inputs[:5], inputs[5:]
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx: Any, do: Any, _dlse: Any) -> Any:
        found = backward_operator(do, *ctx.saved_tensors, *ctx.options)
        return (*found, *[None] * (2 + len(ctx.options)))

    custom = torch.library.custom_op
    operator = custom("frugal::varlen_attention", forward, mutates_args=(), schema=SCHEMA)
    backward_operator = custom(
        "frugal::varlen_attention_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA
    )
    operator.register_fake(forward_shapes)
    backward_operator.register_fake(backward_shapes)
    operator.register_autograd(gradient, setup_context=keep)
    registered: Callable[..., Any] = operator
    return registered


def _chosen(causal: str, left: int, right: int, softcap: float | None, scale: float | None) -> dict[str, Any]:
    return {"causal": causal or False, "window_size": (left, right), "softcap": softcap, "scale": scale}
