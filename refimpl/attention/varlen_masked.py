"""Packed sequences as one long one, with a mask that says which keys each query sees: as kernels see them."""

from __future__ import annotations

from typing import Any

from refimpl.attention import mods
from refimpl.attention.dense import AttentionGradients, AttentionOutput
from refimpl.attention.flexible import flexible_attention, flexible_attention_vjp
from refimpl.attention.scores import Causal
from refimpl.attention.varlen import EVERYWHERE, Packing, key_ranges, packing
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import implements
from refimpl.validation import floating

__all__ = ["varlen_attention_masked", "varlen_attention_masked_vjp"]


def _options(
    pack: Packing,
    causal: Causal,
    window_size: tuple[int, int],
    softcap: float | None,
    scale: float | None,
) -> dict[str, Any]:
    found = {"scale": scale, "mask_mod": mods.ranges(), "aux": key_ranges(pack, causal, window_size)}
    if softcap is not None:
        found |= {"score_mod": mods.softcap(softcap), "score_mod_vjp": mods.softcap_vjp(softcap)}
    return found


@implements("attention.varlen", backend="numpy", tier="masked")
def varlen_attention_masked(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    /,
    *,
    causal: Causal = False,
    window_size: tuple[int, int] = EVERYWHERE,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> FloatArray | AttentionOutput:
    """Return `varlen_attention`, computed as `flexible_attention` with the mask `mods.ranges`.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, softcap, scale, return_lse
        As for `varlen_attention`.

    Returns
    -------
    ndarray or AttentionOutput
        As `varlen_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `varlen_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> x, starts = np.array([1.0, 3.0, 5.0]).reshape(3, 1, 1), np.array([0, 2, 3])
    >>> varlen_attention_masked(0 * x, x, x, starts, starts).ravel()
    array([2., 2., 5.])
    """
    q, k, v = floating(q=q, k=k, v=v)
    pack = packing(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal)
    options = _options(pack, causal, window_size, softcap, scale)
    found: Any = flexible_attention(q[None], k[None], v[None], return_lse=return_lse, **options)
    return AttentionOutput(found.out[0], found.lse[0]) if return_lse else found[0]


def varlen_attention_masked_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    do: FloatArray,
    /,
    *,
    causal: Causal = False,
    window_size: tuple[int, int] = EVERYWHERE,
    softcap: float | None = None,
    scale: float | None = None,
) -> AttentionGradients:
    """Return the gradients of `varlen_attention_masked`.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, do, causal, window_size, softcap, scale
        As for `varlen_attention_vjp`.

    Returns
    -------
    AttentionGradients
        As `varlen_attention_vjp`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `varlen_attention`.
    """
    q, k, v, do = floating(q=q, k=k, v=v, do=do)
    pack = packing(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal)
    options = _options(pack, causal, window_size, softcap, scale)
    found = flexible_attention_vjp(q[None], k[None], v[None], do[None], **options)
    return AttentionGradients(found.dq[0], found.dk[0], found.dv[0])
