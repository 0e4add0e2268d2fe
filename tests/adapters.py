"""Adapters for `frugal verify --with`: a library's attention as it is, and broken on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention


def torch_sdpa(
    q: Any, k: Any, v: Any, /, *, causal: Any = False, attn_mask: Any = None, scale: Any = None
) -> Any:
    """PyTorch's attention in ten lines; what it has no keyword for is counted as refused."""
    mask = np.ones((q.shape[0], 1, q.shape[1], k.shape[1]), dtype=bool)
    if causal:
        mask &= np.tri(
            *mask.shape[2:], k.shape[1] - q.shape[1] if causal == "bottom_right" else 0, dtype=bool
        )
    if attn_mask is not None:
        mask &= attn_mask
    bhtd = (torch.from_numpy(np.ascontiguousarray(x)).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*bhtd, attn_mask=torch.from_numpy(mask), scale=scale, enable_gqa=True)
    return out.transpose(1, 2).numpy()


def off_by_one(q: Any, k: Any, v: Any, /, *, causal: Any = False, scale: Any = None) -> Any:
    """The same, its causal mask one key short."""
    offset = k.shape[1] - q.shape[1] if causal == "bottom_right" else 0
    mask = np.tri(q.shape[1], k.shape[1], offset - 1, dtype=bool) if causal else None
    return torch_sdpa(q, k, v, attn_mask=mask, scale=scale)
