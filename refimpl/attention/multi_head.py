"""Multi-head attention: projections, heads, and the projection that puts the heads together.

Grouped and multi-query attention are the same function with fewer key heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention, scaled_dot_product_attention_vjp
from refimpl.attention.scores import AttentionOptions, with_seed
from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = ["MultiHeadGradients", "multi_head_attention", "multi_head_attention_vjp", "sample_multi_head"]


class MultiHeadGradients(NamedTuple):
    """Gradients of the input, the four weights, and the biases and context if they were given."""

    dx: FloatArray
    dw_q: FloatArray
    dw_k: FloatArray
    dw_v: FloatArray
    dw_o: FloatArray
    db_q: FloatArray | None = None
    db_k: FloatArray | None = None
    db_v: FloatArray | None = None
    db_o: FloatArray | None = None
    dcontext: FloatArray | None = None


def sample_multi_head(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    M: int,
    Hkv: int,
    group: int,
    D: int,
    causal: bool = False,
    extra: str = "none",
) -> Case:
    """Return one call of `multi_head_attention`, its arrays drawn from `rng`.

    `extra` adds biases or a context; "square" makes the heads as wide together as the tokens.

    Examples
    --------
    >>> case = sample_multi_head(np.random.default_rng(0), B=1, T=3, M=4, Hkv=1, group=2, D=5)
    >>> [a.shape for a in case.args]
    [(1, 3, 4), (4, 10), (4, 5), (4, 5), (10, 4)]
    """
    H = Hkv * group
    M = H * D if extra == "square" else M
    shapes = (B, T, M), (M, H * D), (M, Hkv * D), (M, Hkv * D), (H * D, M)
    arrays = tuple(rng.standard_normal(shape) for shape in shapes)
    options: dict[str, Any] = {"num_heads": H}
    if group > 1:
        options["num_kv_heads"] = Hkv
    if causal and extra != "context":
        options["causal"] = True
    if extra == "biases":
        for name, weight in zip("qkvo", arrays[1:], strict=True):
            options[f"b_{name}"] = rng.standard_normal(weight.shape[1])
    if extra == "context":
        options["context"] = rng.standard_normal((B, T + 2, M))
    return Case(arrays, options)


@technique(
    "attention.multi_head",
    entries=(9,),
    kind="function",
    source=Source("Vaswani et al. 2017", "arXiv:1706.03762", "section 3.2.2"),
    axes={"B": (1, 2), "T": (1, 9), "M": (1, 8), "Hkv": (1, 3), "group": (1, 3), "D": (1, 5)},
    options={"causal": (False, True), "extra": ("none", "biases", "context", "square")},
    edges=(
        {"B": 0, "T": 2},
        {"T": 0},
        {"B": 1, "T": 1, "M": 1, "Hkv": 1, "group": 1, "D": 1},
        {"M": 6, "Hkv": 3, "group": 1, "D": 4},  # H * D differs from M
        {"Hkv": 1, "group": 3},
        {"Hkv": 2, "group": 1, "extra": "square"},
        {"Hkv": 3, "group": 1, "extra": "square", "causal": True},
    ),
    sample=sample_multi_head,
    vjp="refimpl.attention.multi_head:multi_head_attention_vjp",
)
def multi_head_attention(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    /,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    context: FloatArray | None = None,
    b_q: FloatArray | None = None,
    b_k: FloatArray | None = None,
    b_v: FloatArray | None = None,
    b_o: FloatArray | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray:
    """Return ``concat(head_1, ..., head_H) W^O``, each head an attention over its own projections.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    w_q : ndarray of float, shape (M, Hq * D)
        Projection to queries; head h owns the columns ``h * D : (h + 1) * D``.  Hq * D may differ from M.
    w_k, w_v : ndarray of float, shapes (Mc, Hkv * D), (Mc, Hkv * Dv)
        Projections to keys and values.
    w_o : ndarray of float, shape (Hq * Dv, M')
        Projection of the concatenated heads.
    num_heads : int
        Hq.
    num_kv_heads : int, optional
        Hkv, a divisor of Hq; each key head serves ``Hq / Hkv`` neighbouring query heads.  Default Hq.
    context : ndarray of float, shape (B, Tc, Mc), optional
        What keys and values are made from (cross-attention).  Default `x`.
    b_q, b_k, b_v, b_o : ndarray of float, one entry a column of the weight, optional
        Biases of the projections.
    **options
        Those of `scaled_dot_product_attention`.

    Returns
    -------
    ndarray of float, shape (B, T, M')
        In the common dtype.

    Raises
    ------
    ShapeError
        If shapes do not fit, or a width is no multiple of its number of heads.
    OptionError
        If a number of heads is below 1.
    DTypeError
        If an array is not real.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, section 3.2.2.
    .. [2] Ainslie et al., 2023, arXiv:2305.13245, section 2.2 (grouped heads).

    Examples
    --------
    >>> x, eye = np.ones((1, 2, 4)), np.eye(4)
    >>> multi_head_attention(x, eye, eye, eye, eye, num_heads=2)[0]
    array([[1., 1., 1., 1.],
           [1., 1., 1., 1.]])
    """
    if "return_lse" in options:
        raise OptionError("return_lse: the heads are mixed by w_o; ask scaled_dot_product_attention")
    call = _projected(x, (w_q, w_k, w_v, w_o), context, (b_q, b_k, b_v, b_o), num_heads, num_kv_heads)
    heads = scaled_dot_product_attention(call.q, call.k, call.v, **options)
    joined = _joined(heads)
    return round_to(_linear(joined, call.w_o, call.b_o), call.dtype)


def multi_head_attention_vjp(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    dy: FloatArray,
    /,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    context: FloatArray | None = None,
    b_q: FloatArray | None = None,
    b_k: FloatArray | None = None,
    b_v: FloatArray | None = None,
    b_o: FloatArray | None = None,
    **options: Unpack[AttentionOptions],
) -> MultiHeadGradients:
    """Return the gradients of ``sum(dy * multi_head_attention(...))``.

    Parameters
    ----------
    x, w_q, w_k, w_v, w_o : ndarray of float
        As for `multi_head_attention`.
    dy : ndarray of float, shape (B, T, M')
        Gradient of the output.
    num_heads, num_kv_heads, context, b_q, b_k, b_v, b_o, **options
        Those of the forward call.

    Returns
    -------
    MultiHeadGradients
        Those of biases and context only where they were given; without context, `dx` holds all three paths.

    Examples
    --------
    >>> x, eye = np.ones((1, 2, 4)), np.eye(4)
    >>> multi_head_attention_vjp(x, eye, eye, eye, eye, x, num_heads=2).dx[0, 0]
    array([1., 1., 1., 1.])
    """
    biases = b_q, b_k, b_v, b_o
    call = _projected(x, (w_q, w_k, w_v, w_o), context, biases, num_heads, num_kv_heads)
    options = with_seed(options)
    (dy,) = floating(dy=dy)
    dy = widen(dy).astype(call.q.dtype, copy=False)
    heads = scaled_dot_product_attention(call.q, call.k, call.v, **options)
    joined = _joined(heads)
    djoined = contract("btm,jm->btj", dy, call.w_o)
    inner = scaled_dot_product_attention_vjp(call.q, call.k, call.v, djoined.reshape(heads.shape), **options)
    dq, dk, dv = (_joined(gradient) for gradient in inner[:3])
    dx = contract("btj,mj->btm", dq, call.w_q)
    dsource = contract("btj,mj->btm", dk, call.w_k) + contract("btj,mj->btm", dv, call.w_v)
    gradients = MultiHeadGradients(
        dx=dx if context is not None else dx + dsource,
        dw_q=contract("btm,btj->mj", call.x, dq),
        dw_k=contract("btm,btj->mj", call.source, dk),
        dw_v=contract("btm,btj->mj", call.source, dv),
        dw_o=contract("btj,btm->jm", joined, dy),
        db_q=None if b_q is None else dq.sum(axis=(0, 1)),
        db_k=None if b_k is None else dk.sum(axis=(0, 1)),
        db_v=None if b_v is None else dv.sum(axis=(0, 1)),
        db_o=None if b_o is None else dy.sum(axis=(0, 1)),
        dcontext=None if context is None else dsource,
    )
    rounded = (None if gradient is None else round_to(gradient, call.dtype) for gradient in gradients)
    return MultiHeadGradients(*rounded)  # type: ignore[arg-type]


class _Call(NamedTuple):
    x: FloatArray
    source: FloatArray
    q: FloatArray
    k: FloatArray
    v: FloatArray
    w_q: FloatArray
    w_k: FloatArray
    w_v: FloatArray
    w_o: FloatArray
    b_o: FloatArray | None
    dtype: np.dtype[Any]


def _projected(
    x: FloatArray,
    weights: tuple[FloatArray, ...],
    context: FloatArray | None,
    biases: tuple[FloatArray | None, ...],
    num_heads: int,
    num_kv_heads: int | None,
) -> _Call:
    """Check the arguments and return the projections, cut into heads."""
    whole("num_heads", num_heads)
    kv_heads = num_heads if num_kv_heads is None else whole("num_kv_heads", num_kv_heads)
    names = ("x", "w_q", "w_k", "w_v", "w_o")
    given = dict(zip(names, (x, *weights), strict=True))
    given |= {"context": context} if context is not None else {}
    given |= {f"b_{n}": b for n, b in zip("qkvo", biases, strict=True) if b is not None}
    arrays = dict(zip(given, floating(**given), strict=True))
    dtype = arrays["x"].dtype
    arrays = {name: widen(array) for name, array in arrays.items()}
    source = arrays.get("context", arrays["x"])
    bind_axes({"x": (arrays["x"], "B T M"), "w_q": (arrays["w_q"], "M HqD")})
    bind_axes(
        {
            "x" if context is None else "context": (source, "B S Mc"),
            "w_k": (arrays["w_k"], "Mc HkvD"),
            "w_v": (arrays["w_v"], "Mc HkvDv"),
        }
    )
    heads = {}
    for name, w, tokens, count in (
        ("q", "w_q", arrays["x"], num_heads),
        ("k", "w_k", source, kv_heads),
        ("v", "w_v", source, kv_heads),
    ):
        width = arrays[w].shape[1]
        if width % count:
            raise ShapeError(f"{w}: {width} columns do not divide into {count} heads")
        bias = arrays.get(f"b_{name}")
        projected = round_to(_linear(tokens, arrays[w], bias, f"b_{name}"), arrays["x"].dtype)
        # Cut the columns where they stand: a plain reshape to (H, T, D) would mix tokens and heads.
        heads[name] = projected.reshape(*projected.shape[:2], count, width // count)
    rows = num_heads * heads["v"].shape[3]
    if arrays["w_o"].ndim != 2 or arrays["w_o"].shape[0] != rows:
        raise ShapeError(f"w_o: expected {rows} rows (num_heads * Dv), got shape {arrays['w_o'].shape}")
    return _Call(
        arrays["x"], source, **heads, **{w: arrays[w] for w in names[1:]}, b_o=arrays.get("b_o"), dtype=dtype
    )


def _joined(heads: FloatArray) -> FloatArray:
    B, T, H, D = heads.shape
    return heads.reshape(B, T, H * D)


def _linear(x: FloatArray, w: FloatArray, b: FloatArray | None, name: str = "b_o") -> FloatArray:
    y = contract("btm,mj->btj", x, w)
    if b is None:
        return y
    if as_array(name, b).shape != (w.shape[1],):
        raise ShapeError(f"{name}: expected shape ({w.shape[1]},), got {b.shape}")
    return y + b
