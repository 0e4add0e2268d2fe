"""Attention of PyTorch tensors with any options of the reference, and a gradient: by what runs it best."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from cuda_backend.attention.autograd import as_array
from refimpl.attention import mods
from refimpl.errors import UnsupportedError

__all__ = ["as_functions", "attend", "decodes"]

LONG = 256  # keys from which a single query is worth parts


def attend(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    """Return attention with `options` of `refimpl.attention.scaled_dot_product_attention`.

    Parameters
    ----------
    q, k, v : torch.Tensor, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        On the GPU for the kernels, on the host for the references.
    options : dict
        Arrays as tensors; the seed of dropout as an integer.

    Returns
    -------
    torch.Tensor
        With gradients in q, k, v and, if there is one, the bias.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError
        As the functions that compute it.
    """
    torch: Any = sys.modules["torch"]  # whoever has a tensor has imported it
    options = {name: value for name, value in options.items() if value is not None}
    differentiable = (q, k, v, options.get("bias"))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        bias = options.pop("bias", None)
        return _function(torch).apply(q, k, v, bias, options)
    if decodes(q, k, options):
        return _decoded(torch, q, k, v, options)
    return (_on_gpu if q.is_cuda else _on_host)(torch, q, k, v, options)[0]


def decodes(q: Any, k: Any, options: dict[str, Any]) -> bool:
    """Return whether a call is a decode step: a query that sees all of a long cache, as it is."""
    return q.shape[1] == 1 and k.shape[1] >= LONG and not set(options) - {"scale"}


def as_functions(options: dict[str, Any]) -> dict[str, Any] | None:
    """Return options as those of `flexible_attention`, whose kernels skip what a mask leaves dead.

    None if a call has neither a mask nor a softcap, or something that is no function of one score.

    Examples
    --------
    >>> sorted(as_functions({"causal": "top_left", "softcap": 2.0}))
    ['mask_mod', 'scale', 'score_mod', 'score_mod_vjp']
    >>> as_functions({"causal": "top_left"}), as_functions({"softcap": 2.0, "dropout_p": 0.5})
    (None, None)
    """
    mask, cap, causal = (options.get(name) for name in ("attn_mask", "softcap", "causal"))
    said = set(options) <= {"scale", "causal", "attn_mask", "softcap"} and causal in (None, "top_left")
    if not said or (mask is None and cap is None) or (mask is not None and causal):
        return None
    found: dict[str, Any] = {"scale": options.get("scale")}
    if mask is not None:
        found |= {"mask_mod": mods.given(mask.shape[0] > 1, mask.shape[1] > 1), "aux": (mask,)}
    elif causal:
        found["mask_mod"] = mods.causal
    if cap is not None:
        found |= {"score_mod": mods.softcap(cap), "score_mod_vjp": mods.softcap_vjp(cap)}
    return found


@functools.cache
def _function(torch: Any) -> Any:
    """Return the autograd function; one class for all options."""

    class Attention(torch.autograd.Function):  # type: ignore[misc]
        """Attention; see `attend`."""

        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, options: dict[str, Any]) -> Any:
            """Compute the output, and keep what the gradients need."""
            run = _on_gpu if q.is_cuda else _on_host
            out, lse = run(torch, q, k, v, _with_bias(options, bias))
            ctx.save_for_backward(q, k, v, bias, out, lse)
            ctx.options = options
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, do: Any) -> Any:
            """Return the gradients of q, k, v and the bias."""
            q, k, v, bias, out, lse = ctx.saved_tensors
            run = _on_gpu_vjp if q.is_cuda else _on_host_vjp
            found = run(torch, (q, k, v, out, lse, do.contiguous()), _with_bias(ctx.options, bias))
            return (*found[:3], found[3] if ctx.needs_input_grad[3] else None, None)

    return Attention


def _with_bias(options: dict[str, Any], bias: Any) -> dict[str, Any]:
    return options if bias is None else {**options, "bias": bias}


def _decoded(torch: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    from refimpl import attention as reference

    if q.is_cuda:
        import cuda_backend

        return cuda_backend.split_kv_attention(q, k, v, **options)
    arrays = (_host(torch, x) for x in (q, k, v))
    return q.new_tensor(reference.split_kv_attention(*arrays, splits=2, **options))


def _on_gpu(_torch: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return output and log-sum-exp by the fastest kernels that take the call."""
    import cuda_backend

    functions = as_functions(options)
    if functions is None:
        found = _fastest(cuda_backend.flash_attention, (q, k, v), {**options, "return_lse": True})
    else:
        functions.pop("score_mod_vjp", None)
        found = _fastest(cuda_backend.flexible_attention, (q, k, v), {**functions, "return_lse": True})
    return found.out.contiguous(), found.lse.contiguous()


def _on_gpu_vjp(_torch: Any, arrays: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    import cuda_backend

    functions = as_functions(options)
    if functions is None:
        found = _fastest(cuda_backend.flash_attention_vjp, arrays, options)
    else:
        found = _fastest(cuda_backend.flexible_attention_vjp, arrays, functions)
    return (*found[:3], found.dbias)


def _fastest(function: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a function with the Hopper kernels if they are there and take the call, else the portable ones."""
    import inspect

    from cuda_backend.attention.forward import chosen_tier

    if "tier" in inspect.signature(function).parameters and chosen_tier("auto", arrays[0]) == "hopper":
        try:
            return function(*arrays, tier="hopper", **options)
        except UnsupportedError:
            pass
    return function(*arrays, **options)


def _host(torch: Any, tensor: Any) -> Any:
    """Return a tensor of the host as an array for the references, bfloat16 as float32."""
    return as_array(torch, tensor.float() if tensor.dtype == torch.bfloat16 else tensor)


def _host_options(torch: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {name: _host(torch, x) if hasattr(x, "numpy") else x for name, x in options.items()}


def _on_host(torch: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    from refimpl.attention import scaled_dot_product_attention

    arrays = [_host(torch, x) for x in (q, k, v)]
    out, lse = scaled_dot_product_attention(*arrays, return_lse=True, **_host_options(torch, options))
    return q.new_tensor(out), torch.from_numpy(lse)


def _on_host_vjp(torch: Any, arrays: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    from refimpl.attention import scaled_dot_product_attention_vjp

    q, k, v, _, _, do = (_host(torch, x) for x in arrays)
    found = scaled_dot_product_attention_vjp(q, k, v, do, **_host_options(torch, options))
    like = arrays[0]
    return tuple(None if x is None else like.new_tensor(x) for x in found)
