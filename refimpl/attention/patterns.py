"""Attention over a sparse pattern, which is given twice: as a mask of scores, and as tiles.

The mask is the definition: `scaled_dot_product_attention` over the scores that it leaves, all N² computed.
The tiles are the algorithm: blocks of queries, each query in exactly one of them, with the keys that its
queries may see gathered beside it.  A tile's softmax is whole, so nothing is carried from tile to tile, and
time and memory are those of the tiles: linear in N if a query's keys are few.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.dense import AttentionGradients, AttentionOutput
from refimpl.attention.online_softmax import softmax
from refimpl.attention.scores import (
    AttentionOptions,
    AttentionShape,
    ScoreRule,
    attention_shape,
    backward_rule,
    score_rule,
    with_seed,
)
from refimpl.errors import ShapeError, UnsupportedError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, IntArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Case
from refimpl.validation import bind_axes, floating

__all__ = [
    "Tile",
    "blocks_of",
    "dense_case",
    "looks_back_only",
    "self_shape",
    "tiled",
    "tiled_vjp",
]


class Tile(NamedTuple):
    """Queries at `rows`, and the keys at `columns` that they see where `allowed`; None: all of them.

    It holds for every one of `sequences` and query `heads`.  No column occurs twice.
    """

    sequences: Sequence[int]
    heads: Sequence[int]
    rows: IntArray
    columns: IntArray
    allowed: BoolArray | None = None


def self_shape(q: Any, k: Any, v: Any) -> AttentionShape:
    """Return the sizes of a self-attention: patterns are stated for queries and keys of one sequence.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit each other, or there are more or fewer keys than queries.

    Examples
    --------
    >>> self_shape(np.ones((1, 5, 2, 4)), np.ones((1, 5, 1, 4)), np.ones((1, 5, 1, 3))).Tq
    5
    """
    shape = attention_shape(*floating(q=q, k=k, v=v))
    if shape.Tq != shape.Tk:
        raise ShapeError(f"k: a pattern needs as many keys as queries; got Tk={shape.Tk}, Tq={shape.Tq}")
    return shape


def looks_back_only(options: AttentionOptions) -> bool:
    """Return whether no query sees a later key, so that tiles need none of them.

    Padding of queries and keys moves the alignment "bottom_right", and then nothing is certain.
    """
    padded = options.get("q_lengths") is not None or options.get("k_lengths") is not None
    causal = options.get("causal", False)
    return bool(causal) and not (causal == "bottom_right" and padded)


def blocks_of(rows: IntArray, size: int) -> list[IntArray]:
    """Return `rows` cut into blocks of at most `size`.

    Examples
    --------
    >>> [block.tolist() for block in blocks_of(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def dense_case(case: Case, pattern: BoolArray, *names: str) -> Case:
    """Return the call of dense attention that a call ``f(q, k, v, ...)`` of a sparse one stands for.

    Parameters
    ----------
    case : Case
        The call.
    pattern : ndarray of bool, shape (..., T, T)
        The mask that its options `names` say; the caller's own mask, if there is one, holds besides.
    *names : str
        Options that dense attention does not have.

    Returns
    -------
    Case
        Of `scaled_dot_product_attention`.

    Examples
    --------
    >>> x, call = np.ones((1, 2, 1, 1)), {"radius": 0, "scale": 0.5}
    >>> dense_case(Case((x, x, x), call), np.eye(2, dtype=bool), "radius").kwargs
    {'scale': 0.5, 'attn_mask': array([[ True, False],
           [False,  True]])}
    """
    case = case.without(*names)
    options: dict[str, Any] = dict(case.without("return_lse").kwargs)
    drawn: dict[str, Any] = dict(with_seed(AttentionOptions(**options)))  # type: ignore[typeddict-item]
    q, k, v = floating(**dict(zip("qkv", case.args[:3], strict=True)))
    mask = score_rule(q, k, v, **drawn).mask  # the caller's own mask, checked
    drawn["attn_mask"] = pattern if mask is None else mask & pattern
    return case.replace(**drawn)


def tiled(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    tiles: Iterable[Tile],
    options: AttentionOptions,
    *,
    return_lse: bool = False,
    memory: Memory | None = None,
) -> FloatArray | AttentionOutput:
    """Return attention tile by tile; a query in no tile gets 0.

    Parameters
    ----------
    q, k, v : ndarray of float
        As for `scaled_dot_product_attention`.
    tiles : iterable of Tile
        The pattern.
    options : AttentionOptions
        Those of `scaled_dot_product_attention`, inside the tiles.
    return_lse : bool
        Also return the log-sum-exp of each row.
    memory : Memory, optional
        Counts what moves and the operations of the two products.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Examples
    --------
    >>> x = np.arange(4.0).reshape(1, 2, 1, 2)
    >>> own = [Tile([0], [0], np.array([i]), np.array([i])) for i in range(2)]
    >>> bool(np.array_equal(tiled(x, x, x, own, {}), x))
    True
    """
    q, k, v = floating(q=q, k=k, v=v)
    rule = score_rule(q, k, v, **options)
    hbm = memory or Memory()
    out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf, wide_dtype(q.dtype))
    for tile in tiles:
        for b, h in itertools.product(tile.sequences, tile.heads):
            g = h // rule.shape.group
            with hbm.on_chip():
                q_i = hbm.load("Q", q[b, tile.rows, h])
                k_j, v_j = hbm.load("K", k[b, tile.columns, g]), hbm.load("V", v[b, tile.columns, g])
                product = hbm.compute("S", hbm.contract("id,jd->ij", q_i, k_j))
                p, lse[b, h, tile.rows] = _probabilities(product, q_i.dtype, rule, tile, b, h)
                keep = rule.keep(np.asarray(b), np.asarray(h), tile.rows, tile.columns)
                dropped = p if keep is None else round_to(p * keep, p.dtype)
                o_i = np.empty((len(tile.rows), v.shape[3]), q.dtype)
                hbm.store("O", o_i, None, hbm.contract("ij,jd->id", dropped, v_j))
                out[b, tile.rows, h] = o_i
    return AttentionOutput(out, lse) if return_lse else out


def tiled_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    tiles: Iterable[Tile],
    options: AttentionOptions,
) -> AttentionGradients:
    """Return the gradients of `tiled`, tile by tile: the probabilities are computed again, never kept.

    Raises
    ------
    UnsupportedError
        With `bias`, whose gradient has an entry for each of the N² scores: the dense form returns it.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 2))
    >>> own = [Tile([0], [0], np.array([i]), np.array([i])) for i in range(2)]
    >>> tiled_vjp(x, x, x, 3 * x, own, {}).dv.ravel()
    array([3., 3., 3., 3.])
    """
    if options.get("bias") is not None:
        raise UnsupportedError("bias: its gradient is as large as the scores; take the vjp of the dense form")
    q, k, v, do = floating(q=q, k=k, v=v, do=do)
    bind_axes({"q": (q, "B T Hq D"), "v": (v, "B T Hkv Dv"), "do": (do, "B T Hq Dv")})
    rule = backward_rule(q, k, v, **options)
    dq, dk, dv = (np.zeros(x.shape, wide_dtype(q.dtype)) for x in (q, k, v))
    for tile in tiles:
        for b, h in itertools.product(tile.sequences, tile.heads):
            g = h // rule.shape.group
            q_i, do_i = widen(q[b, tile.rows, h]), widen(do[b, tile.rows, h])
            k_j, v_j = widen(k[b, tile.columns, g]), widen(v[b, tile.columns, g])
            product = contract("id,jd->ij", q_i, k_j)
            p, _ = _probabilities(product, q_i.dtype, rule, tile, b, h)
            keep = rule.keep(np.asarray(b), np.asarray(h), tile.rows, tile.columns)
            dropped = p if keep is None else round_to(p * keep, p.dtype)
            dp = contract("id,jd->ij", do_i, v_j)
            dp = dp if keep is None else dp * keep
            ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
            dproduct = round_to(rule.product_gradient(ds, product), q_i.dtype)
            dq[b, tile.rows, h] = contract("ij,jd->id", dproduct, k_j)
            dk[b, tile.columns, g] += contract("ij,id->jd", dproduct, q_i)
            dv[b, tile.columns, g] += contract("ij,id->jd", dropped, do_i)
    return AttentionGradients(round_to(dq, q.dtype), round_to(dk, q.dtype), round_to(dv, q.dtype))


def _probabilities(
    product: FloatArray, dtype: np.dtype[Any], rule: ScoreRule, tile: Tile, b: int, h: int
) -> tuple[FloatArray, FloatArray]:
    """Return the probabilities of a tile, rounded to `dtype`, and the log-sum-exp of its rows."""
    scores = rule.scores(product, np.asarray(b), np.asarray(h), tile.rows, tile.columns)
    if tile.allowed is not None:
        scores = np.where(tile.allowed, scores, scores.dtype.type(-np.inf))
    p, lse = softmax(round_to(scores, dtype).astype(product.dtype, copy=False), return_lse=True)
    return round_to(p, dtype), lse
