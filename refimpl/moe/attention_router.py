"""The attention router of Yuan 2.0-M32: experts attend to experts before they are chosen."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.memory import Memory
from refimpl.moe.expert_ffn import ExpertOptions, product_of
from refimpl.moe.routing import Convention, router_logits, router_logits_vjp
from refimpl.moe.samples import EXPERTS, gap, sample_layer
from refimpl.moe.sparse_mixture import sparse_mixture, sparse_mixture_vjp
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = [
    "AttentionRoutedGradients",
    "AttentionRouterGradients",
    "attention_routed",
    "attention_routed_vjp",
    "attention_router",
    "attention_router_vjp",
]

_SOURCE = Source("Wu et al. 2024 (Yuan 2.0-M32)", "arXiv:2405.17976", "section 3.1.2, eq. 1 to 4")


class AttentionRouterGradients(NamedTuple):
    """Gradients of the tokens and of the three projections."""

    dx: FloatArray
    dw_q: FloatArray
    dw_k: FloatArray
    dw_v: FloatArray


class AttentionRoutedGradients(NamedTuple):
    """Gradients of tokens, router and experts; `dw_gate` only for gated experts."""

    dx: FloatArray
    dw_q: FloatArray
    dw_k: FloatArray
    dw_v: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_gate: FloatArray | None = None


def _sample_router(rng: np.random.Generator, *, T: int, D: int, E: int, values: str = "normal") -> Case:
    w_q, w_k, w_v = (rng.standard_normal((D, E)) for _ in range(3))
    if values == "large":  # sharp attention
        w_q, w_k = 10.0 * w_q, 10.0 * w_k
    return Case((rng.standard_normal((T, D)), w_q, w_k, w_v))


@technique(
    "moe.attention_router",
    entries=(43,),
    kind="function",
    source=_SOURCE,
    axes={"T": (0, 6), "D": (1, 4), "E": (1, 5)},
    options={"values": ("normal", "large")},
    edges=({"T": 0}, {"T": 1, "D": 1, "E": 1}, {"T": 4, "E": 5, "values": "large"}),
    sample=_sample_router,
    vjp="refimpl.moe.attention_router:attention_router_vjp",
)
def attention_router(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    /,
    *,
    memory: Memory | None = None,
) -> FloatArray:
    """Return the logits of the experts: ``softmax(q k^T) v`` for each token, over experts.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_q, w_k, w_v : ndarray of float, shape (D, E)
        Projections: ``q = x W_q`` is one number an expert, and so are k and v.
    memory : Memory, optional
        Counts the operations: ``6 T D E + 4 T E²``.

    Returns
    -------
    ndarray of float, shape (T, E)
        Logits in the wide dtype, for the softmax and the choice of any top-k layer.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together, or are not real.

    Notes
    -----
    For each token the scores are an E x E matrix, the outer product of q and k, not scaled; row a says how
    much expert a looks at each expert.  Tokens do not look at each other.  With ``W_q = 0`` every expert gets
    the mean of v, so that all are equal; if each row of scores is sharp on the diagonal, the logits are
    ``x W_v``, a plain router.  Three times a plain router's parameters, and ``4 E²`` operations a token
    besides.

    References
    ----------
    .. [1] Wu et al., 2024, arXiv:2405.17976, section 3.1.2; IEIT-Yuan/Yuan2.0-M32,
       ``ParallelAttention_router``.

    Examples
    --------
    >>> x = np.array([[1.0]])
    >>> attention_router(x, np.zeros((1, 2)), np.ones((1, 2)), np.array([[1.0, 3.0]]))
    array([[2., 2.]])
    """
    _, _, v, attention = _attention(x, w_q, w_k, w_v, memory)
    logits: FloatArray = product_of(memory)("tab,tb->ta", attention, v)
    return logits


def attention_router_vjp(
    x: FloatArray, w_q: FloatArray, w_k: FloatArray, w_v: FloatArray, dlogits: FloatArray, /
) -> AttentionRouterGradients:
    """Return the gradients of ``sum(dlogits * attention_router(x, w_q, w_k, w_v))``.

    Parameters
    ----------
    x, w_q, w_k, w_v
        As for `attention_router`.
    dlogits : ndarray of float, shape (T, E)
        Gradient of the logits.

    Returns
    -------
    AttentionRouterGradients
        In the common dtype of tokens and projections.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> attention_router_vjp(one, one, one, one, one).dw_v
    array([[1.]])
    """
    x, w_q, w_k, w_v = floating(x=x, w_q=w_q, w_k=w_k, w_v=w_v)
    q, k, v, attention = _attention(x, w_q, w_k, w_v)
    bind_axes({"v": (v, "T E"), "dlogits": (np.asarray(dlogits), "T E")})
    dlogits = widen(np.asarray(dlogits)).astype(v.dtype, copy=False)
    dattention = dlogits[:, :, None] * v[:, None, :]
    inner = np.sum(attention * dattention, axis=2, keepdims=True)
    dscores = attention * (dattention - inner)
    dq, dk = np.einsum("tab,tb->ta", dscores, k), np.einsum("tab,ta->tb", dscores, q)
    dv = np.einsum("tab,ta->tb", attention, dlogits)
    pairs = [router_logits_vjp(x, w, d) for w, d in ((w_q, dq), (w_k, dk), (w_v, dv))]
    dx = pairs[0][0] + pairs[1][0] + pairs[2][0]
    return AttentionRouterGradients(*(round_to(g, x.dtype) for g in (dx, *(dw for _, dw in pairs))))


def _attention(
    x: FloatArray, w_q: FloatArray, w_k: FloatArray, w_v: FloatArray, memory: Memory | None = None
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return q, k and v, shape (T, E), and the attention of experts to experts, shape (T, E, E)."""
    x, w_q, w_k, w_v = floating(x=x, w_q=w_q, w_k=w_k, w_v=w_v)
    bind_axes({"x": (x, "T D"), "w_q": (w_q, "D E"), "w_k": (w_k, "D E"), "w_v": (w_v, "D E")})
    q, k, v = (router_logits(x, w, memory=memory) for w in (w_q, w_k, w_v))
    return q, k, v, softmax(product_of(memory)("ta,tb->tab", q, k))


