"""Oracles of convolution and of Long-Short Range Attention: PyTorch's, a banded matrix, and scalar loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg

from refimpl.registry import oracle
from tests.oracles import library


def _softmax(row: Any) -> list[float]:
    powers = [math.exp(float(x) - max(map(float, row))) for x in row]
    return [power / math.fsum(powers) for power in powers]


@oracle("attention.lightweight_convolution")
def torch_conv1d(x: Any, w: Any, *, causal: bool = False) -> Any:
    """``conv1d(groups=D)`` on a sequence padded outside, each head's kernel repeated for its channels."""
    if 0 in x.shape:
        raise NotImplementedError
    torch = library("torch")
    (_, _, D), (H, K) = x.shape, w.shape
    weight = torch.softmax(torch.from_numpy(w), dim=-1).repeat_interleave(D // H, dim=0)[:, None]
    before = K - 1 if causal else (K - 1) // 2
    padded = torch.nn.functional.pad(torch.from_numpy(x).transpose(1, 2), (before, K - 1 - before))
    return torch.nn.functional.conv1d(padded, weight, groups=D).transpose(1, 2).numpy()


@oracle("attention.lightweight_convolution")
def banded_toeplitz(x: Any, w: Any, *, causal: bool = False) -> Any:
    """A Toeplitz matrix a channel, from SciPy: its first column and first row hold the kernel."""
    (_, T, D), (H, K) = x.shape, w.shape
    if not T:
        raise NotImplementedError
    before = K - 1 if causal else (K - 1) // 2
    out = np.zeros_like(x)
    for c in range(D):
        p = _softmax(w[c * H // D])
        at = {j - before: p[j] for j in range(K)}  # distance to the token: its weight
        column, row = [at.get(-t, 0.0) for t in range(T)], [at.get(t, 0.0) for t in range(T)]
        out[:, :, c] = x[:, :, c] @ scipy.linalg.toeplitz(column, row).T
    return out


@oracle("attention.dynamic_convolution")
def scalar_dynamic_convolution(x: Any, w: Any, *, causal: bool = False) -> Any:
    """Every kernel predicted and applied one number at a time."""
    (_, T, D), (_, H, K) = x.shape, w.shape
    before = K - 1 if causal else (K - 1) // 2
    out = np.zeros_like(x)
    for b, t, c in np.ndindex(x.shape):
        h = c * H // D
        logits = [math.fsum(x[b, t, d] * w[d, h, j] for d in range(D)) for j in range(K)]
        seen = [(j, t + j - before) for j in range(K) if 0 <= t + j - before < T]
        out[b, t, c] = math.fsum(_softmax(logits)[j] * x[b, s, c] for j, s in seen)
    return out


@oracle("attention.lsra")
def torch_two_branches(x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, *local: Any, **options: Any) -> Any:
    """PyTorch's attention on one part; on the other its ``glu``, an unfolded window, its softmax."""
    if 0 in x.shape:
        raise NotImplementedError
    torch = library("torch")
    F = torch.nn.functional
    heads, causal = options["num_heads"], options.get("causal", False)
    bias = {
        name: torch.from_numpy(options[name]) if name in options else 0.0
        for name in ("b_q", "b_k", "b_v", "b_o", "b_in", "b_out")
    }
    (B, T, _), cut = x.shape, w_q.shape[0]
    left, right = torch.from_numpy(x[..., :cut].copy()), torch.from_numpy(x[..., cut:].copy())
    real = torch.from_numpy(options.get("key_mask", np.ones((B, T), bool)))

    q, k, v = (
        (left @ torch.from_numpy(w) + bias[name]).view(B, T, heads, -1).transpose(1, 2)
        for w, name in ((w_q, "b_q"), (w_k, "b_k"), (w_v, "b_v"))
    )
    seen = real[:, None, None, :].expand(B, 1, T, T)
    if causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool).tril()
    alive = seen.any(-1, keepdim=True)  # PyTorch leaves a fully masked row undefined
    far = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~alive) * alive
    far = far.transpose(1, 2).reshape(B, T, -1) @ torch.from_numpy(w_o) + bias["b_o"]

    w_in, w_kernel, w_out = (torch.from_numpy(w) for w in local)
    H, K = w_kernel.shape[-2:]
    tokens = F.glu(right.masked_fill(~real[..., None], 0.0) @ w_in + bias["b_in"], dim=-1)
    logits = (
        w_kernel.expand(B, T, H, K) if w_kernel.ndim == 2 else torch.einsum("btc,chk->bthk", tokens, w_kernel)
    )
    before = K - 1 if causal else (K - 1) // 2
    windows = F.pad(tokens, (0, 0, before, K - 1 - before)).unfold(1, K, 1).reshape(B, T, H, -1, K)
    near = torch.einsum("bthrk,bthk->bthr", windows, torch.softmax(logits, dim=-1)).reshape(B, T, -1)
    return torch.cat([far, near @ w_out + bias["b_out"]], dim=-1).numpy()
