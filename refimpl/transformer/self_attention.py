"""Self-attention as a layer: projections, rotary positions, the cache, and the registered attention.

Without positions and cache it is `refimpl.attention.multi_head_attention`; a law says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention, scaled_dot_product_attention_vjp
from refimpl.attention.scores import AttentionOptions
from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, IntArray
from refimpl.transformer.kv_cache import LayerCache, extended
from refimpl.transformer.linear import linear, linear_vjp
from refimpl.transformer.rotary import Rope, rotary, rotary_vjp

__all__ = ["Weights", "self_attention", "self_attention_vjp"]

Weights = Mapping[str, FloatArray]


def self_attention(
    x: FloatArray,
    weights: Weights,
    /,
    *,
    num_heads: int,
    num_kv_heads: int,
    rope: Rope | None = None,
    past: LayerCache | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[FloatArray, LayerCache]:
    """Return the attention of new tokens over the past and themselves, and the cache with them in it.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        New tokens.
    weights : mapping of str to ndarray
        ``w_q, w_k, w_v, w_o`` and perhaps ``b_q, b_k, b_v, b_o``, as for `multi_head_attention`.
    num_heads, num_kv_heads : int
        Hq and Hkv.
    rope : Rope, optional
        Rotary positions, counted on from the past.
    past : LayerCache, optional
        Keys and values of the tokens before.
    **options
        Those of `scaled_dot_product_attention`.

    Returns
    -------
    tuple of ndarray and LayerCache
        Shape (B, T, M'), and keys and values of past and new tokens.

    Examples
    --------
    >>> eye = {name: np.eye(4) for name in ("w_q", "w_k", "w_v", "w_o")}
    >>> y, cache = self_attention(np.ones((1, 2, 4)), eye, num_heads=2, num_kv_heads=2)
    >>> y.shape, cache.k.shape
    ((1, 2, 4), (1, 2, 2, 2))
    """
    positions = np.arange(x.shape[1]) + (0 if past is None else past.k.shape[1])
    q, k, v = _heads(x, weights, positions, num_heads, num_kv_heads, rope)
    present = extended(past, k, v)
    out = scaled_dot_product_attention(q, *present, **options)
    return linear(_joined(out), weights["w_o"], weights.get("b_o"), name="w_o"), present


def self_attention_vjp(
    x: FloatArray,
    weights: Weights,
    dy: FloatArray,
    /,
    *,
    num_heads: int,
    num_kv_heads: int,
    rope: Rope | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Return the gradients of ``sum(dy * self_attention(x, weights, ...)[0])``, without a past.

    Parameters
    ----------
    x, weights, num_heads, num_kv_heads, rope, **options
        As for `self_attention`.
    dy : ndarray of float, shape (B, T, M')
        Gradient of the output.

    Returns
    -------
    tuple of ndarray and dict
        That of `x`, and those of the weights by name.

    Examples
    --------
    >>> eye, x = {name: np.eye(4) for name in ("w_q", "w_k", "w_v", "w_o")}, np.ones((1, 2, 4))
    >>> sorted(self_attention_vjp(x, eye, x, num_heads=2, num_kv_heads=2)[1])
    ['w_k', 'w_o', 'w_q', 'w_v']
    """
    positions = np.arange(x.shape[1])
    q, k, v = _heads(x, weights, positions, num_heads, num_kv_heads, rope)
    out = scaled_dot_product_attention(q, k, v, **options)
    djoined, dw_o, db_o = linear_vjp(_joined(out), weights["w_o"], dy)
    dq, dk, dv, _ = scaled_dot_product_attention_vjp(q, k, v, djoined.reshape(out.shape), **options)
    if rope is not None:
        dq, dk = (
            rotary_vjp(g, positions, g, pairing=rope.pairing, base=rope.base, rotated=rope.rotated).dx
            for g in (dq, dk)
        )
    found = {"w_o": dw_o, "b_o": db_o}
    dx = np.zeros_like(x)
    for name, gradient in zip("qkv", (dq, dk, dv), strict=True):
        dpart, found[f"w_{name}"], found[f"b_{name}"] = linear_vjp(x, weights[f"w_{name}"], _joined(gradient))
        dx = dx + dpart
    return dx, {name: gradient for name, gradient in found.items() if name in weights}


def _heads(
    x: FloatArray,
    weights: Weights,
    positions: IntArray,
    num_heads: int,
    num_kv_heads: int,
    rope: Rope | None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return queries, keys and values, cut into heads and turned."""
    if x.ndim != 3:
        raise ShapeError(f"x: expected 3 axes (B, T, M), got shape {x.shape}")
    q, k, v = (
        _cut(linear(x, weights[f"w_{name}"], weights.get(f"b_{name}"), name=f"w_{name}"), count, f"w_{name}")
        for name, count in zip("qkv", (num_heads, num_kv_heads, num_kv_heads), strict=True)
    )
    if rope is None:
        return q, k, v
    q, k = (rotary(a, positions, pairing=rope.pairing, base=rope.base, rotated=rope.rotated) for a in (q, k))
    return q, k, v


def _cut(projected: FloatArray, count: int, name: str) -> FloatArray:
    B, T, width = projected.shape
    if count < 1 or width % count:
        raise ShapeError(f"{name}: {width} columns do not divide into {count} heads")
    return projected.reshape(B, T, count, width // count)


def _joined(heads: FloatArray) -> FloatArray:
    B, T, H, D = heads.shape
    return heads.reshape(B, T, H * D)