def _sample_layer(
    rng: np.random.Generator, *, T: int, D: int, E: int, F: int, k: int, experts: str, convention: str
) -> Case:
    while True:  # until the logits are so far apart that a small step changes no choice
        layer = sample_layer(rng, T=T, D=D, E=E, F=F, experts=experts)
        router = _sample_router(rng, T=T, D=D, E=E).args[1:]
        if gap(attention_router(layer.args[0], *router)):
            break
    options = {**layer.kwargs, "k": min(k, E), "convention": convention}
    return Case((layer.args[0], *router, *layer.args[2:]), options)


@technique(
    "moe.attention_router.layer",
    entries=(43,),
    kind="function",
    source=_SOURCE,
    axes={"T": (0, 4), "D": (1, 4), "E": (1, 4), "F": (1, 4), "k": (1, 3)},
    options={"experts": EXPERTS, "convention": ("switch", "gshard")},
    edges=({"T": 0}, {"T": 1, "D": 1, "E": 1, "F": 1}, {"T": 3, "E": 3, "k": 3}),
    sample=_sample_layer,
    vjp="refimpl.moe.attention_router:attention_routed_vjp",
)
def attention_routed(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    k: int = 2,
    convention: Convention = "gshard",
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return a top-k layer whose logits come from `attention_router`.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_q, w_k, w_v : ndarray of float, shape (D, E)
        The router, as for `attention_router`.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts.
    k : int
        Experts a token: 2 of 32 in Yuan 2.0-M32.
    convention : {"switch", "gshard", "mixtral"}
        "gshard" is the code's ``norm_topk_prob=True``, "switch" is False.
    memory : Memory, optional
        Counts the operations: the router's and ``T k (4 D F + 2 D)``, gated ``6 D F``.
    w_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts, as in the model.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of the experts.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit together, are not real, or an option is out of range.

    References
    ----------
    .. [1] Wu et al., 2024, arXiv:2405.17976, section 3.1.2.

    Examples
    --------
    >>> x, zero, w = np.array([[1.0]]), np.zeros((1, 2)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> attention_routed(x, zero, zero, zero, w, np.ones((2, 1, 1)))
    array([[2.]])
    """
    logits = attention_router(x, w_q, w_k, w_v, memory=memory)
    return sparse_mixture(x, logits, w_in, w_out, k=k, convention=convention, memory=memory, **options)


def attention_routed_vjp(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    k: int = 2,
    convention: Convention = "gshard",
    **options: Unpack[ExpertOptions],
) -> AttentionRoutedGradients:
    """Return the gradients of ``sum(dy * attention_routed(x, w_q, ..., w_out, ...))``.

    Parameters
    ----------
    x, w_q, w_k, w_v, w_in, w_out, k, convention, **options
        As for `attention_routed`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    AttentionRoutedGradients
        The choice has no gradient, the gates of the chosen experts have one.

    Examples
    --------
    >>> x, zero, w = np.array([[1.0]]), np.zeros((1, 2)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> attention_routed_vjp(x, zero, zero, zero, w, np.ones((2, 1, 1)), x).dw_v
    array([[0., 0.]])
    """
    logits = attention_router(x, w_q, w_k, w_v)
    back = sparse_mixture_vjp(x, logits, w_in, w_out, dy, k=k, convention=convention, **options)
    router = attention_router_vjp(x, w_q, w_k, w_v, back.dlogits)
    dx = round_to(widen(back.dx) + widen(router.dx), back.dx.dtype)
    return AttentionRoutedGradients(dx, *router[1:], back.dw_in, back.dw_out, back.dw_gate)
