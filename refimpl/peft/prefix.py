"""Prefix tuning: learned keys and values that every query of every layer sees, before those of the text."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention, scaled_dot_product_attention_vjp
from refimpl.attention.scores import Causal
from refimpl.errors import OptionError
from refimpl.numerics import BoolArray, FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.linear import linear, linear_vjp
from refimpl.validation import bind_axes, floating

__all__ = [
    "PrefixGradients",
    "prefix_attention",
    "prefix_attention_vjp",
    "prefix_from_embedding",
    "prefix_from_embedding_vjp",
]


class PrefixGradients(NamedTuple):
    """Gradients of queries, keys, values, and of the prefix's keys and values, which alone are trained."""

    q: FloatArray
    k: FloatArray
    v: FloatArray
    prefix_k: FloatArray
    prefix_v: FloatArray


def sample_prefix(
    rng: np.random.Generator, *, B: int, Tq: int, Tk: int, P: int, Hkv: int, group: int, D: int, causal: Any
) -> Case:
    """Return a call of `prefix_attention`.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=3, P=4, Hkv=1, group=2, D=5)
    >>> [a.shape for a in sample_prefix(np.random.default_rng(0), causal=False, **shape).args]
    [(1, 2, 2, 5), (1, 3, 1, 5), (1, 3, 1, 5), (4, 1, 5), (4, 1, 5)]
    """
    shapes = ((B, Tq, Hkv * group, D), *((B, Tk, Hkv, D),) * 2, *((P, Hkv, D),) * 2)
    return Case(tuple(rng.standard_normal(shape) for shape in shapes), {"causal": causal})


def _terms(case: Case) -> tuple[int, FloatArray]:
    q, k, v, prefix_k, prefix_v = case.args
    size = prefix_attention(q, k, np.abs(v), prefix_k, np.abs(prefix_v), **case.kwargs)
    return k.shape[1] + len(prefix_k) + q.shape[3], size


@technique(
    "peft.prefix",
    entries=(63,),
    kind="function",
    source=Source("Li and Liang 2021", "arXiv:2101.00190", "section 4.2, eq. 3"),
    axes={"B": (1, 2), "Tq": (1, 5), "Tk": (1, 5), "P": (0, 4), "Hkv": (1, 2), "group": (1, 2), "D": (1, 4)},
    options={"causal": (False, "top_left", "bottom_right")},
    edges=(
        {"B": 0, "P": 2, "causal": False},
        {"Tq": 0, "P": 2, "causal": False},
        {"Tk": 0, "P": 2, "causal": False},
        {"Tk": 0, "P": 0, "causal": False},
        {"P": 0, "causal": "top_left"},
        {"Tq": 5, "Tk": 2, "P": 3, "causal": "bottom_right"},
        {"B": 1, "Tq": 1, "Tk": 1, "P": 1, "Hkv": 1, "group": 1, "D": 1, "causal": "top_left"},
    ),
    sample=sample_prefix,
    terms=_terms,
    vjp="refimpl.peft.prefix:prefix_attention_vjp",
)
def prefix_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    prefix_k: FloatArray,
    prefix_v: FloatArray,
    /,
    *,
    causal: Causal = False,
    scale: float | None = None,
) -> FloatArray:
    """Return attention over ``[prefix; text]``; the mask applies to the text alone.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `refimpl.attention.scaled_dot_product_attention`.
    prefix_k, prefix_v : ndarray of float, shapes (P, Hkv, D), (P, Hkv, Dv)
        The trained keys and values of one layer, the same for every sequence.
    causal : {False, True, "top_left", "bottom_right"}
        Which keys of the text a query sees; it sees the whole prefix always.
    scale : float, optional
        Default ``D ** -0.5``.

    Returns
    -------
    ndarray of float, shape (B, Tq, Hq, Dv)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the attention.

    Notes
    -----
    It is a mixture, row by row: with λ the softmax mass of the prefix, ``(1 - λ) attention over the text
    + λ attention over the prefix``.  Kept are 2 P Hkv D numbers a layer.  Rotary positions are not applied to
    a prefix, which has none.

    **Special cases**

    - P = 0 is the base model.
    - The order of the prefix does not matter.

    References
    ----------
    .. [1] Li and Liang, 2021, arXiv:2101.00190, section 4.2.
    .. [2] He et al., 2022, arXiv:2110.04366, section 3.1, eq. 7: the mixture.

    Examples
    --------
    >>> x, one = np.zeros((1, 1, 1, 2)), np.ones((1, 1, 2))
    >>> prefix_attention(x, x, x, 0 * one, one)
    array([[[[0.5, 0.5]]]])
    """
    whole_k, whole_v, mask = _extended(q, k, v, prefix_k, prefix_v, causal)
    out: FloatArray = scaled_dot_product_attention(q, whole_k, whole_v, attn_mask=mask, scale=scale)
    return out


