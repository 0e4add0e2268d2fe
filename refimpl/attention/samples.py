"""Cases on which attentions are judged: axes, options, edges, and arrays drawn from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import Case

__all__ = ["AXES", "EDGES", "OPTIONS", "attention_terms", "sample_attention", "sample_tiled_attention"]

AXES = {"B": (1, 2), "Tq": (1, 18), "Tk": (1, 18), "Hkv": (1, 2), "group": (1, 3), "D": (1, 9), "Dv": (1, 9)}

# One extra at a time, or all of them: an implementation that lacks one is still tried on the others.
EXTRAS = (
    "none",
    "scale",
    "attn_mask",
    "bias",
    "alibi_slopes",
    "softcap",
    "softcap_and_bias",  # their order shows only together
    "lengths",
    "dropout",
    "all",
)
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "causal": (False, "top_left", "bottom_right"),
    "extra": EXTRAS,
    "return_lse": (False, True),
}

_PLAIN: dict[str, int | str | bool] = {"causal": False, "extra": "none", "return_lse": False}
EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_PLAIN, "B": 1, "Tq": 1, "Tk": 1, "Hkv": 1, "group": 1, "D": 1, "Dv": 1},
    {**_PLAIN, "B": 0, "Tq": 3},
    {**_PLAIN, "Tq": 0, "Tk": 3},
    {**_PLAIN, "Tq": 3, "Tk": 0, "return_lse": True},
    {**_PLAIN, "Tq": 17, "Tk": 33, "D": 16, "Dv": 8},
    {**_PLAIN, "Tq": 9, "Tk": 9, "causal": "top_left"},
    {**_PLAIN, "Tq": 9, "Tk": 9, "D": 8, "Dv": 8, "extra": "attn_mask"},
    {**_PLAIN, "Tq": 5, "Tk": 12, "causal": "top_left"},
    {**_PLAIN, "Tq": 5, "Tk": 12, "causal": "bottom_right"},
    {**_PLAIN, "Tq": 12, "Tk": 5, "causal": "bottom_right", "return_lse": True},
    {**_PLAIN, "Tq": 7, "Tk": 11, "extra": "attn_mask", "return_lse": True},
    {**_PLAIN, "Tq": 7, "Tk": 11, "extra": "large", "return_lse": True},
    {**_PLAIN, "Tq": 6, "Tk": 6, "extra": "ties"},
    {**_PLAIN, "Tq": 8, "Tk": 16, "extra": "all", "causal": "bottom_right", "return_lse": True},
    # Plain calls that a function without grouped heads takes too: both alignments, and more than one block.
    {**_PLAIN, "Tq": 5, "Tk": 12, "group": 1, "causal": "top_left"},
    {**_PLAIN, "Tq": 5, "Tk": 12, "group": 1, "causal": "bottom_right"},
    {**_PLAIN, "B": 1, "Tq": 65, "Tk": 129, "Hkv": 1, "group": 1, "D": 8, "Dv": 8},
    {**_PLAIN, "B": 1, "Tq": 65, "Tk": 65, "Hkv": 1, "group": 1, "D": 16, "Dv": 16, "causal": "top_left"},
)


def sample_attention(
    rng: np.random.Generator,
    *,
    B: int,
    Tq: int,
    Tk: int,
    Hkv: int,
    group: int,
    D: int,
    Dv: int,
    causal: bool | str = False,
    extra: str = "none",
    return_lse: bool = False,
) -> Case:
    """Return one call of an attention, its arrays drawn from `rng` in float64.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    B, Tq, Tk, Hkv, group, D, Dv : int
        Sequences, queries, keys, key heads, query heads a key head, head width, value width.
    causal : {False, True, "top_left", "bottom_right"}
        As for `scaled_dot_product_attention`.
    extra : str
        One of `EXTRAS`; ``"large"`` gives scores in the hundreds, ``"ties"`` equal ones.
    return_lse : bool
        Ask for the log-sum-exp too.

    Returns
    -------
    Case
        ``(q, k, v)`` and the options that differ from their defaults.

    Examples
    --------
    >>> case = sample_attention(np.random.default_rng(0), B=1, Tq=2, Tk=3, Hkv=1, group=2, D=4, Dv=5)
    >>> [a.shape for a in case.args], dict(case.kwargs)
    ([(1, 2, 2, 4), (1, 3, 1, 4), (1, 3, 1, 5)], {})
    """
    H = Hkv * group
    q = rng.standard_normal((B, Tq, H, D))
    k = rng.standard_normal((B, Tk, Hkv, D))
    v = rng.standard_normal((B, Tk, Hkv, Dv))
    if extra == "large":
        q = 30.0 * q
    if extra == "ties":
        q, k = np.ones_like(q), np.ones_like(k)
    options: dict[str, Any] = {}
    if causal is not False:
        options["causal"] = causal
    if return_lse:
        options["return_lse"] = True
    if extra in ("scale", "all"):
        options["scale"] = 0.3
    if extra in ("attn_mask", "all"):
        mask = rng.random((B, 1, Tq, Tk)) < 0.7
        mask[:, :, : Tq // 3] &= rng.random((B, 1, Tq // 3, 1)) < 0.5  # some rows attend to nothing
        options["attn_mask"] = mask
    if extra in ("bias", "softcap_and_bias", "all"):
        options["bias"] = rng.standard_normal((1, H, Tq, Tk))
    if extra in ("alibi_slopes", "all") and (causal is not False or (Tq == Tk and extra != "all")):
        options["alibi_slopes"] = 2.0 ** -np.arange(1.0, H + 1)
    if extra in ("softcap", "softcap_and_bias", "all"):
        options["softcap"] = 2.0
    if extra in ("lengths", "all"):
        options["q_lengths"] = rng.integers(0, Tq + 1, B)
        options["k_lengths"] = rng.integers(0, Tk + 1, B)
    if extra in ("dropout", "all"):
        options["dropout_p"] = 0.25
        options["rng"] = int(rng.integers(2**63))
    return Case((q, k, v), options)


def attention_terms(case: Case) -> tuple[int, Any]:
    """Return the length of the reductions and, for each output, the sum of absolute terms.

    An output is a sum over keys of p·v, so its terms sum to the attention over abs(v); a log-sum-exp is no
    sum of large terms, so its own size stands for them.

    Examples
    --------
    >>> case = sample_attention(np.random.default_rng(0), B=1, Tq=2, Tk=3, Hkv=1, group=1, D=4, Dv=5)
    >>> attention_terms(case)[0]
    7
    """
    from refimpl.attention.dense import AttentionOutput, scaled_dot_product_attention

    q, k, v = case.args[:3]
    n = k.shape[1] + q.shape[3]
    untiled = case.without("block_sizes", "sram")
    magnitude = untiled.replace(q, k, np.abs(v)).call(scaled_dot_product_attention)
    if isinstance(magnitude, AttentionOutput):
        lse: FloatArray = np.where(np.isfinite(magnitude.lse), np.abs(magnitude.lse), 0.0) + 1.0
        return n, AttentionOutput(magnitude.out, lse)
    return n, magnitude


def sample_tiled_attention(rng: np.random.Generator, *, blocks: str = "default", **shape: Any) -> Case:
    """Return one call of a tiled attention: `sample_attention` and block sizes.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    blocks : str
        ``"default"``, ``"ROWSxCOLUMNS"``, or ``"sram"`` for the sizes that an SRAM of 50 elements gives.
    **shape
        As for `sample_attention`.

    Returns
    -------
    Case
        With ``block_sizes`` or ``sram`` among the options.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=3, Hkv=1, group=2, D=4, Dv=5)
    >>> sample_tiled_attention(np.random.default_rng(0), blocks="3x5", **shape).kwargs
    {'block_sizes': (3, 5)}
    """
    case = sample_attention(rng, **shape)
    if blocks == "default":
        return case
    if blocks == "sram":
        return case.replace(sram=50)
    rows, columns = blocks.split("x")
    return case.replace(block_sizes=(int(rows), int(columns)))
