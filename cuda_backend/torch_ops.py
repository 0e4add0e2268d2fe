"""PyTorch, if it is installed: our layers and functions under its names, arrays for measurements.

This file and `torch_rivals` alone name torch, and only inside functions: nothing else of frugal needs it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import UnsupportedError
from refimpl.numerics import Array

__all__ = [
    "attention",
    "beside",
    "draw",
    "int8_linear",
    "masked_attention",
    "missing",
    "replace_linear",
    "to_host",
    "varlen_attention",
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
    causal: str = "",
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    deterministic: bool = False,
    tier: str = "portable",
) -> Any:
    """Return attention of PyTorch tensors [B, T, H, D], with a gradient; see `cuda_backend.flash_attention`.

    An operator of its own, ``torch.ops.frugal.attention``, also under `torch.compile`.  Tensors on the host
    go to the simulator or to the reference.

    Parameters
    ----------
    q, k, v : torch.Tensor
        Key heads may be fewer: they divide the query heads.
    causal, scale, dropout_p
        As for `refimpl.attention.scaled_dot_product_attention`; `causal` is "" for no mask.
    seed : int
        Of the dropout, from 0 to 2**63 - 1; give another one in each step.
    deterministic, tier
        As for `cuda_backend.flash_attention_vjp`; the tier of both passes.

    Returns
    -------
    torch.Tensor
        [B, Tq, Hq, Dv], in the format of `q`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
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
    return torch.ops.frugal.attention(q, k, v, causal, scale, dropout_p, seed, deterministic, tier)[0]


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
    *,
    softcap: float = 0.0,
) -> Any:
    """Return attention over packed sequences, with a gradient: flash-attention's ``flash_attn_varlen_func``.

    An operator of its own, ``torch.ops.frugal.varlen_attention``, also under `torch.compile`.  Kernels, and
    the warning where they are the slow ones, as for `masked_attention`: the gradient has portable kernels
    only.  Tensors on the host go to the simulator or to the reference.

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
    options = "bottom_right" if causal else "", softcap or None, softmax_scale
    return torch.ops.frugal.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)[0]


def masked_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    attn_mask: Any = None,
    bias: Any = None,
    causal: str = "",
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Any:
    """Return attention of tensors [B, T, H, D] with masks, by the kernels that run it best, with a gradient.

    An operator of its own, ``torch.ops.frugal.masked_attention``, also under `torch.compile`.  On the GPU one
    query over a long cache is decoded, a mask or a softcap is a function of `cuda_backend.flexible_attention`
    and the rest goes to `cuda_backend.flash_attention`.  In float16 and bfloat16 on a Hopper GPU the Hopper
    kernels run; where they refuse a call the portable ones do, many times slower, and a
    `refimpl.errors.SlowPathWarning` says why, once for each reason.  Tensors on the host go to the reference.

    Parameters
    ----------
    q, k, v, attn_mask, bias, causal, softcap, scale, dropout_p
        As for `refimpl.attention.scaled_dot_product_attention`; `causal` is "" for no mask.  The bias has a
        gradient, too.
    window : int, optional
        With causal="top_left": keys that a query sees, the last at its own place.
    seed : int
        As for `attention`.

    Returns
    -------
    torch.Tensor
        [B, Tq, Hq, Dv], in the format of `q`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons of the kernels, if the portable ones refuse too.

    Examples
    --------
    >>> if missing() is None:
    ...     import torch
    ...     q = torch.ones(1, 3, 2, 8, device="cuda", requires_grad=True)
    ...     masked_attention(q, q, q, causal="top_left", window=2).sum().backward()
    """
    import torch

    _registered()
    options = causal, window, softcap, scale, dropout_p, seed
    return torch.ops.frugal.masked_attention(q, k, v, attn_mask, bias, *options)[0]


def _registered() -> bool:
    """Register the operators behind the attentions here, once; return True."""
    import torch

    from cuda_backend.attention import autograd, autograd_masked, autograd_varlen

    return None not in [module.register(torch) for module in (autograd, autograd_masked, autograd_varlen)]


# As torch.compiler.assume_constant_result marks it: it is called when code is compiled, not traced.
_registered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def int8_linear(
    layer: Any, *, threshold: float | None = 6.0, compute: Callable[..., Any] | None = None
) -> Any:
    """Return a module that computes what `torch.nn.Linear` `layer` does, by LLM.int8(), for inference.

    Parameters
    ----------
    layer : torch.nn.Linear
        On the GPU, in float16 or bfloat16; it is quantised now and not kept.
    threshold : float or None
        As for `refimpl.quant.llm_int8_linear`.
    compute : callable, optional
        A function of the reference's signature.  Default: `cuda_backend.llm_int8_linear_hopper`.

    Returns
    -------
    torch.nn.Module
        With buffers ``codes`` [out_features, in_features padded to 16] and ``absmax``, and the layer's bias.
        It loads its own state, or that of a `torch.nn.Linear`, whose ``weight`` is quantised then.

    Raises
    ------
    UnsupportedError
        From its forward pass, if a gradient is wanted, or with the reasons of `compute`.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    module = _int8_linear_class()(layer.in_features, layer.out_features, threshold, compute)
    if layer.bias is not None:
        module.bias = type(layer.bias)(layer.bias.detach(), requires_grad=False)
    module.quantize(layer.weight)
    return module.train(layer.training)


