"""Oracles of packed sequences: scalar loops over all pairs of tokens, and PyTorch's SDPA, a sequence each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


@oracle("attention.varlen")
def scalar_varlen(q: Any, k: Any, v: Any, starts: Any, key_starts: Any, /, **options: Any) -> Any:
    """Every query asks of every key whether it is of its own sequence and, if causal, not later."""
    scale, cap = options.get("scale", 1 / math.sqrt(q.shape[2])), options.get("softcap")
    causal, (left, right) = options.get("causal", False), options.get("window_size", (-1, -1))
    out = np.zeros((*q.shape[:2], v.shape[2]))
    lse = np.full((q.shape[1], q.shape[0]), -math.inf)

    def home(bounds: Any, token: int) -> tuple[int, int, int]:
        """Return the sequence of a token, its place, and how many tokens come after; -1 for padding."""
        for s in range(len(bounds) - 1):
            if bounds[s] <= token < bounds[s + 1]:
                return s, token - int(bounds[s]), int(bounds[s + 1]) - 1 - token
        return -1, 0, 0

    def sees(i: int, j: int) -> bool:
        (s, place, after), (t, key_place, key_after) = home(starts, i), home(key_starts, j)
        if s < 0 or s != t:
            return False
        ahead = key_place - place if causal == "top_left" else after - key_after  # of the key, if above 0
        if (left >= 0 and ahead < -left) or (right >= 0 and ahead > right):
            return False
        if causal == "bottom_right":  # counted from the ends, which lie at the same time
            return key_after >= after
        return key_place <= place if causal else True

    for i, h in np.ndindex(q.shape[:2]):
        g = h // (q.shape[1] // k.shape[1])
        scores = {}
        for j in (j for j in range(k.shape[0]) if sees(i, j)):
            s = scale * math.fsum(float(x) * float(y) for x, y in zip(q[i, h], k[j, g], strict=True))
            scores[j] = s if cap is None else cap * math.tanh(s / cap)
        if not scores:
            continue
        top = max(scores.values())
        total = math.fsum(math.exp(s - top) for s in scores.values())
        lse[h, i] = top + math.log(total)
        for d in range(v.shape[2]):
            out[i, h, d] = math.fsum(math.exp(s - top) / total * float(v[j, g, d]) for j, s in scores.items())
    return (out, lse) if options.get("return_lse") else out


@oracle("attention.varlen")
def torch_sdpa(q: Any, k: Any, v: Any, starts: Any, key_starts: Any, /, **options: Any) -> Any:
    """SDPA for each sequence, as PyTorch's own users of cu_seqlens fall back to."""
    if options.get("softcap") or options.get("return_lse") or options.get("causal") == "top_left":
        raise NotImplementedError
    torch = library("torch")
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for s in range(len(starts) - 1):
        part, keys = (
            slice(int(starts[s]), int(starts[s + 1])),
            slice(int(key_starts[s]), int(key_starts[s + 1])),
        )
        count, key_count = part.stop - part.start, keys.stop - keys.start
        left, right = options.get("window_size", (-1, -1))
        if (options.get("causal") or left >= 0 or right >= 0) and key_count < count:
            raise NotImplementedError("rows without keys")
        if not count or not key_count:
            continue
        mask, last = torch.ones(count, key_count, dtype=torch.bool), key_count - count
        if options.get("causal"):
            mask = mask.tril(last)
        if right >= 0:
            mask = mask.tril(last + right)
        if left >= 0:
            mask = mask.triu(last - left)
        rows = (
            torch.from_numpy(np.ascontiguousarray(x)).transpose(0, 1) for x in (q[part], k[keys], v[keys])
        )
        out[part] = torch.nn.functional.scaled_dot_product_attention(
            *rows,
            attn_mask=mask,
            scale=options.get("scale"),
            enable_gqa=True,
        ).transpose(0, 1)
    return out.numpy()
