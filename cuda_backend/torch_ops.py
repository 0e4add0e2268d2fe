"""PyTorch, if it is installed: our functions and layers under its names, arrays for measurements.

This file, `torch_layers`, `torch_modules`, `torch_weight_only` and `torch_rivals` alone name torch, and only
inside functions: nothing else of frugal needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from cuda_backend.attention.tiers import Tier
from cuda_backend.torch_layers import int8_linear, merged_int8_linear, replace_linear
from cuda_backend.torch_weight_only import weight_only_linear
from refimpl.attention.scores import Causal
from refimpl.errors import OptionError, UnsupportedError
from refimpl.numerics import Array

__all__ = [
    "attention",
    "beside",
    "draw",
    "drawn_seed",
    "int8_linear",
    "masked_attention",
    "merged_int8_linear",
    "missing",
    "replace_linear",
    "to_host",
    "varlen_attention",
    "weight_only_linear",
]


def missing() -> str | None:
    """Return why PyTorch cannot run on a GPU here, or None if it can."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return f"torch does not import: {error}"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def draw(shape: tuple[int, ...], dtype: str, seed: int, outliers: int = 0) -> Any:
    """Return a tensor on the GPU: normal numbers within ±5; int8 from -127 to 127, or uint8, all alike.

    The first `outliers` columns are 20, which LLM.int8() sets aside.
    """
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    if dtype == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda", generator=generator)
    if dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
    tensor = torch.randn(shape, device="cuda", generator=generator, dtype=getattr(torch, dtype)).clamp_(-5, 5)
    tensor[..., :outliers] = 20
    return tensor


def beside(array: Array, like: Any) -> Any:
    """Return an array as a tensor where `like` lies, if that is a tensor; else as it is."""
    if not hasattr(like, "is_cuda"):
        return array
    import torch

    return torch.from_numpy(array).to(like.device)


