"""A decoder block with a cache: new tokens after a past, and a whole sequence one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.errors import UnsupportedError
from refimpl.numerics import FloatArray, round_to
from refimpl.registry import implements
from refimpl.transformer.block_layers import checked_decoder
from refimpl.transformer.blocks import decoder
from refimpl.transformer.kv_cache import LayerCache

__all__ = ["cached_decoder", "decoder_token_by_token"]


def cached_decoder(
    x: FloatArray, past: LayerCache | None, /, **options: Any
) -> tuple[FloatArray, LayerCache]:
    """Return a decoder block's output for new tokens after a past, and the cache with them in it.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        New tokens: one in plain decoding, several when a draft is verified.
    past : LayerCache or None
        What the last call returned.
    **options
        Those of `decoder`.  The context's keys are computed anew in every call.

    Returns
    -------
    tuple of ndarray and LayerCache
        Rows of what `decoder` gives for all tokens at once.

    Examples
    --------
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> y, past = cached_decoder(np.array([[[3.0, 1.0]]]), None, num_heads=1, **weights)
    >>> past.k.shape
    (1, 1, 1, 2)
    """
    present: list[LayerCache] = []
    layer, block = checked_decoder(x, options, past=past, present=present)
    return round_to(layer.forward(block.x), block.dtype), present[0]


@implements("transformer.decoder", backend="numpy", tier="kv cache")
def decoder_token_by_token(x: FloatArray, /, **options: Any) -> FloatArray:
    """Return what `decoder` gives, one token at a time through the cache.

    Parameters
    ----------
    x, **options
        As for `decoder`.

    Returns
    -------
    ndarray of float, shape (B, T, M)
        Equal to `decoder`.

    Raises
    ------
    UnsupportedError
        For options with an axis of queries, whose rows this loop does not cut.

    Examples
    --------
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> decoder_token_by_token(np.array([[[3.0, 1.0], [0.0, 5.0]]]), num_heads=1, **weights).round(3)
    array([[[ 1., -1.],
            [-1.,  1.]]])
    """
    by_query = [
        name for name in ("attn_mask", "bias", "dropout_p", "q_lengths", "k_lengths") if name in options
    ]
    if by_query:
        raise UnsupportedError(f"one token at a time takes no {', '.join(by_query)}")
    rows, past = [], None
    for t in range(x.shape[1]):
        y, past = cached_decoder(x[:, t : t + 1], past, **options)
        rows.append(y)
    return np.concatenate(rows, axis=1) if rows else decoder(x, **options)
