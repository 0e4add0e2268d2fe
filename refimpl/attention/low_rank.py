"""Low-rank attention, Linformer's: keys and values are projected along the sequence first.

This is what the lecture's first slide titled LoRA describes; LoRA itself is a low-rank update of a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention_vjp
from refimpl.attention.key_mask import checked_key_mask
from refimpl.attention.online_softmax import softmax
from refimpl.attention.scores import attention_shape
from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Case, Option, Source, technique
from refimpl.validation import bind_axes, finite, floating

__all__ = ["LowRankGradients", "low_rank_attention", "low_rank_attention_vjp"]


class LowRankGradients(NamedTuple):
    """Gradients of the five arrays, in their shapes."""

    dq: FloatArray
    dk: FloatArray
    dv: FloatArray
    de: FloatArray
    df: FloatArray


def sample_low_rank(
    rng: np.random.Generator,
    *,
    B: int,
    Tq: int,
    Tk: int,
    R: int,
    Hkv: int,
    group: int,
    D: int,
    Dv: int,
    shared: bool = False,
    extra: str = "none",
) -> Case:
    """Return one call of low-rank attention, its arrays drawn from `rng`.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=5, R=3, Hkv=2, group=2, D=4, Dv=4)
    >>> [a.shape for a in sample_low_rank(np.random.default_rng(0), **shape).args[3:]]
    [(2, 3, 5), (2, 3, 5)]
    """
    q = rng.standard_normal((B, Tq, Hkv * group, D))
    k, v = rng.standard_normal((B, Tk, Hkv, D)), rng.standard_normal((B, Tk, Hkv, Dv))
    e, f = (rng.standard_normal((1 if shared else Hkv, R, Tk)) / max(Tk, 1) ** 0.5 for _ in range(2))
    if extra == "large":
        q = 3.0 * q  # more, and central differences are wrong by more than the gradient's bound
    if extra == "ties":
        k = np.ones_like(k)
    options: dict[str, Any] = {}
    if extra in ("key_mask", "masked"):
        options["key_mask"] = rng.random((B, Tk)) < (0.6 if extra == "key_mask" else 0.0)
    if extra == "scale":
        options["scale"] = 0.3
    return Case((q, k, v, e, f), options)


def low_rank_terms(case: Case) -> tuple[int, FloatArray]:
    """Return the length of the reductions and the sums of absolute terms: those of ``P (|F| |v|)``.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=5, R=3, Hkv=2, group=2, D=4, Dv=4)
    >>> low_rank_terms(sample_low_rank(np.random.default_rng(0), **shape))[0]
    12
    """
    q, k, v, e, f = case.args
    magnitude = case.replace(q, k, np.abs(v), e, np.abs(f)).call(low_rank_attention)
    return k.shape[1] + e.shape[1] + q.shape[3], magnitude


_AXES = {
    "B": (1, 2), "Tq": (1, 7), "Tk": (1, 9), "R": (1, 5),
    "Hkv": (1, 2), "group": (1, 2), "D": (1, 5), "Dv": (1, 5),
}  # fmt: skip
_EDGES: tuple[dict[str, Option], ...] = (
    {**dict.fromkeys(_AXES, 1), "extra": "none"},
    {"B": 0},
    {"Tq": 0, "Tk": 3, "R": 2},
    {"Tq": 3, "Tk": 0, "R": 2, "extra": "none"},
    {"Tq": 3, "Tk": 4, "R": 0, "extra": "none"},
    {"Tq": 3, "Tk": 4, "R": 6, "extra": "none"},
    {"Tq": 5, "Tk": 7, "R": 3, "extra": "large"},
    {"Tq": 5, "Tk": 7, "R": 3, "extra": "ties"},
    {"Tq": 5, "Tk": 7, "R": 3, "extra": "masked"},
)


@technique(
    "attention.low_rank",
    entries=(24,),
    kind="function",
    source=Source("Wang et al. 2020", "arXiv:2006.04768", "eq. 7"),
    axes=_AXES,
    options={"shared": (False, True), "extra": ("none", "key_mask", "scale")},
    edges=_EDGES,
    sample=sample_low_rank,
    terms=low_rank_terms,
    vjp="refimpl.attention.low_rank:low_rank_attention_vjp",
)
def low_rank_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    e: FloatArray,
    f: FloatArray,
    /,
    *,
    key_mask: BoolArray | None = None,
    scale: float | None = None,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``softmax(scale * q (E k)ᵀ) (F v)`` for each head: attention to R mixtures of the keys.

    Parameters
    ----------
    q : ndarray of float, shape (B, Tq, Hq, D)
        Queries.
    k, v : ndarray of float, shapes (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        Keys and values.  Hkv divides Hq; query head h reads key head ``h // (Hq // Hkv)``.
    e, f : ndarray of float, shape (Hkv, R, Tk) or (1, R, Tk)
        Projections of keys and of values along the sequence, one a key head or shared by all.  Passing the
        same array twice shares it between keys and values; the paper does both.
    key_mask : ndarray of bool, shape (B, Tk), optional
        True for a key, False for padding, which is set to 0 before the projections see it.
    scale : float, optional
        Factor on the scores.  Default ``D ** -0.5``.
    memory : Memory, optional
        Counts what a kernel moves that keeps the projected keys and values on chip, and its FLOPs.

    Returns
    -------
    ndarray of float, shape (B, Tq, Hq, Dv)
        In the common dtype of the arrays.

    Raises
    ------
    ShapeError
        If shared axes differ, Hkv does not divide Hq, or a projection has another length than the keys.
    DTypeError
        If an array is not real, or `key_mask` is not bool.
    OptionError
        If `scale` is not finite.

    Notes
    -----
    ``2 B R (Hkv Tk + Hq Tq) (D + Dv)`` FLOPs: linear in the length for fixed R.  **Special cases**

    - There is no causal form: every projected key mixes keys of the whole sequence, later ones too.
    - The length is fixed, because it is an axis of the projections' weights.
    - A sequence of padding alone, one without keys, and R = 0 give 0.

    References
    ----------
    .. [1] Wang et al., 2020, arXiv:2006.04768, eq. 7; sharing in section 4.

    Examples
    --------
    Two keys, projected to their mean: the output is the mean of the values.

    >>> q, mean = np.ones((1, 1, 1, 2)), np.full((1, 1, 2), 0.5)
    >>> v = np.array([2.0, 4.0]).reshape(1, 2, 1, 1)
    >>> low_rank_attention(q, np.ones((1, 2, 1, 2)), v, mean, mean).item()
    3.0
    """
    q, k, v, e, f = floating(q=q, k=k, v=v, e=e, f=f)
    mask, factor = _checked(q, k, v, e, f, key_mask, scale)
    hbm = memory or Memory()
    B, Hkv, group = k.shape[0], k.shape[2], q.shape[2] // k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    for b, h in np.ndindex(B, Hkv):
        heads, g = slice(h * group, (h + 1) * group), h % len(e)
        with hbm.on_chip():
            real = None if mask is None else hbm.load("key_mask", mask[b])[:, None]
            keys = _projected(hbm, "K", k[b, :, h], e[g], real)
            values = _projected(hbm, "V", v[b, :, h], f[g], real)
            scores = factor * hbm.contract("igd,rd->igr", hbm.load("Q", q[b, :, heads]), keys)
            hbm.store("O", out[b, :, heads], None, hbm.contract("igr,rd->igd", softmax(scores), values))
    return out


