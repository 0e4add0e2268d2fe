"""Multi-head attention as a sum of heads: each head is a module of its own, and they only add up."""

from __future__ import annotations

import numpy as np

from refimpl.attention.multi_head import sample_multi_head
from refimpl.attention.online_softmax import softmax
from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["head_decomposition", "head_terms"]


def _sample(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    M: int,
    H: int,
    D: int,
    bias: bool = False,
    square: bool = False,
) -> Case:
    extra = "square" if square else "none"
    case = sample_multi_head(rng, B=B, T=T, M=M, Hkv=H, group=1, D=D, extra=extra)
    return case.replace(b_o=rng.standard_normal(case.args[4].shape[1])) if bias else case


@technique(
    "attention.head_decomposition",
    entries=(10,),
    kind="identity",
    source=Source("Ren et al. 2022", "arXiv:2205.10036", "section 2, multi-head self-attention"),
    axes={"B": (1, 2), "T": (1, 8), "M": (1, 8), "H": (1, 4), "D": (1, 5)},
    options={"bias": (False, True), "square": (False, True)},
    edges=({"B": 0}, {"T": 0}, {"B": 1, "T": 1, "M": 1, "H": 1, "D": 1}),
    sample=_sample,
    vjp="refimpl.attention.multi_head:multi_head_attention_vjp",
)
def head_decomposition(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    /,
    *,
    num_heads: int,
    b_o: FloatArray | None = None,
) -> FloatArray:
    """Return multi-head attention as ``sum_h softmax(X W_h^Q W_h^Kᵀ Xᵀ / √d_h) X W_h^V W_h^Oᵀ + b_O``.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    w_q, w_k, w_v : ndarray of float, shape (M, H * d_h)
        Projections; head h owns the columns ``h * d_h : (h + 1) * d_h``.
    w_o : ndarray of float, shape (H * d_h, M')
        Output projection; head h owns the rows ``h * d_h : (h + 1) * d_h``.
    num_heads : int
        H.
    b_o : ndarray of float, shape (M',), optional
        Added once, not once a head.

    Returns
    -------
    ndarray of float, shape (B, T, M')
        Equal to `multi_head_attention`.

    Raises
    ------
    ShapeError, DTypeError
        If shapes do not fit, or an array is not real.

    Notes
    -----
    The slide divides by √d; the width of a head, d_h, is meant.  Biases of the other projections have no
    place in the products ``W_h^Q W_h^Kᵀ``, so this form has none.

    References
    ----------
    .. [1] Ren et al., 2022, "Exploring extreme parameter compression for pre-trained language models",
       arXiv:2205.10036 (ICLR 2022, whose program names Wang first).

    Examples
    --------
    >>> x, eye = np.ones((1, 2, 4)), np.eye(4)
    >>> head_decomposition(x, eye, eye, eye, eye, num_heads=2)[0, 0]
    array([1., 1., 1., 1.])
    """
    (x,) = floating(x=x)
    terms = head_terms(x, w_q, w_k, w_v, w_o, num_heads=num_heads)
    total = terms.sum(axis=0)
    if b_o is not None:
        (b_o,) = floating(b_o=b_o)
        if b_o.shape != total.shape[-1:]:
            raise ShapeError(f"b_o: expected shape {total.shape[-1:]}, got {b_o.shape}")
        total = total + widen(b_o).astype(total.dtype)
    return round_to(total, x.dtype)


def head_terms(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    /,
    *,
    num_heads: int,
) -> FloatArray:
    """Return what each head adds, shape (H, B, T, M'), in the wide dtype.

    Parameters
    ----------
    x, w_q, w_k, w_v, w_o, num_heads
        As for `head_decomposition`.

    Returns
    -------
    ndarray of float, shape (H, B, T, M')
        Removing head h from the model subtracts term h and nothing else.

    Examples
    --------
    >>> x, eye = np.ones((1, 2, 4)), np.eye(4)
    >>> head_terms(x, eye, eye, eye, eye, num_heads=2)[:, 0, 0]
    array([[1., 1., 0., 0.],
           [0., 0., 1., 1.]])
    """
    arrays = floating(x=x, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    x, w_q, w_k, w_v, w_o = (widen(array) for array in arrays)
    axes = {
        "x": (x, "B T M"),
        "w_q": (w_q, "M J"),
        "w_k": (w_k, "M J"),
        "w_v": (w_v, "M J"),
        "w_o": (w_o, "J O"),
    }
    width = bind_axes(axes)["J"]
    if width % whole("num_heads", num_heads):
        raise ShapeError(f"w_q: {width} columns do not divide into num_heads={num_heads}")
    terms = []
    for h in range(num_heads):
        part = slice(h * width // num_heads, (h + 1) * width // num_heads)
        # The head through its two products of rank d_h, which are all that can be seen of its weights.
        score_form = contract("mj,nj->mn", w_q[:, part], w_k[:, part])
        value_form = contract("mj,jo->mo", w_v[:, part], w_o[part])
        scores = contract("bim,bjm->bij", contract("bin,nm->bim", x, score_form), x)
        p = softmax(scores * scores.dtype.type((width // num_heads) ** -0.5))
        terms.append(contract("bij,bjo->bio", p, contract("bjm,mo->bjo", x, value_form)))
    return np.stack(terms)