def replace_linear(model: Any, *, keep: tuple[str, ...] = ("lm_head",), **options: Any) -> int:
    """Put `int8_linear` in the place of every `torch.nn.Linear` of a model but those named in `keep`.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    keep : tuple of str
        Names of children, at any depth, that stay as they are, with all that is in them.
    **options
        Those of `int8_linear`.

    Returns
    -------
    int
        How many were replaced.
    """
    import torch

    replaced = 0
    for name, child in model.named_children():
        if name in keep:
            continue
        if type(child) is torch.nn.Linear:
            setattr(model, name, int8_linear(child, **options))
            replaced += 1
        else:
            replaced += replace_linear(child, keep=keep, **options)
    return replaced


@functools.cache
def _int8_linear_class() -> Any:
    import torch

    from cuda_backend import llm_int8_linear_hopper, prepare_weight
    from refimpl.quant import Int8Columns

    class Int8Linear(torch.nn.Module):
        """A linear layer in int8; see `int8_linear`."""

        def __init__(
            self,
            in_features: int,
            out_features: int,
            threshold: float | None,
            compute: Callable[..., Any] | None,
        ) -> None:
            super().__init__()
            self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
            self.compute = compute or llm_int8_linear_hopper
            self.register_buffer("codes", None)
            self.register_buffer("absmax", None)
            self.register_parameter("bias", None)

        def quantize(self, weight: Any) -> None:
            """Take the place of a weight [out_features, in_features] in floating point."""
            prepared = prepare_weight(weight.detach().t())
            codes = prepared.codes.t()  # rows may be longer than they are wide: all of it is kept
            self.codes = codes.as_strided((self.out_features, codes.stride(0)), (codes.stride(0), 1))
            self.absmax = prepared.absmax

        def forward(self, x: Any) -> Any:
            """Return the outputs for x of any shape [..., in_features]."""
            if torch.is_grad_enabled() and x.requires_grad:
                raise UnsupportedError("int8_linear: no gradient; call it under torch.no_grad()")
            rows = x.reshape(-1, self.in_features)
            weight = Int8Columns(self.codes[:, : self.in_features].t(), self.absmax)
            out = self.compute(rows, weight, bias=self.bias, threshold=self.threshold)
            return out.view(*x.shape[:-1], self.out_features)

        def extra_repr(self) -> str:
            """Return the sizes, as `torch.nn.Linear` does."""
            sizes = f"in_features={self.in_features}, out_features={self.out_features}"
            return f"{sizes}, threshold={self.threshold}"

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            weight = state.pop(f"{prefix}weight", None)
            if weight is not None:
                place = weight if self.absmax is None else weight.to(self.absmax.device)
                self.quantize(place)
                state[f"{prefix}codes"], state[f"{prefix}absmax"] = self.codes, self.absmax
            super()._load_from_state_dict(state, prefix, *rest)

    return Int8Linear