def _projected(
    hbm: Memory, name: str, tokens: FloatArray, weight: FloatArray, real: BoolArray | None
) -> FloatArray:
    """Return R mixtures of the tokens of one head, of those that are real."""
    rows = hbm.load(name, tokens)
    if real is not None:
        rows = np.where(real, rows, 0)
    return hbm.compute(f"{name} projected", hbm.contract("rj,jd->rd", hbm.load("weight", weight), rows))


def low_rank_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    e: FloatArray,
    f: FloatArray,
    do: FloatArray,
    /,
    *,
    key_mask: BoolArray | None = None,
    scale: float | None = None,
) -> LowRankGradients:
    """Return the gradients of ``sum(do * low_rank_attention(q, k, v, e, f))``.

    Parameters
    ----------
    q, k, v, e, f : ndarray of float
        As for `low_rank_attention`.
    do : ndarray of float, shape (B, Tq, Hq, Dv)
        Gradient of the output.
    key_mask, scale
        Those of the forward call.

    Returns
    -------
    LowRankGradients
        In the dtype of the arrays; 0 for keys and values of padding.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `low_rank_attention`.

    Notes
    -----
    Those of dense attention over ``E k`` and ``F v``, carried through the two products.

    References
    ----------
    .. [1] Wang et al., 2020, arXiv:2006.04768, eq. 7.

    Examples
    --------
    >>> x, mean = np.ones((1, 2, 1, 1)), np.full((1, 1, 2), 0.5)
    >>> low_rank_attention_vjp(x, x, x, mean, mean, x).dv.ravel()
    array([1., 1.])
    """
    q, k, v, e, f, do = floating(q=q, k=k, v=v, e=e, f=f, do=do)
    bind_axes({"q": (q, "B Tq Hq D"), "v": (v, "B Tk Hkv Dv"), "do": (do, "B Tq Hq Dv")})
    mask, factor = _checked(q, k, v, e, f, key_mask, scale)
    wide, dtype, Hkv = wide_dtype(q.dtype), q.dtype, k.shape[2]
    q, k, v, e, f, do = (widen(x).astype(wide, copy=False) for x in (q, k, v, e, f, do))
    if mask is not None:
        k, v = (np.where(mask[:, :, None, None], x, 0) for x in (k, v))
    all_e, all_f = (np.broadcast_to(x, (Hkv, *x.shape[1:])) for x in (e, f))
    keys, values = contract("hrj,bjhd->brhd", all_e, k), contract("hrj,bjhd->brhd", all_f, v)
    dq, dkeys, dvalues, _ = scaled_dot_product_attention_vjp(q, keys, values, do, scale=factor)
    dk, dv = contract("hrj,brhd->bjhd", all_e, dkeys), contract("hrj,brhd->bjhd", all_f, dvalues)
    if mask is not None:
        dk, dv = (np.where(mask[:, :, None, None], x, 0) for x in (dk, dv))
    de, df = contract("brhd,bjhd->hrj", dkeys, k), contract("brhd,bjhd->hrj", dvalues, v)
    if len(e) != Hkv:  # shared by the heads
        de, df = (x.sum(axis=0, keepdims=True) for x in (de, df))
    return LowRankGradients(*(round_to(x, dtype) for x in (dq, dk, dv, de, df)))


def _checked(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    e: FloatArray,
    f: FloatArray,
    key_mask: BoolArray | None,
    scale: float | None,
) -> tuple[BoolArray | None, float]:
    """Return the mask, checked as the arrays are, and the factor on the scores."""
    shape = attention_shape(q, k, v)
    sizes = bind_axes({"e": (e, "heads R Tk"), "f": (f, "heads R Tk")})
    if sizes["heads"] not in (1, shape.Hkv):
        raise ShapeError(f"e: expected a projection for each of {shape.Hkv} key heads or one, got {e.shape}")
    if sizes["Tk"] != shape.Tk:
        raise ShapeError(
            f"e: axis Tk must equal the number of keys, which the weights fix; got {sizes['Tk']}, "
            f"expected {shape.Tk} (k has shape {k.shape})"
        )
    mask = checked_key_mask(key_mask, shape.B, shape.Tk)
    return mask, shape.D**-0.5 if scale is None else finite("scale", scale)
