"""What a kernel does to one score and to its gradient: `refimpl.attention.scores`, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuda_backend._numba import device_function
from cuda_backend.attention.user_device import mask_on_device, score_on_device
from cuda_backend.attention.variant_portable import Features
from cuda_backend.formats import widen
from cuda_backend.random import dropout_keeps

__all__ = ["score_gradient"]

_MINUS_INFINITY, _ZERO, _ONE = np.float32(-np.inf), np.float32(0), np.float32(1)


def score_gradient(features: Features) -> Any:
    """Return the device function of lines 11 to 20 of Algorithm 4, Dao et al. 2022, for one query and key.

    It takes q·k, dO·v, the log-sum-exp and rowsum(dO ∘ O) of the query, indices, lengths and the kernel's
    optional arrays and numbers, `whole` where a tile needs no mask function; it returns the probability after
    dropout, and the gradients of the score and of q·k.
    """
    CAUSAL, MASK, BIAS, ALIBI, SOFTCAP = (
        features.causal != "", features.mask, features.bias != "", features.alibi, features.softcap
    )  # fmt: skip
    PHILOX, KEPT = features.dropout == "philox", features.dropout == "mask"
    mods = features.mods
    MASK_MOD, SCORE_MOD = mods.mask is not None, mods.score is not None
    allows, modify, pull = (
        mask_on_device(mods.mask),
        score_on_device(mods.score),
        score_on_device(mods.vjp, 2),
    )
    load_bias = widen(features.bias or "float32")

    @device_function
    def gradient(
        product: Any, dp: Any, lse: Any, delta: Any,
        b: Any, h: Any, i: Any, j: Any, n_q: Any, n_k: Any, offset: Any,
        mask: Any, bias: Any, slopes: Any, kept: Any, whole: Any, aux: Any,
        scale: Any, softcap: Any, seed: Any, threshold: Any, kept_scale: Any,
    ) -> Any:  # fmt: skip
        # Masks select, they never multiply: 0 * inf would be NaN.  A query without keys has -inf for a
        # log-sum-exp, and exp(-inf - -inf) would be NaN too.
        allowed = i < n_q and j < n_k and lse != _MINUS_INFINITY
        if CAUSAL:
            allowed = allowed and j <= i + offset
        if MASK:
            allowed = allowed and mask[b, h, i, j]
        if MASK_MOD and allowed and not whole:
            allowed = allows(b, h, i, j, aux)
        if not allowed:
            return _ZERO, _ZERO, _ZERO
        score = product * scale
        slope = scale
        if SOFTCAP:
            bent = np.float32(math.tanh(score / softcap))
            score = softcap * bent
            slope = scale * (_ONE - bent * bent)
        if BIAS:
            score += load_bias(bias[b, h, i, j])
        if ALIBI:
            score -= slopes[h] * np.float32(abs(i + offset - j))
        before = score
        if SCORE_MOD:
            score = modify(score, b, h, i, j, aux)
        p = np.float32(math.exp(score - lse))
        factor = _ONE
        if PHILOX or KEPT:
            if PHILOX:
                keep = dropout_keeps(seed, threshold, b, h, i, j)
            else:
                keep = kept[b, h, i, j]
            factor = kept_scale if keep else _ZERO
        ds = p * (factor * dp - delta)
        dscore = ds
        if SCORE_MOD and p > _ZERO:  # a score that is masked may have no gradient
            dscore = pull(ds, before, b, h, i, j, aux)
        return factor * p, ds, dscore * slope

    return gradient