def prefix_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    prefix_k: FloatArray,
    prefix_v: FloatArray,
    do: FloatArray,
    /,
    *,
    causal: Causal = False,
    scale: float | None = None,
) -> PrefixGradients:
    """Return the gradients of `prefix_attention`; training uses those of the prefix and passes q, k, v down.

    Parameters
    ----------
    q, k, v, prefix_k, prefix_v, causal, scale
        As for `prefix_attention`.
    do : ndarray of float, shape (B, Tq, Hq, Dv)
        Gradient of the output.

    Returns
    -------
    PrefixGradients
        Those of the prefix summed over the sequences.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `prefix_attention`.

    Examples
    --------
    >>> x, one = np.zeros((1, 1, 1, 2)), np.ones((1, 1, 2))
    >>> prefix_attention_vjp(x, x, x, 0 * one, one, x + 1).prefix_v
    array([[[0.5, 0.5]]])
    """
    whole_k, whole_v, mask = _extended(q, k, v, prefix_k, prefix_v, causal)
    found = scaled_dot_product_attention_vjp(q, whole_k, whole_v, do, attn_mask=mask, scale=scale)
    P = len(prefix_k)
    shared = [round_to(widen(g[:, :P]).sum(axis=0), g.dtype) for g in (found.dk, found.dv)]
    return PrefixGradients(found.dq, found.dk[:, P:], found.dv[:, P:], *shared)


def sample_embedded(rng: np.random.Generator, *, P: int, E: int, F: int, N: int) -> Case:
    """Return a call of `prefix_from_embedding`.

    Examples
    --------
    >>> [a.shape for a in sample_embedded(np.random.default_rng(0), P=2, E=3, F=4, N=5).args]
    [(2, 3), (3, 4), (4,), (4, 5), (5,)]
    """
    shapes = ((P, E), (E, F), (F,), (F, N), (N,))
    return Case(tuple(rng.standard_normal(shape) for shape in shapes))


def _embedded_terms(case: Case) -> tuple[int, FloatArray]:
    embedding, w_1, b_1, w_2, b_2 = (np.abs(array) for array in case.args)
    hidden = np.minimum(embedding @ w_1 + b_1, 1.0)
    return sum(w_1.shape) + 4, hidden @ w_2 + b_2


