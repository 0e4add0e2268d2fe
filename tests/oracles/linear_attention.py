"""Oracles of linear attention: the kernel's weights in scalar loops, and the authors' formulas in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def _feature(x: float) -> float:
    return x + 1.0 if x > 0 else math.exp(x)


def _sees(i: int, j: int, Tq: int, Tk: int, causal: Any) -> bool:
    if causal == "bottom_right":
        return j <= i + Tk - Tq
    return j <= i if causal else True


@oracle("attention.linear", "attention.linear_chunked")
def scalar_kernel_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Every weight φ(q)·φ(k) by itself, rows normalised: attention with a kernel, and no sum kept."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    mask = options.get("key_mask", np.ones(k.shape[:2], bool))
    for b, i, h in np.ndindex(q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        weights = [
            math.fsum(_feature(x) * _feature(y) for x, y in zip(q[b, i, h], k[b, j, g], strict=True))
            if mask[b, j] and _sees(i, j, q.shape[1], k.shape[1], options.get("causal"))
            else 0.0
            for j in range(k.shape[1])
        ]
        total = math.fsum(weights) + options.get("eps", 1e-6)
        for e in range(v.shape[3]):
            if total:
                out[b, i, h, e] = (
                    math.fsum(w * x for w, x in zip(weights, v[b, :, g, e], strict=True)) / total
                )
    return out


@oracle("attention.linear", "attention.linear_chunked")
def torch_cumulative_sums(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The formulas of the authors' code: ``elu(x) + 1``, a cumulative sum, one division."""
    causal = options.get("causal")
    square = q.shape[1] == k.shape[1]
    if 0 in (*q.shape, *k.shape) or (causal and not square) or min(q.min(), k.min()) < -4:
        raise NotImplementedError  # elu(x) + 1 has few digits left far below 0
    torch = library("torch")
    group = q.shape[2] // k.shape[2]
    x, y = (torch.nn.functional.elu(torch.from_numpy(a)) + 1 for a in (q, k))
    y = y * torch.from_numpy(options.get("key_mask", np.ones(k.shape[:2], bool)))[:, :, None, None]
    y, w = (a.repeat_interleave(group, dim=2) for a in (y, torch.from_numpy(v)))
    outer = torch.einsum("njhd,njhe->njhde", y, w)
    S, z = (a.cumsum(1) if causal else a.sum(1, keepdim=True) for a in (outer, y))
    S, z = S.expand(-1, q.shape[1], -1, -1, -1), z.expand(-1, q.shape[1], -1, -1)
    numerator = torch.einsum("nihd,nihde->nihe", x, S)
    denominator = torch.einsum("nihd,nihd->nih", x, z) + options.get("eps", 1e-6)
    return torch.where(denominator[..., None] == 0, 0.0, numerator / denominator[..., None]).numpy()
