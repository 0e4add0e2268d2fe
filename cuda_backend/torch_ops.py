"""PyTorch, if it is installed: our layers, arrays for measurements, functions that ours are measured against.

The only file that names torch, and only inside functions: nothing else of frugal needs it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refimpl.numerics import Array

__all__ = [
    "Rival",
    "attention",
    "attention_backward_rivals",
    "attention_rivals",
    "byte_copy_rival",
    "copy_rivals",
    "draw",
    "int8_linear",
    "int8_product_rivals",
    "linear_rivals",
    "llm_int8_rivals",
    "missing",
    "replace_linear",
    "scaled_product_rivals",
    "to_host",
]

ATTENTION_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION")


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


def to_host(tensor: Any, dtype: np.dtype[Any]) -> Array:
    """Return a tensor as an array of `dtype`, which names the same format in NumPy."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).cpu().numpy()).view(dtype)
    return np.asarray(tensor.cpu().numpy())


def _as_given(*operands: Any) -> tuple[Any, ...]:
    return operands


class Rival(NamedTuple):
    """A function of others.

    Attributes
    ----------
    function
        What is timed.
    context
        In which it is to be called: entering one costs more than the call.
    prepare
        ``prepare(*operands)`` gives its arguments, once for each set of operands, outside the timing.
    """

    function: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[..., tuple[Any, ...]] = _as_given


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


def _registered() -> bool:
    """Register the operator behind `attention`, once; return True."""
    import torch

    from cuda_backend.attention.autograd import register

    return register(torch) is not None


# As torch.compiler.assume_constant_result marks it: it is called when code is compiled, not traced.
_registered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention_rivals(causal: bool) -> dict[str, Rival]:
    """Return PyTorch's attentions for arrays [B, T, H, D]: SDPA with each fast backend, and FlexAttention.

    Their layout is [B, H, T, D]; the exchange of axes is a view.
    """
    found = _sdpa_rivals(causal)
    try:
        return {**found, "torch FlexAttention": _flex_attention(causal)}
    except ImportError:
        return found


def _sdpa_rivals(causal: bool) -> dict[str, Rival]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Any, k: Any, v: Any) -> Any:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    found = {
        f"torch SDPA {name}": Rival(attention, partial(sdpa_kernel, getattr(SDPBackend, name)))
        for name in ATTENTION_BACKENDS
        if hasattr(SDPBackend, name)
    }
    return {**found, "torch SDPA default": Rival(attention)}


def _flex_attention(causal: bool) -> Rival:
    """Return FlexAttention, compiled for the shape it is first called with; the mask is made before."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Shapes compiled for earlier problems count, and beyond a few it would run without being compiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def prepare(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        mask = None
        if causal:
            sizes = q.shape[1], k.shape[1]
            mask = create_block_mask(lambda _b, _h, row, column: row >= column, None, None, *sizes, q.device)
        return q, k, v, mask

    def attention(q: Any, k: Any, v: Any, mask: Any) -> Any:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    return Rival(attention, prepare=prepare)


def attention_backward_rivals(causal: bool) -> dict[str, Rival]:
    """Return the backward passes of SDPA's backends; the forward pass is made ready before.

    Operands are q, k, v and the gradient of the output, [B, T, H, D].
    """
    import torch

    def forward(function: Callable[..., Any], q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return function(*leaves), leaves, do.transpose(1, 2)

    def backward(out: Any, leaves: Any, do: Any) -> Any:
        return torch.autograd.grad(out, leaves, do, retain_graph=True)

    return {
        name: Rival(backward, rival.context, partial(forward, rival.function))
        for name, rival in _sdpa_rivals(causal).items()
    }


def linear_rivals() -> dict[str, Rival]:
    """Return the linear layer without quantisation, x @ weight."""
    import torch

    return {"torch matmul": Rival(torch.matmul)}


def int8_product_rivals() -> dict[str, Rival]:
    """Return the int8 product, ``torch._int_mm``, which is private but all there is."""
    import torch

    return {"torch._int_mm": Rival(torch._int_mm)} if hasattr(torch, "_int_mm") else {}


def scaled_product_rivals(dtype: str) -> dict[str, Rival]:
    """Return what a product with scales is measured against; operands are codes a and b, and their absmax.

    ``torch._int_mm`` alone, which leaves int32; the same and its dequantisation by PyTorch's operations; and
    the product of as many numbers in `dtype`.
    """
    import torch

    kind = getattr(torch, dtype)

    def dequantised(a: Any, b: Any, a_absmax: Any, b_absmax: Any) -> Any:
        return (torch._int_mm(a, b) * (a_absmax[:, None] / 127**2) * b_absmax).to(kind)

    def floats(a: Any, b: Any, *_: Any) -> tuple[Any, ...]:
        return a.to(kind), b.t().to(kind).t()

    found = {"torch matmul": Rival(torch.matmul, prepare=floats)}
    if hasattr(torch, "_int_mm"):
        found["torch._int_mm"] = Rival(torch._int_mm, prepare=lambda a, b, *_: (a, b))
        found["torch._int_mm, dequantised"] = Rival(dequantised)
    return found


def llm_int8_rivals(threshold: float) -> dict[str, Rival]:
    """Return LLM.int8() rebuilt from PyTorch's operations; operands are x, codes [K, N] and their absmax.

    Its steps are those of the released code: outliers found, rows quantised, the int32 product written,
    dequantised, the outliers' product added; the host waits for the outliers' indices.
    """
    import torch

    def recipe(x: Any, codes: Any, absmax: Any) -> Any:
        cells = x.abs() >= threshold
        columns = cells.any(0).nonzero().squeeze(1)
        row = x.masked_fill(cells, 0).abs().amax(1).float()
        quantised = torch.round(x.float() * (127 / row)[:, None]).to(torch.int8)
        quantised[:, columns] = 0
        product = torch._int_mm(quantised, codes)
        out = (product * (row[:, None] / 127**2) * absmax).to(x.dtype)
        weight = (codes[columns].float() * (absmax / 127)).to(x.dtype)
        return out + x[:, columns] @ weight

    return {"LLM.int8() of PyTorch": Rival(recipe)} if hasattr(torch, "_int_mm") else {}


def byte_copy_rival(count: int) -> Rival:
    """Return a copy that moves `count` bytes, half of them read; operands are x and a larger weight."""

    def prepare(_: Any, weight: Any) -> tuple[Any, ...]:
        part = weight.reshape(-1) if weight.is_contiguous() else weight.t().reshape(-1)
        part = part[: count // (2 * part.element_size())]
        return part, part.clone()

    return Rival(lambda source, target: target.copy_(source), prepare=prepare)


def copy_rivals() -> dict[str, Rival]:
    """Return a copy that moves as many bytes as the quantisation of x [T, K] of 16 bits: 3 T K."""

    def prepare(x: Any) -> tuple[Any, ...]:
        part = x.view(-1)[: x.numel() * 3 // 4]
        return part, part.clone()

    return {"torch copy": Rival(lambda source, target: target.copy_(source), prepare=prepare)}


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

    `options` are those of `int8_linear`; returns how many were replaced.
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
    from refimpl.errors import UnsupportedError
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
