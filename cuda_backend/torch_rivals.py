"""Functions of PyTorch that ours are measured against.

Each function returns rivals by name; torch is imported when one is called.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from refimpl.attention.user_functions import as_mod

__all__ = [
    "Rival",
    "attention_backward_rivals",
    "attention_rivals",
    "byte_copy_rival",
    "copy_rivals",
    "decode_rivals",
    "flexible_rivals",
    "int8_product_rivals",
    "linear_rivals",
    "llm_int8_rivals",
    "scaled_product_rivals",
]

ATTENTION_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION")


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


def flexible_rivals(
    mask_mod: Callable[..., Any] | None, score_mod: Callable[..., Any] | None, *, backward: bool
) -> dict[str, Rival]:
    """Return compiled FlexAttention with functions of ours and, without a score, SDPA with the whole mask.

    Operands are q, k, v [B, T, H, D], the gradient of the output for a backward pass, and the tuple of arrays
    that functions read.  Masks are made before.  Functions get `torch` in the place of `math`.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

    torch.compiler.reset()  # as for `_flex_attention`
    compiled = torch.compile(flex_attention, dynamic=False)

    def sizes(q: Any, k: Any) -> dict[str, Any]:
        mod = as_mod("mask_mod", mask_mod)
        outer = {"B": q.shape[0] if mod.by_sequence else None, "H": q.shape[2] if mod.by_head else None}
        return {**outer, "Q_LEN": q.shape[1], "KV_LEN": k.shape[1], "device": q.device}

    def flexible(q: Any, k: Any, v: Any, blocks: Any, score: Any) -> Any:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=grouped)

    def masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    def for_flexible(q: Any, k: Any, aux: Any) -> tuple[Any, ...]:
        blocks = None
        if mask_mod is not None:
            mask = _of_tensors(mask_mod, 4, aux)
            blocks = create_block_mask(mask, _compile=q.shape[1] > 8192, **sizes(q, k))
        return blocks, None if score_mod is None else _of_tensors(score_mod, 5, aux)

    def for_masked(q: Any, k: Any, aux: Any) -> tuple[Any, ...]:
        if q.shape[1] > 16384:
            raise MemoryError("a mask of as many bytes as there are scores")
        return (create_mask(_of_tensors(mask_mod, 4, aux), **sizes(q, k)),)

    chosen: dict[str, tuple[Callable[..., Any], ...]] = {"FlexAttention": (flexible, for_flexible)}
    if mask_mod is not None and score_mod is None:
        chosen["SDPA"] = (masked, for_masked)
    return {name: _ready(*functions, backward=backward) for name, functions in chosen.items()}


def _ready(function: Callable[..., Any], prepared: Callable[..., Any], *, backward: bool) -> Rival:
    """Return the forward pass of a function, or its backward pass with the forward one made before."""
    import torch

    def forward_operands(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
        return q, k, v, *prepared(q, k, rest[-1])

    def backward_operands(q: Any, k: Any, v: Any, do: Any, aux: Any) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return function(*leaves, *prepared(q, k, aux)), leaves, do.transpose(1, 2)

    def gradients(out: Any, leaves: Any, do: Any) -> Any:
        return torch.autograd.grad(out, leaves, do, retain_graph=True)

    if backward:
        return Rival(gradients, prepare=backward_operands)
    return Rival(function, prepare=forward_operands)


def _of_tensors(function: Any, count: int, aux: Any) -> Any:
    """Return a function of ours, of `count` arguments and perhaps arrays, as one of tensors."""
    import torch

    # A module of its own: torch.compile looks up what a function reads in the module that its globals name.
    module = ModuleType(f"frugal_functions_of_tensors_{id(function.__globals__)}")
    for name, value in function.__globals__.items():
        module.__dict__.setdefault(name, torch if value is math else value)
    sys.modules[module.__name__] = module
    settled = function.__name__, function.__defaults__, function.__closure__
    copy = FunctionType(function.__code__, module.__dict__, *settled)
    if function.__code__.co_argcount == count:
        return copy
    if count == 4:
        return lambda b, h, i, j: copy(b, h, i, j, aux)
    return lambda score, b, h, i, j: copy(score, b, h, i, j, aux)


def decode_rivals() -> dict[str, Rival]:
    """Return SDPA for queries that see a whole cache; operands are q, k, v [B, T, H, D]."""
    import torch

    def attention(q: Any, k: Any, v: Any) -> Any:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    return {"torch SDPA": Rival(attention)}


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
