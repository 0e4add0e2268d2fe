"""Oracles of attention in int8: scalar loops, PyTorch's attention of what the codes stand for."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def _restored(x: Any, block: int) -> Any:
    """Return the numbers of one head [T, D] that their codes stand for, codes from exact quotients."""
    found = np.zeros(x.shape)
    for start in range(0, len(x), block):
        part = x[start : start + block]
        absmax = max((abs(float(number)) for row in part for number in row), default=0.0)
        for t, row in enumerate(part):
            for d, number in enumerate(row):
                code = round(Fraction(float(number)) * 127 / Fraction(absmax)) if absmax else 0
                found[start + t, d] = code * (absmax / 127)
    return found


def _smoothed(k: Any) -> Any:
    count = max(len(k), 1)
    return k - np.array([math.fsum(column) / count for column in k.T]) if len(k) else k


def _sees(i: int, j: int, causal: Any, offset: int) -> bool:
    return causal is False or j <= i + (offset if causal == "bottom_right" else 0)


@oracle("attention.int8")
def int8_attention_in_scalars(
    q: Any, k: Any, v: Any, /, *, causal: Any = False, scale: Any = None, smooth: bool = True,
    block_sizes: tuple[int, int] = (64, 128),
) -> Any:  # fmt: skip
    """Query by query."""
    B, Tq, H, D = q.shape
    Tk, group = k.shape[1], H // k.shape[2]
    if Tq * Tk > 400:
        raise NotImplementedError("too long for loops")
    factor = D**-0.5 if scale is None else scale
    out = np.zeros((B, Tq, H, v.shape[3]))
    for b in range(B):
        for h in range(H):
            keys = k[b, :, h // group]
            keys = _restored(_smoothed(keys) if smooth else keys, block_sizes[1])
            queries = _restored(q[b, :, h], block_sizes[0])
            for i in range(Tq):
                seen = [j for j in range(Tk) if _sees(i, j, causal, Tk - Tq)]
                scores = [factor * math.fsum(queries[i] * keys[j]) for j in seen]
                top = max(scores, default=0.0)
                weights = [math.exp(score - top) for score in scores]
                for d in range(v.shape[3]):
                    terms = [w * v[b, j, h // group, d] for w, j in zip(weights, seen, strict=True)]
                    out[b, i, h, d] = math.fsum(terms) / math.fsum(weights) if seen else 0.0
    return out


@oracle("attention.int8")
def torch_attention_of_restored_numbers(
    q: Any, k: Any, v: Any, /, *, causal: Any = False, scale: Any = None, smooth: bool = True,
    block_sizes: tuple[int, int] = (64, 128),
) -> Any:  # fmt: skip
    """Codes by PyTorch, then its own attention."""
    torch = library("torch")
    if 0 in (*q.shape, *k.shape, *v.shape) or causal == "bottom_right":
        raise NotImplementedError("arrays that are not empty, its own causal alignment")
    queries, keys, values = (torch.from_numpy(a).permute(0, 2, 1, 3) for a in (q, k, v))
    if smooth:
        keys = keys - keys.mean(2, keepdim=True)

    def restored(x: Any, block: int) -> Any:
        T = x.shape[2]
        cut = torch.nn.functional.pad(x, (0, 0, 0, -T % block)).unflatten(2, (-1, block))
        step = cut.abs().amax((3, 4), keepdim=True) / 127
        return (torch.round(cut / step).nan_to_num(0) * step).flatten(2, 3)[:, :, :T]

    found = torch.nn.functional.scaled_dot_product_attention(
        restored(queries, block_sizes[0]), restored(keys, block_sizes[1]), values,
        is_causal=causal is not False, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return found.permute(0, 2, 1, 3).numpy()
