"""Oracles of attention with functions of the user's: scalar loops, and PyTorch's FlexAttention."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library

NEGATIVE = float("-inf")


@oracle("attention.flexible")
def scalar_flexible(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """One score at a time, each function called with whole numbers."""
    mask, score = options.get("mask_mod"), options.get("score_mod")
    aux = options.get("aux", ())
    scale = options.get("scale", 1 / math.sqrt(q.shape[3]))

    def asked(f: Any, *arguments: Any) -> Any:
        return f(*arguments, aux) if f.__code__.co_argcount > len(arguments) else f(*arguments)

    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full((q.shape[0], q.shape[2], q.shape[1]), NEGATIVE)
    for b, i, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        scores = {}
        for j in range(k.shape[1]):
            if mask is None or asked(mask, b, h, i, j):
                product = math.fsum(float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, g], strict=True))
                scores[j] = (
                    scale * product if score is None else float(asked(score, scale * product, b, h, i, j))
                )
        top = max(scores.values(), default=NEGATIVE)
        if top == NEGATIVE:
            continue
        weights = {j: math.exp(s - top) for j, s in scores.items()}
        total = math.fsum(weights.values())
        lse[b, h, i] = top + math.log(total)
        for d in range(v.shape[3]):
            out[b, i, h, d] = math.fsum(w * float(v[b, j, g, d]) for j, w in weights.items()) / total
    return (out, lse) if options.get("return_lse") else out


@oracle("attention.flexible")
def torch_flex_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """PyTorch's FlexAttention, not compiled, for functions of tensors that keep a key for each query."""
    if 0 in (*q.shape, *k.shape):
        raise NotImplementedError
    torch, flex = library("torch"), library("torch.nn.attention.flex_attention")
    aux = tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in options.get("aux", ()))
    sizes = q.shape[0], q.shape[2], q.shape[1], k.shape[1]

    def taking_aux(f: Any, count: int) -> Any:
        return functools.partial(f, aux=aux) if f.__code__.co_argcount > count else f

    mask, score = options.get("mask_mod"), options.get("score_mod")
    try:
        blocks = None
        if mask is not None:
            function = taking_aux(mask, 4)
            if not flex.create_mask(function, *sizes, device="cpu").any(-1).all():
                raise NotImplementedError("a row without keys")
            blocks = flex.create_block_mask(function, *sizes, device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is slow without being compiled
            out = flex.flex_attention(
                *(torch.from_numpy(np.ascontiguousarray(x)).transpose(1, 2) for x in (q, k, v)),
                score_mod=None if score is None else taking_aux(score, 5),
                block_mask=blocks,
                scale=options.get("scale"),
                enable_gqa=True,
            )
    except (RuntimeError, TypeError) as error:  # it branches on numbers that a tensor does not say
        raise NotImplementedError(str(error)) from None
    return out.transpose(1, 2).numpy()


@oracle("attention.split_kv", "attention.paged")
def scalar_decode(q: Any, k: Any, v: Any, *table: Any, **options: Any) -> Any:
    """One score at a time over the whole cache, each key looked up in its page."""
    lengths = options.get("k_lengths", np.full(q.shape[0], k.shape[1]))
    scale = options.get("scale", 1 / math.sqrt(q.shape[3]))
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full((q.shape[0], q.shape[2], q.shape[1]), NEGATIVE)
    for b, i, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = [
            (table[0][b, j // k.shape[1]], j % k.shape[1]) if table else (b, j)
            for j in range(int(lengths[b]) - q.shape[1] + i + 1)
        ]
        scores = [
            scale * math.fsum(float(x) * float(y) for x, y in zip(q[b, i, h], k[at][g], strict=True))
            for at in seen
        ]
        if not scores:
            continue
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        lse[b, h, i] = top + math.log(math.fsum(weights))
        for d in range(v.shape[3]):
            out[b, i, h, d] = math.fsum(w * float(v[at][g, d]) for w, at in zip(weights, seen, strict=True))
            out[b, i, h, d] /= math.fsum(weights)
    return (out, lse) if options.get("return_lse") else out