def to_host(tensor: Any, dtype: np.dtype[Any]) -> Array:
    """Return a tensor as an array of `dtype`, which names the same format in NumPy."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).cpu().numpy()).view(dtype)
    return np.asarray(tensor.cpu().numpy())


def attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    causal: Causal | None = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    deterministic: bool = False,
    tier: Tier = "auto",
) -> Any:
    """Return attention of PyTorch tensors [B, T, H, D], with a gradient; see `cuda_backend.flash_attention`.

    An operator of its own, ``torch.ops.frugal.attention``, also under `torch.compile`.  Tensors on the host
    go to the simulator or to the reference.

    Parameters
    ----------
    q, k, v : torch.Tensor
        Key heads may be fewer: they divide the query heads.
    causal, scale, dropout_p
        As for `refimpl.attention.scaled_dot_product_attention`.
    seed : int
        Of the dropout, from 0 to 2**63 - 1; give another one in each step.
    deterministic, tier
        As for `cuda_backend.flash_attention_vjp`; the tier of both passes.  "auto" is Hopper's kernels where
        they take the call, else the portable ones, with a `refimpl.errors.SlowPathWarning`.

    Returns
    -------
    torch.Tensor
        [B, Tq, Hq, Dv], in the format of `q`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; DTypeError also if the tensors are not of one floating format.
    UnsupportedError
        With the reasons of the tier.

    Examples
    --------
    >>> if missing() is None:
    ...     import torch
    ...     q = torch.ones(1, 3, 2, 8, device="cuda", requires_grad=True)
    ...     attention(q, q, q, causal="top_left").sum().backward()
    """
    import torch

    _registered()
    options = scale, dropout_p, seed, deterministic, tier
    return torch.ops.frugal.attention(q, k, v, _aligned(causal, q, k), *options)[0]


def varlen_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,  # noqa: ARG001 (flash-attention's place for it; nothing here needs it)
    max_seqlen_k: int | None = None,  # noqa: ARG001
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Any:
    """Return attention over packed sequences, with a gradient: flash-attention's ``flash_attn_varlen_func``.

    An operator of its own, ``torch.ops.frugal.varlen_attention``, also under `torch.compile`.  Kernels, and
    the warning where they are the slow ones, as for `masked_attention`.  Tensors on the host go to the
    simulator or to the reference.

    Of its arguments there are no ``alibi_slopes``, ``deterministic``, ``return_attn_probs`` and
    ``block_table``.  Slopes are a function of `cuda_backend.flexible_attention`, whose arrays say the
    sequence of each token (`refimpl.attention.mods`: `documents`, `alibi`);
    `cuda_backend.varlen_attention_vjp` takes `deterministic`, and `cuda_backend.varlen_attention` returns the
    log-sum-exp; pages are those of `cuda_backend.paged_attention`.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k : torch.Tensor
        As for `refimpl.attention.varlen_attention`.
    max_seqlen_q, max_seqlen_k : int, optional
        Not needed; they stand where flash-attention has them.
    dropout_p : float
        0: no dropout here.
    softmax_scale, softcap : float
        As for flash-attention: None and 0 are the defaults.
    causal : bool
        Aligned at the bottom right, as flash-attention does.
    window_size : tuple of int
        Keys on the left and on the right of a query's own place, counted from the ends; -1: all.

    Returns
    -------
    torch.Tensor
        [Tq, Hq, Dv], in the format of `q`; 0 behind the last sequence.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        If dropout is wanted, or with the reasons of the kernels.

    Examples
    --------
    >>> if missing() is None:
    ...     import torch
    ...     q = torch.ones(3, 2, 8, device="cuda", requires_grad=True)
    ...     starts = torch.tensor([0, 2, 3], device="cuda", dtype=torch.int32)
    ...     varlen_attention(q, q, q, starts, starts, 2, 2, causal=True).sum().backward()
    """
    import torch

    if dropout_p:
        raise UnsupportedError(f"varlen_attention: no dropout, got dropout_p={dropout_p}")
    _registered()
    left, right = window_size
    options = "bottom_right" if causal else "", left, right, softcap or None, softmax_scale
    return torch.ops.frugal.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)[0]


def masked_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    attn_mask: Any = None,
    bias: Any = None,
    causal: Causal | None = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = 0,
) -> Any:
    """Return attention of tensors [B, T, H, D] with masks, by the kernels that run it best, with a gradient.

    An operator of its own, ``torch.ops.frugal.masked_attention``, also under `torch.compile`.  On the GPU one
    query over a long cache is decoded, masks and a softcap are functions of `cuda_backend.flexible_attention`
    and the rest goes to `cuda_backend.flash_attention`.  In float16 and bfloat16 on a Hopper GPU the Hopper
    kernels run; where they refuse a call the portable ones do, many times slower, and a
    `refimpl.errors.SlowPathWarning` says why, once for each reason.  Tensors on the host go to the reference.

    Parameters
    ----------
    q, k, v, attn_mask, bias, causal, softcap, scale, dropout_p
        As for `refimpl.attention.scaled_dot_product_attention`: a query sees what mask and causality both
        allow.  The bias has a gradient, too.
    window : int, optional
        With causal="top_left", and at least 1: keys that a query sees, the last at its own place, of those
        that `attn_mask` allows.
    seed : int or torch.Tensor
        As for `attention`; or a tensor of one integer, such as `drawn_seed` returns, which code that
        `torch.compile` made need not be compiled again for.

    Returns
    -------
    torch.Tensor
        [B, Tq, Hq, Dv], in the format of `q`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference, on any device; DTypeError also if q, k and v are not of one floating format,
        OptionError also for a window without causal="top_left", or below 1.
    UnsupportedError
        If the portable kernels refuse the call, with their reasons: those of the Hopper kernels are the
        warning before it.

    Examples
    --------
    >>> if missing() is None:
    ...     import torch
    ...     q = torch.ones(1, 3, 2, 8, device="cuda", requires_grad=True)
    ...     masked_attention(q, q, q, causal="top_left", window=2).sum().backward()
    """
    import torch

    _registered()
    if not dropout_p:
        seed = None
    elif not isinstance(seed, torch.Tensor):
        seed = torch.tensor(seed, dtype=torch.int64)
    options = _aligned(causal, q, k), window, softcap, scale, dropout_p
    return torch.ops.frugal.masked_attention(q, k, v, attn_mask, bias, seed, *options)[0]


def drawn_seed() -> Any:
    """Return a seed for dropout: a tensor on the host, drawn from PyTorch's generator of the host.

    Examples
    --------
    >>> try:
    ...     assert drawn_seed().dim() == 0
    ... except ImportError:
    ...     pass
    """
    import torch

    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def _aligned(causal: Any, q: Any, k: Any) -> Any:
    """Return `causal` as the operators take it: "" for no mask."""
    if causal is None or causal is False:
        return ""
    if causal is not True:
        return causal
    if q.shape[1:2] != k.shape[1:2]:
        raise OptionError(
            f"causal: True is ambiguous for Tq={q.shape[1]}, Tk={k.shape[1]}; "
            "say 'top_left' or 'bottom_right'"
        )
    return "top_left"


def _registered() -> bool:
    """Register the operators behind the attentions here, once; return True."""
    import torch

    from cuda_backend.attention import autograd, autograd_masked, autograd_varlen

    return None not in [module.register(torch) for module in (autograd, autograd_masked, autograd_varlen)]


# As torch.compiler.assume_constant_result marks it: it is called when code is compiled, not traced.
_registered._dynamo_marked_constant = True  # type: ignore[attr-defined]
