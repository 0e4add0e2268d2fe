"""Linear attention in chunks, in parallel, and backwards: the same sums, ordered for the machine.

Every pass is one product, ``(M ∘ x yᵀ) w`` with M the causal mask, and it takes linear time in chunks: inside
a chunk through its small square of scores, and from earlier chunks through their sum of ``y wᵀ``.  The
gradients are the same product with the roles exchanged, in reversed time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Unpack

import numpy as np

from refimpl.attention.dense import AttentionGradients
from refimpl.attention.linear_call import (
    EPS,
    Alignment,
    LinearHead,
    LinearOptions,
    elu_feature_map,
    elu_feature_map_slope,
    linear_call,
    normalized,
)
from refimpl.attention.linear_samples import AXES, EDGES, OPTIONS, linear_terms, sample_linear
from refimpl.attention.scores import Causal
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Source, implements, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["CHUNK", "linear_attention_chunked", "linear_attention_parallel", "linear_attention_vjp"]

CHUNK = 64  # as in fla/ops/linear_attn/naive.py

Queries = Callable[[slice], FloatArray]
Keys = Callable[[slice], tuple[FloatArray, FloatArray]]


def _pieces(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _masked_product(
    queries: Queries, keys: Keys, plan: Alignment, Tq: int, chunk_size: int, hbm: Memory, name: str = ""
) -> Iterator[tuple[slice, FloatArray]]:
    """Yield rows and their ``(M ∘ x yᵀ) w``; `queries` reads x (n, group, D), `keys` reads y, w."""

    def absorb(y: FloatArray, w: FloatArray) -> FloatArray:
        return hbm.keep(f"state{name}", state + hbm.contract("jd,je->de", y, w))

    state = hbm.keep(f"state{name}", contract("jd,je->de", *keys(slice(0, 0))))
    for seen in _pieces(0, plan.prefix, chunk_size):
        with hbm.on_chip():
            state = absorb(*keys(seen))
    for piece in _pieces(0, plan.steps, chunk_size):
        rows = slice(plan.blind + piece.start, plan.blind + piece.stop)
        with hbm.on_chip():
            x = queries(rows)
            y, w = keys(slice(plan.prefix + piece.start, plan.prefix + piece.stop))
            scores = hbm.compute("scores", hbm.contract("igd,jd->gij", x, y))
            inside = np.where(np.tri(len(x), dtype=bool), scores, 0)
            product = hbm.contract("gij,je->ige", inside, w) + hbm.contract("igd,de->ige", x, state)
            state = absorb(y, w)
            yield rows, product
    for rows in _pieces(plan.blind + plan.steps, Tq, chunk_size):
        with hbm.on_chip():
            yield rows, hbm.contract("igd,de->ige", queries(rows), state)


@implements("attention.linear", backend="numpy")
@technique(
    "attention.linear_chunked",
    entries=(23,),
    kind="function",
    source=Source(
        "flash-linear-attention",
        "github.com/fla-org/flash-linear-attention, commit 20ceee5",
        "fla/ops/linear_attn/naive.py, naive_chunk_linear_attn",
    ),
    axes={**AXES, "chunk_size": (1, 8)},
    options=OPTIONS,
    edges=(*EDGES, {**EDGES[5], "chunk_size": 4}, {**EDGES[5], "chunk_size": 17}),
    sample=sample_linear,
    terms=linear_terms,
    vjp="refimpl.attention.linear_chunked:linear_attention_vjp",
)
def linear_attention_chunked(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    causal: Causal = False,
    key_mask: BoolArray | None = None,
    eps: float = EPS,
    chunk_size: int = CHUNK,
    memory: Memory | None = None,
) -> FloatArray:
    """Return `linear_attention`, `chunk_size` tokens at a time: in O(N) time and memory, and fast.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `linear_attention`.
    causal, key_mask, eps, memory
        As for `linear_attention`.
    chunk_size : int
        Tokens whose scores are made at once; 1 is the recurrent form, at least Tq the parallel one.

    Returns
    -------
    ndarray of float, shape (B, Tq, Hq, Dv)
        In the common dtype of q, k and v.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `linear_attention`; OptionError if `chunk_size` is below 1.

    Notes
    -----
    A chunk of c tokens costs ``4 c**2 D`` FLOPs for its own scores and ``4 c D**2`` for the state (D = Dv).
    The denominator is the same sum as the numerator over values of 1: it is one more column of the state.

    References
    ----------
    .. [1] Yang et al., 2024, arXiv:2312.06635, "chunkwise parallel form" of linear attention.
    .. [2] github.com/fla-org/flash-linear-attention, commit 20ceee5, fla/ops/linear_attn/naive.py.

    Examples
    --------
    >>> from refimpl.attention import linear_attention
    >>> x = np.random.default_rng(0).standard_normal((1, 9, 1, 4))
    >>> chunked = linear_attention_chunked(x, x, x, causal=True, chunk_size=4)
    >>> bool(np.allclose(chunked, linear_attention(x, x, x, causal=True)))
    True
    """
    call = linear_call(q, k, v, causal=causal, key_mask=key_mask, eps=eps)
    chunk_size = whole("chunk_size", chunk_size)
    hbm, Dv = memory or Memory(), call.v.shape[3]
    for head in call.heads():
        hbm.store("O", head.out, slice(0, call.plan.blind), head.out[: call.plan.blind])
        queries, keys = _reader(head, hbm)
        for rows, product in _masked_product(
            queries, keys, call.plan, len(head.q), chunk_size, hbm, head.name
        ):
            hbm.store("O", head.out, rows, normalized(product[..., :Dv], product[..., Dv], call.eps))
    return call.out


def _reader(head: LinearHead, hbm: Memory) -> tuple[Queries, Keys]:
    """Return what loads the features of queries, and those of keys with their values and a column of 1."""

    def keys(rows: slice) -> tuple[FloatArray, FloatArray]:
        features, v = head.keys(hbm, rows)
        return features, _with_ones(v)

    return lambda rows: head.queries(hbm, rows), keys


def _with_ones(v: FloatArray) -> FloatArray:
    return np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)


@implements("attention.linear", backend="numpy")
def linear_attention_parallel(
    q: FloatArray, k: FloatArray, v: FloatArray, /, **options: Unpack[LinearOptions]
) -> FloatArray:
    """Return `linear_attention` from its square of scores: the masked ``φ(q) φ(k)ᵀ``, rows normalized.

    Parameters
    ----------
    q, k, v : ndarray of float
        As for `linear_attention`.
    **options
        Those of `linear_attention`, without `memory`.

    Returns
    -------
    ndarray of float, shape (B, Tq, Hq, Dv)
        In the common dtype of q, k and v.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `linear_attention`.

    References
    ----------
    .. [1] Katharopoulos et al., 2020, arXiv:2006.16236, eq. 3 and 4.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 1))
    >>> linear_attention_parallel(x, x, x, eps=0.0).ravel()
    array([1., 1.])
    """
    call = linear_call(q, k, v, **options)
    hbm = Memory()
    Tq, Tk = call.q.shape[1], call.k.shape[1]
    sees = np.arange(Tk) < call.plan.visible(Tq)[:, None]
    for head in call.heads():
        features, v = head.keys(hbm, slice(0, Tk))
        scores = np.where(sees, contract("igd,jd->gij", head.queries(hbm, slice(0, Tq)), features), 0)
        product = contract("gij,je->ige", scores, _with_ones(v))
        head.out[...] = round_to(normalized(product[..., :-1], product[..., -1], call.eps), head.out.dtype)
    return call.out


def linear_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    chunk_size: int = CHUNK,
    **options: Unpack[LinearOptions],
) -> AttentionGradients:
    """Return the gradients of ``sum(do * linear_attention(q, k, v, **options))``, in linear time too.

    Parameters
    ----------
    q, k, v : ndarray of float
        As for `linear_attention`.
    do : ndarray of float, shape (B, Tq, Hq, Dv)
        Gradient of the output.
    chunk_size : int
        As for `linear_attention_chunked`.
    **options
        Those of the forward call.

    Returns
    -------
    AttentionGradients
        In the dtype of the arrays.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `linear_attention_chunked`.

    Notes
    -----
    With w = [v, 1], n the denominator and G = [dO, -rowsum(dO ∘ O)] / n, row by row:
    ``dφ(Q) = (M ∘ G Wᵀ) φ(K)``, ``dφ(K) = (M ∘ G Wᵀ)ᵀ φ(Q)`` and ``dW = (M ∘ φ(Q) φ(K)ᵀ)ᵀ G``.

    References
    ----------
    .. [1] Katharopoulos et al., 2020, arXiv:2006.16236, eq. 13 to 15 (the numerator's).

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 1))
    >>> linear_attention_vjp(x, x, x, x, eps=0.0).dv.ravel()
    array([1., 1.])
    """
    q, k, v, do = floating(q=q, k=k, v=v, do=do)
    bind_axes({"q": (q, "B Tq Hq D"), "v": (v, "B Tk Hkv Dv"), "do": (do, "B Tq Hq Dv")})
    call = linear_call(q, k, v, **options)
    whole("chunk_size", chunk_size)
    wide = wide_dtype(q.dtype)
    dq, dk, dv = (np.zeros(x.shape, wide) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    for index, head in enumerate(call.heads()):
        b, h = divmod(index, k.shape[2])
        y, values = head.keys(Memory(), slice(None))
        w = _with_ones(values)
        for g in range(h * group, (h + 1) * group):
            x = elu_feature_map(q[b, :, g])
            given = widen(do[b, :, g]).astype(wide, copy=False)
            product = _product(x, y, w, call.plan, chunk_size)
            out = normalized(product[:, :-1], product[:, -1], call.eps)
            gradient = np.concatenate([given, -np.sum(given * out, axis=-1, keepdims=True)], axis=-1)
            gradient = normalized(gradient, product[:, -1], call.eps)
            back = call.plan.transposed(len(x), len(y))
            dq[b, :, g] = _product(gradient, w, y, call.plan, chunk_size)
            dk[b, :, h] += _product(w[::-1], gradient[::-1], x[::-1], back, chunk_size)[::-1]
            dv[b, :, h] += _product(y[::-1], x[::-1], gradient[::-1], back, chunk_size)[::-1, :-1]
    if call.key_mask is not None:
        dk *= call.key_mask[:, :, None, None]
    dq, dk = dq * elu_feature_map_slope(q), dk * elu_feature_map_slope(k)
    return AttentionGradients(round_to(dq, q.dtype), round_to(dk, q.dtype), round_to(dv, q.dtype))


def _product(x: FloatArray, y: FloatArray, w: FloatArray, plan: Alignment, chunk_size: int) -> FloatArray:
    """Return ``(M ∘ x yᵀ) w`` for one head, x of shape (Tq, D)."""
    out = np.zeros((len(x), w.shape[1]), w.dtype)
    for rows, product in _masked_product(
        lambda rows: x[rows, None], lambda rows: (y[rows], w[rows]), plan, len(x), chunk_size, Memory()
    ):
        out[rows] = product[:, 0]
    return out