@technique(
    "peft.prefix.reparametrized",
    entries=(63,),
    kind="function",
    source=Source("Li and Liang 2021", "arXiv:2101.00190", "section 4.3, Parametrization of P_θ"),
    axes={"P": (0, 4), "E": (1, 4), "F": (1, 5), "N": (1, 6)},
    edges=({"P": 0}, {"P": 1, "E": 1, "F": 1, "N": 1}, {"P": 3, "N": 0}),
    sample=sample_embedded,
    terms=_embedded_terms,
    vjp="refimpl.peft.prefix:prefix_from_embedding_vjp",
)
def prefix_from_embedding(
    embedding: FloatArray, w_1: FloatArray, b_1: FloatArray, w_2: FloatArray, b_2: FloatArray, /
) -> FloatArray:
    """Return the prefix that a small network makes while training: ``tanh(E W_1 + b_1) W_2 + b_2``.

    Parameters
    ----------
    embedding : ndarray of float, shape (P, E)
        One vector a position.
    w_1, b_1 : ndarray of float, shapes (E, F) and (F,)
        Its hidden layer.
    w_2, b_2 : ndarray of float, shapes (F, N) and (N,)
        N = 2 L H D numbers: keys and values of all layers.

    Returns
    -------
    ndarray of float, shape (P, N)
        After training it is kept and the network is thrown away.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    References
    ----------
    .. [1] Li and Liang, 2021, arXiv:2101.00190, section 4.3.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> prefix_from_embedding(one, 0 * one, one[0], one, one[0]).round(4)
    array([[1.7616]])
    """
    e, w_1, b_1, w_2, b_2 = floating(embedding=embedding, w_1=w_1, b_1=b_1, w_2=w_2, b_2=b_2)
    wide = [widen(array) for array in (e, w_1, b_1, w_2, b_2)]
    hidden = np.tanh(linear(*wide[:3], name="w_1"))
    return round_to(linear(hidden, *wide[3:], name="w_2"), e.dtype)


def prefix_from_embedding_vjp(
    embedding: FloatArray, w_1: FloatArray, b_1: FloatArray, w_2: FloatArray, b_2: FloatArray,
    dy: FloatArray, /,
) -> tuple[FloatArray, ...]:  # fmt: skip
    """Return the gradients of all five arguments of `prefix_from_embedding`.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> [g.shape for g in prefix_from_embedding_vjp(one, one, one[0], one, one[0], one)]
    [(1, 1), (1, 1), (1,), (1, 1), (1,)]
    """
    given = floating(embedding=embedding, w_1=w_1, b_1=b_1, w_2=w_2, b_2=b_2, dy=dy)
    e, w_1, b_1, w_2, _, dy = (widen(array) for array in given)
    hidden = np.tanh(linear(e, w_1, b_1, name="w_1"))
    dhidden, dw_2, db_2 = linear_vjp(hidden, w_2, dy)
    found = *linear_vjp(e, w_1, dhidden * (1 - hidden**2)), dw_2, db_2
    return tuple(round_to(gradient, given[0].dtype) for gradient in found)


def _extended(
    q: FloatArray, k: FloatArray, v: FloatArray, prefix_k: FloatArray, prefix_v: FloatArray, causal: Causal
) -> tuple[FloatArray, FloatArray, BoolArray | None]:
    """Return keys, values and mask of prefix and text together."""
    q, k, v, prefix_k, prefix_v = floating(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)
    size = bind_axes(
        {"q": (q, "B Tq Hq D"), "k": (k, "B Tk Hkv D"), "v": (v, "B Tk Hkv Dv"),
         "prefix_k": (prefix_k, "P Hkv D"), "prefix_v": (prefix_v, "P Hkv Dv")}
    )  # fmt: skip
    B, P, Tq, Tk = (size[name] for name in ("B", "P", "Tq", "Tk"))
    k = np.concatenate([np.broadcast_to(prefix_k, (B, *prefix_k.shape)), k], axis=1)
    v = np.concatenate([np.broadcast_to(prefix_v, (B, *prefix_v.shape)), v], axis=1)
    if isinstance(causal, bool | np.bool_) and not causal:
        return k, v, None
    aligned = isinstance(causal, str) and causal in ("top_left", "bottom_right")
    if not aligned and not isinstance(causal, bool | np.bool_):  # 1 is not True
        raise OptionError(f"causal: expected False, True, 'top_left' or 'bottom_right', got {causal!r}")
    if not aligned and Tq != Tk:
        raise OptionError(f"causal: True needs Tq == Tk, else name an alignment; got Tq={Tq}, Tk={Tk}")
    text = np.tri(Tq, Tk, Tk - Tq if causal == "bottom_right" else 0, dtype=bool)
    return k, v, np.concatenate([np.ones((Tq, P), bool), text], axis=1)
