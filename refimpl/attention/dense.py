"""Scaled dot-product attention, all scores at once: the definition that every other attention is held to."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack, overload

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.attention.output_spread import lse_spread
from refimpl.attention.samples import AXES, EDGES, OPTIONS, attention_terms, sample_attention
from refimpl.attention.scores import AttentionOptions, Causal, ScoreRule, backward_rule, score_rule
from refimpl.numerics import BoolArray, FloatArray, IntArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Source, technique
from refimpl.validation import bind_axes, floating

__all__ = [
    "AttentionGradients",
    "AttentionOutput",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_vjp",
]


class AttentionOutput(NamedTuple):
    """The output, shape (B, Tq, Hq, Dv), and the log-sum-exp of each row of scores, shape (B, Hq, Tq)."""

    out: FloatArray
    lse: FloatArray


class AttentionGradients(NamedTuple):
    """Gradients of q, k and v, in their shapes, and of the bias if one was given."""

    dq: FloatArray
    dk: FloatArray
    dv: FloatArray
    dbias: FloatArray | None = None


@overload
def scaled_dot_product_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray: ...
@overload
def scaled_dot_product_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> AttentionOutput: ...
@technique(
    "attention.dense",
    entries=(8,),
    kind="function",
    source=Source("Vaswani et al. 2017", "arXiv:1706.03762", "eq. 1"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_attention,
    terms=attention_terms,
    spread=lambda case: lse_spread(scaled_dot_product_attention, case),
    vjp="refimpl.attention.dense:scaled_dot_product_attention_vjp",
)
def scaled_dot_product_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    causal: Causal = False,
    attn_mask: BoolArray | None = None,
    bias: FloatArray | None = None,
    alibi_slopes: FloatArray | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_lengths: IntArray | None = None,
    k_lengths: IntArray | None = None,
    dropout_p: float = 0.0,
    rng: np.random.Generator | int | None = None,
    dropout_mask: BoolArray | None = None,
    return_lse: bool = False,
) -> FloatArray | AttentionOutput:
    """Return ``softmax(scale * q kᵀ + bias) v`` for each head, over the keys that a query may attend to.

    Parameters
    ----------
    q : ndarray of float, shape (B, Tq, Hq, D)
        Queries.
    k : ndarray of float, shape (B, Tk, Hkv, D)
        Keys.  Hkv divides Hq; query head h reads key head ``h // (Hq // Hkv)`` (grouped heads; Hkv = 1 is
        multi-query attention).
    v : ndarray of float, shape (B, Tk, Hkv, Dv)
        Values; Dv may differ from D.
    causal : bool or {"top_left", "bottom_right"}
        Query i attends to key j only if ``j <= i`` ("top_left") or ``j <= i + Tk - Tq`` ("bottom_right":
        the last query sees every key, as in decoding).  With lengths, Tq and Tk are each sequence's own.
        True says "top_left" and is refused where they differ, because libraries disagree there.  For Tq = 2,
        Tk = 4::

            top_left  1 0 0 0    bottom_right  1 1 1 0
                      1 1 0 0                  1 1 1 1

    attn_mask : ndarray of bool, broadcastable to (B, Hq, Tq, Tk), optional
        True where a query may attend to a key.
    bias : ndarray of float, broadcastable to (B, Hq, Tq, Tk), optional
        Added to the scores after `softcap`.  An entry of -inf masks.
    alibi_slopes : ndarray of float, shape (Hq,), optional
        Subtracts ``slope * |i + offset - j|``, offset ``Tk - Tq`` for "bottom_right" and 0 otherwise [2]_.
    softcap : float, optional
        Replaces a score s by ``softcap * tanh(s / softcap)``, before bias and masks [3]_.
    scale : float, optional
        Factor on q·k.  Default ``D ** -0.5``: the width of a head, not of the model.
    q_lengths, k_lengths : ndarray of int, shape (B,), optional
        Valid queries and keys of each sequence; the rest is padding.
    dropout_p : float
        Probability in [0, 1) of dropping an attention weight; kept ones are scaled by ``1 / (1 - p)``.
    rng : numpy.random.Generator or int, optional
        Seed of the Philox words that decide what is dropped (`refimpl.random.dropout_keep`).
    dropout_mask : ndarray of bool, broadcastable to (B, Hq, Tq, Tk), optional
        The draws themselves, True where a weight is kept, instead of `rng`.
    return_lse : bool
        Also return the natural log-sum-exp of each row of scores, before dropout.

    Returns
    -------
    ndarray of float, shape (B, Tq, Hq, Dv)
        In the common dtype of q, k and v; or `AttentionOutput` if `return_lse`, its `lse` of shape
        (B, Hq, Tq) in float32, for float64 inputs in float64.

    Raises
    ------
    ShapeError
        If shared axes differ, Hkv does not divide Hq, or an option does not broadcast.
    DTypeError
        If an array is not real, or `attn_mask` is not bool (additive masks go to `bias`).
    OptionError
        If an option is out of range, or the causal alignment is ambiguous.

    Notes
    -----
    ``4 B Hq Tq Tk D`` FLOPs for D = Dv.  **Special cases**

    - A row with no attended key gives 0, and -inf as its log-sum-exp.
    - Infinite or NaN scores behind a mask change nothing; NaN in a masked value does (0 * NaN).
    - float16 scores and weights are rounded to float16, as if written to memory, and summed in float32.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, eq. 1.
    .. [2] Press et al., 2022, arXiv:2108.12409, section 3.
    .. [3] Gemma Team, 2024, arXiv:2408.00118, section 2.

    Examples
    --------
    Equal keys share their values equally:

    >>> q, k = np.ones((1, 1, 1, 8)), np.ones((1, 2, 1, 8))
    >>> v = np.array([2.0, 4.0]).reshape(1, 2, 1, 1)
    >>> scaled_dot_product_attention(q, k, v).item()
    3.0
    """
    q, k, v = floating(q=q, k=k, v=v)
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    rule = score_rule(
        q,
        k,
        v,
        causal=causal,
        attn_mask=attn_mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        q_lengths=q_lengths,
        k_lengths=k_lengths,
        dropout_p=dropout_p,
        rng=rng,
        dropout_mask=dropout_mask,
    )
    _, p, lse = _probabilities(q, k, rule)
    keep = rule.keep(*_everywhere(rule))
    dropped = p if keep is None else round_to(p * keep, p.dtype)
    out = round_to(contract("bhij,bjhd->bihd", dropped, _repeat(v, rule)), dtype)
    return AttentionOutput(out, lse) if return_lse else out


def scaled_dot_product_attention_vjp(
    q: FloatArray, k: FloatArray, v: FloatArray, do: FloatArray, /, **options: Unpack[AttentionOptions]
) -> AttentionGradients:
    """Return the gradients of ``sum(do * scaled_dot_product_attention(q, k, v, **options))``.

    Parameters
    ----------
    q, k, v : ndarray of float
        As for `scaled_dot_product_attention`.
    do : ndarray of float, shape (B, Tq, Hq, Dv)
        Gradient of the output.
    **options
        Those of the forward call; with dropout, the same integer seed or the same mask.

    Returns
    -------
    AttentionGradients
        In the dtype of the arrays; `dbias` in the shape of `bias`, if one was given.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `scaled_dot_product_attention`.

    Notes
    -----
    With dropout factors Z: ``dV = (P ∘ Z)ᵀ dO``, ``dP = (dO Vᵀ) ∘ Z``, ``dS = P ∘ (dP - rowsum(P ∘ dP))``.
    A masked score gets 0 because its probability is 0.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, appendix B.2.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 4))
    >>> scaled_dot_product_attention_vjp(x, x, x, x).dv[0, :, 0, 0]
    array([1., 1.])
    """
    q, k, v, do = floating(q=q, k=k, v=v, do=do)
    dtype = q.dtype
    q, k, v, do = widen(q), widen(k), widen(v), widen(do)
    rule = backward_rule(q, k, v, **options)
    bind_axes({"q": (q, "B Tq Hq D"), "v": (v, "B Tk Hkv Dv"), "do": (do, "B Tq Hq Dv")})
    product, p, _ = _probabilities(q, k, rule)
    keep = rule.keep(*_everywhere(rule))
    dropped = p if keep is None else round_to(p * keep, p.dtype)

    dv = contract("bhij,bihd->bjhd", dropped, do)
    dp = contract("bihd,bjhd->bhij", do, _repeat(v, rule))
    if keep is not None:
        dp = dp * keep
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    dproduct = round_to(rule.product_gradient(ds, product), q.dtype)
    dq = contract("bhij,bjhd->bihd", dproduct, _repeat(k, rule))
    dk = contract("bhij,bihd->bjhd", dproduct, q)
    bias = options.get("bias")
    return AttentionGradients(
        round_to(dq, dtype),
        round_to(_sum_groups(dk, rule), dtype),
        round_to(_sum_groups(dv, rule), dtype),
        None if bias is None else round_to(_sum_to(ds, np.shape(bias)), dtype),
    )


def _probabilities(
    q: FloatArray, k: FloatArray, rule: ScoreRule
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return q·k in the wide dtype, the probabilities rounded to the dtype of q, and the log-sum-exp."""
    product = contract("bihd,bjhd->bhij", q, _repeat(k, rule))
    scores = round_to(rule.scores(product, *_everywhere(rule)), q.dtype)
    p, lse = softmax(scores.astype(wide_dtype(q.dtype), copy=False), return_lse=True)
    return product, round_to(p, q.dtype), lse


def _everywhere(rule: ScoreRule) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return the indices (b, h, rows, columns) of the whole score matrix."""
    shape = rule.shape
    return (
        np.arange(shape.B)[:, None],
        np.arange(shape.Hq)[None, :],
        np.arange(shape.Tq),
        np.arange(shape.Tk),
    )


def _repeat(x: FloatArray, rule: ScoreRule) -> FloatArray:
    """Give every query head its key head: each key head repeated for its group, contiguously."""
    return np.repeat(x, rule.shape.group, axis=2)


def _sum_groups(gradient: FloatArray, rule: ScoreRule) -> FloatArray:
    """Sum the gradients of the query heads that share a key head: the transpose of `_repeat`."""
    B, T, _, D = gradient.shape
    total: FloatArray = gradient.reshape(B, T, rule.shape.Hkv, rule.shape.group, D).sum(axis=3)
    return total


def _sum_to(gradient: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Sum `gradient` over the axes along which an array of `shape` was broadcast."""
    lead = gradient.ndim - len(shape)
    stretched = tuple(axis + lead for axis, size in enumerate(shape) if size == 1)
    total: Any = gradient.sum(axis=(*range(lead), *stretched), keepdims=True)
    return np.asarray(total).reshape(shape)
