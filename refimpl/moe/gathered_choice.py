"""Expert choice by indices: each expert gathers its tokens into a buffer, which it fills exactly.

This is how the layer is run: no masks, no empty places, one product for all experts (Zhou et al. 2022,
section 3.2: permutation P, input X_in = P X, and the output scattered back).
"""

from __future__ import annotations

from typing import Unpack

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.moe.expert_ffn import ExpertOptions, expert_ffn
from refimpl.moe.routing import router_logits, top_k_indices
from refimpl.numerics import BoolArray, FloatArray, round_to, wide_dtype, widen
from refimpl.registry import implements
from refimpl.validation import floating

__all__ = ["gathered_expert_choice"]


@implements("moe.expert_choice", backend="numpy")
def gathered_expert_choice(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    capacity: int,
    padding_mask: BoolArray | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return `refimpl.moe.expert_choice.expert_choice`, computed on buffers of shape (E, C, D).

    Parameters
    ----------
    x, w_router, w_in, w_out, capacity, padding_mask, **options
        As for `expert_choice`.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the dtype of `x`.

    Examples
    --------
    >>> x, w = np.array([[1.0], [2.0]]), np.stack([np.eye(1), 10 * np.eye(1)])
    >>> gathered_expert_choice(x, np.zeros((1, 2)), w, np.ones((2, 1, 1)), capacity=1)
    array([[5.5],
           [0. ]])
    """
    x, w_in, w_out = floating(x=x, w_in=w_in, w_out=w_out)
    shares = softmax(router_logits(x, w_router))
    if padding_mask is not None:
        shares = shares * np.asarray(padding_mask)[:, None]
    total = np.zeros(x.shape, wide_dtype(x.dtype))
    if not capacity:
        return round_to(total, x.dtype)
    tokens = top_k_indices(shares.T, capacity)  # (E, C)
    gates = np.take_along_axis(shares.T, tokens, axis=1)
    out = expert_ffn(x[tokens], w_in, w_out, **options)
    np.add.at(total, tokens, gates[..., None] * widen(out))
    return round_to(total, x.dtype)
