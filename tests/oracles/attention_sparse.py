"""Oracles of sparse attention: scalar loops over what a token sees, flex_attention, transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.attention import scalar_attention

Sees = Callable[[int, int, int, int], bool]  # (b, h, i, j): may query i of head h see key j


def _scalar(q: Any, k: Any, v: Any, sees: Sees, options: dict[str, Any]) -> Any:
    """Scalar attention over the pairs of a pattern, written down one by one."""
    given = options.pop("attn_mask", None)
    full = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    mask = np.zeros(full, dtype=bool)
    for b, h, i, j in np.ndindex(full):
        mask[b, h, i, j] = sees(b, h, i, j) and (given is None or np.broadcast_to(given, full)[b, h, i, j])
    return scalar_attention(q, k, v, attn_mask=mask, **options)


def _short(q: Any) -> None:
    if q.shape[0] * q.shape[1] ** 2 * q.shape[2] > 1500:
        raise NotImplementedError("too long for scalar loops")


@oracle("attention.sliding_window")
def scalar_window(q: Any, k: Any, v: Any, *, radius: int, **options: Any) -> Any:
    """Attention one number at a time, over the keys at distance `radius` or less."""
    _short(q)
    return _scalar(q, k, v, lambda b, h, i, j: i - radius <= j <= i + radius, options)


def flex(q: Any, k: Any, v: Any, sees: Callable[..., Any], options: dict[str, Any]) -> Any:
    """``torch.nn.attention.flex_attention`` with a `mask_mod`, eager: nothing is compiled on a CPU."""
    if set(options) - {"causal", "scale"} or 0 in (*q.shape, *v.shape):
        raise NotImplementedError
    torch = library("torch")
    attention = library("torch.nn.attention.flex_attention")
    causal = options.get("causal", False)

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return sees(b, h, i, j) & ((j <= i) if causal else torch.ones_like(i, dtype=torch.bool))

    T = q.shape[1]
    mask = attention.create_block_mask(mask_mod, q.shape[0], q.shape[2], T, T, device="cpu", BLOCK_SIZE=16)
    heads = [torch.from_numpy(np.ascontiguousarray(np.swapaxes(x, 1, 2))) for x in (q, k, v)]
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    with warnings.catch_warnings():  # it says once that eager mode makes the whole score matrix
        warnings.simplefilter("ignore", UserWarning)
        out = attention.flex_attention(*heads, block_mask=mask, scale=options.get("scale"), **grouped)
    return out.transpose(1, 2).numpy()


@oracle("attention.sliding_window")
def flex_window(q: Any, k: Any, v: Any, *, radius: int, **options: Any) -> Any:
    """flex_attention with the band as its mask."""
    return flex(q, k, v, lambda b, h, i, j: (i - j <= radius) & (j - i <= radius), options)


@oracle("attention.bigbird")
def scalar_bigbird(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Attention one number at a time, over the keys whose block a query's block sees."""
    _short(q)
    size, window = options.pop("block_size"), options.pop("window_blocks")
    last = (q.shape[1] - 1) // size
    everywhere = [block if block >= 0 else last + 1 + block for block in options.pop("global_blocks")]
    plan = options.pop("plan")

    def sees(b: int, h: int, i: int, j: int) -> bool:
        mine, other = i // size, j // size
        if mine in everywhere or other in everywhere:
            return True
        return 2 * abs(mine - other) < window or other in plan[h, mine]

    return _scalar(q, k, v, sees, options)


@oracle("attention.bigbird")
def flex_bigbird(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """flex_attention with BigBird's blocks looked up in a table."""
    if 0 in q.shape:
        raise NotImplementedError
    torch = library("torch")
    size, window = options.pop("block_size"), options.pop("window_blocks")
    last = (q.shape[1] - 1) // size
    table = np.zeros((q.shape[2], last + 1, last + 1), dtype=bool)
    for block in options.pop("global_blocks"):
        table[:, block] = table[:, :, block] = True
    for h, i, draw in np.argwhere(options["plan"] >= 0):
        table[h, i, options["plan"][h, i, draw]] = True
    del options["plan"]
    blocks = torch.from_numpy(table)
    return flex(
        q, k, v, lambda b, h, i, j: blocks[h, i // size, j // size]
        | ((i // size - j // size).abs() * 2 < window), options,
    )  # fmt: skip
