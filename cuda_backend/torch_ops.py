"""PyTorch, if it is installed: arrays for measurements, and the functions that ours are measured against.

The only file that names torch, and only inside functions: nothing else of frugal needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refimpl.numerics import Array

__all__ = [
    "Rival",
    "attention_backward_rivals",
    "attention_rivals",
    "draw",
    "int8_product_rivals",
    "linear_rivals",
    "missing",
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
    """Return a tensor on the GPU: normal numbers within ±5, or for int8 all codes from -127 to 127 alike.

    The first `outliers` columns are 20, which LLM.int8() sets aside.
    """
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    if dtype == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda", generator=generator)
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
    """Return the linear layer without quantisation."""
    import torch

    return {"torch matmul": Rival(torch.matmul)}


def int8_product_rivals() -> dict[str, Rival]:
    """Return the int8 product, ``torch._int_mm``, which is private but all there is."""
    import torch

    return {"torch._int_mm": Rival(torch._int_mm)} if hasattr(torch, "_int_mm") else {}
