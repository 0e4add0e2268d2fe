"""Algorithms 0 and 3 of the FlashAttention paper: attention with the score matrix kept in HBM.

The values are those of `scaled_dot_product_attention`; what this file adds is the traffic.  Every matrix is
read and written whole, and what goes through `Memory` is counted: the forward pass moves ``4 N d + 4 N**2``
elements a head, the backward pass ``8 N d + 7 N**2``, whatever the size of the SRAM.
"""

from __future__ import annotations

from typing import Unpack

import numpy as np

from refimpl.attention.dense import AttentionGradients, AttentionOutput
from refimpl.attention.online_softmax import softmax
from refimpl.attention.samples import AXES, EDGES, OPTIONS, attention_terms, sample_attention
from refimpl.attention.scores import AttentionOptions, ScoreRule, backward_rule, score_rule
from refimpl.errors import UnsupportedError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import bind_axes, floating

__all__ = ["standard_attention", "standard_attention_vjp"]

_DAO = "Dao et al. 2022"
_ARXIV = "arXiv:2205.14135"


@implements("attention.dense", backend="numpy")
@technique(
    "attention.standard",
    entries=(28,),
    kind="function",
    source=Source(_DAO, _ARXIV, "Algorithm 0"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_attention,
    terms=attention_terms,
    vjp="refimpl.attention.standard:standard_attention_vjp",
)
def standard_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    return_lse: bool = False,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention computed in three passes over HBM: S = QKᵀ, P = softmax(S), O = PV.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `scaled_dot_product_attention`.
    return_lse : bool
        Also return the log-sum-exp, which costs no traffic here: it is a by-product of the second pass.
    memory : Memory, optional
        Counts what moves.
    **options
        Those of `scaled_dot_product_attention`, applied on chip; libraries that apply masks and dropout in
        passes of their own move more.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention`.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, Algorithm 0.

    Examples
    --------
    Four passes over the N x N scores and four over N x d operands:

    >>> hbm, x = Memory(), np.ones((1, 8, 1, 2))
    >>> _ = standard_attention(x, x, x, memory=hbm)
    >>> hbm.elements_read + hbm.elements_written == 4 * 8 * 2 + 4 * 8**2
    True
    """
    q, k, v = floating(q=q, k=k, v=v)
    rule = score_rule(q, k, v, **options)
    hbm = memory or Memory()
    shape = rule.shape
    out = np.empty((shape.B, shape.Tq, shape.Hq, shape.Dv), q.dtype)
    lse = np.empty((shape.B, shape.Hq, shape.Tq), wide_dtype(q.dtype))
    for b, h in np.ndindex(shape.B, shape.Hq):
        p, lse[b, h] = _probabilities(hbm, q[b, :, h], k[b, :, h // shape.group], rule, b, h)
        with hbm.on_chip():
            weights = hbm.load("P", p)
            keep = _keep(rule, b, h)
            dropped = weights if keep is None else round_to(weights * keep, p.dtype)
            o = contract("ij,jd->id", dropped, hbm.load("V", v[b, :, h // shape.group]))
            hbm.store("O", out[b, :, h], None, o)
    return AttentionOutput(out, lse) if return_lse else out


@technique(
    "attention.standard_backward",
    entries=(28, 30),
    kind="function",
    source=Source(_DAO, _ARXIV, "Algorithm 3"),
    axes=AXES,
    options={**OPTIONS, "return_lse": (False,)},
    edges=tuple({**edge, "return_lse": False} for edge in EDGES),
    sample=lambda rng, **shape: _sample_backward(rng, **shape),
    kernel_factor=3.0,
)
def standard_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of attention from the probabilities that the forward pass left in HBM.

    Parameters
    ----------
    q, k, v, do : ndarray of float
        As for `scaled_dot_product_attention_vjp`.
    memory : Memory, optional
        Counts what the backward pass moves; making P is the forward pass and is not counted.
    **options
        Those of the forward call, without `softcap`.

    Returns
    -------
    AttentionGradients
        Without the gradient of a bias: Algorithm 3 has none.

    Raises
    ------
    UnsupportedError
        With `softcap`, whose derivative needs the scores, and Algorithm 3 keeps only P.
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention_vjp`.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, appendix B.4, Algorithm 3.

    Examples
    --------
    >>> hbm, x = Memory(), np.ones((1, 8, 1, 2))
    >>> _ = standard_attention_vjp(x, x, x, x, memory=hbm)
    >>> hbm.elements_read + hbm.elements_written == 8 * 8 * 2 + 7 * 8**2
    True
    """
    if options.get("softcap") is not None:
        raise UnsupportedError("softcap: its derivative needs the scores; Algorithm 3 keeps only P")
    q, k, v, do = floating(q=q, k=k, v=v, do=do)
    bind_axes({"q": (q, "B Tq Hq D"), "v": (v, "B Tk Hkv Dv"), "do": (do, "B Tq Hq Dv")})
    rule = backward_rule(q, k, v, **options)
    hbm = memory or Memory()
    dq, dk, dv = (np.zeros(x.shape, wide_dtype(q.dtype)) for x in (q, k, v))
    for b, h in np.ndindex(rule.shape.B, rule.shape.Hq):
        g = h // rule.shape.group
        p, _ = _probabilities(Memory(), q[b, :, h], k[b, :, g], rule, b, h)
        keep = _keep(rule, b, h)
        dp, ds, head_dq, head_dk, head_dv = (
            np.empty(size, q.dtype)
            for size in (p.shape, p.shape, q[b, :, h].shape, k[b, :, g].shape, v[b, :, g].shape)
        )
        with hbm.on_chip():
            weights = hbm.load("P", p)
            dropped = weights if keep is None else round_to(weights * keep, p.dtype)
            hbm.store("dV", head_dv, None, contract("ij,id->jd", dropped, hbm.load("dO", do[b, :, h])))
        with hbm.on_chip():
            product = contract("id,jd->ij", hbm.load("dO", do[b, :, h]), hbm.load("V", v[b, :, g]))
            hbm.store("dP", dp, None, product if keep is None else product * keep)
        with hbm.on_chip():
            weights, gradient = hbm.load("P", p), hbm.load("dP", dp)
            rows = np.sum(weights * gradient, axis=-1, keepdims=True)
            hbm.store("dS", ds, None, rule.product_gradient(weights * (gradient - rows), gradient))
        with hbm.on_chip():
            hbm.store(
                "dQ", head_dq, None, contract("ij,jd->id", hbm.load("dS", ds), hbm.load("K", k[b, :, g]))
            )
        with hbm.on_chip():
            hbm.store(
                "dK", head_dk, None, contract("ij,id->jd", hbm.load("dS", ds), hbm.load("Q", q[b, :, h]))
            )
        dq[b, :, h] += widen(head_dq)
        dk[b, :, g] += widen(head_dk)
        dv[b, :, g] += widen(head_dv)
    return AttentionGradients(round_to(dq, q.dtype), round_to(dk, q.dtype), round_to(dv, q.dtype))


def _probabilities(
    hbm: Memory, q: FloatArray, k: FloatArray, rule: ScoreRule, b: int, h: int
) -> tuple[FloatArray, FloatArray]:
    """Return P of one head, written to HBM after S was, and the log-sum-exp of its rows."""
    s = np.empty((q.shape[0], k.shape[0]), q.dtype)
    p = np.empty_like(s)
    everywhere = np.asarray(b), np.asarray(h), np.arange(q.shape[0]), np.arange(k.shape[0])
    with hbm.on_chip():
        product = contract("id,jd->ij", hbm.load("Q", q), hbm.load("K", k))
        hbm.store("S", s, None, rule.scores(product, *everywhere))
    with hbm.on_chip():
        weights, lse = softmax(hbm.load("S", s).astype(wide_dtype(s.dtype), copy=False), return_lse=True)
        hbm.store("P", p, None, weights)
    return p, lse


def _keep(rule: ScoreRule, b: int, h: int) -> FloatArray | None:
    return rule.keep(np.asarray(b), np.asarray(h), np.arange(rule.shape.Tq), np.arange(rule.shape.Tk))


def _sample_backward(rng: np.random.Generator, **shape: int | str | bool) -> Case:
    """Return a call of the backward pass: an attention's arrays, and a gradient of its output."""
    case = sample_attention(rng, **shape).without("softcap")  # type: ignore[arg-type]
    q, k, v = case.args
    return case.replace(q, k, v, rng.standard_normal((*q.shape[:3], v.shape[3])))
