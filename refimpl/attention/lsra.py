"""Long-Short Range Attention, Lite Transformer's: half of the channels attend, the other half convolve.

The lecture's picture: convolution takes what is near, so that attention is left with what is far.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.lsra_branches import BIASES, local_branch, local_branch_vjp, long_short_call
from refimpl.attention.multi_head import multi_head_attention, multi_head_attention_vjp
from refimpl.numerics import BoolArray, FloatArray, round_to, widen
from refimpl.registry import Case, Option, Source, technique
from refimpl.validation import floating

__all__ = ["LongShortGradients", "long_short_range_attention", "long_short_range_attention_vjp"]


class LongShortGradients(NamedTuple):
    """Gradients of the eight arrays, and of the biases that were given."""

    dx: FloatArray
    dw_q: FloatArray
    dw_k: FloatArray
    dw_v: FloatArray
    dw_o: FloatArray
    dw_in: FloatArray
    dw_kernel: FloatArray
    dw_out: FloatArray
    db_q: FloatArray | None = None
    db_k: FloatArray | None = None
    db_v: FloatArray | None = None
    db_o: FloatArray | None = None
    db_in: FloatArray | None = None
    db_out: FloatArray | None = None


def sample_long_short(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    H: int,
    D: int,
    R: int,
    K: int,
    left: int,
    right: int,
    dynamic: bool = False,
    causal: bool = False,
    extra: str = "none",
) -> Case:
    """Return one call: H heads of width D on `left` channels, H of R channels and K taps on `right` ones.

    Examples
    --------
    >>> shape = dict(B=1, T=5, H=2, D=3, R=2, K=3, left=3, right=4)
    >>> [a.shape for a in sample_long_short(np.random.default_rng(0), **shape).args]
    [(1, 5, 7), (3, 6), (3, 6), (3, 6), (6, 3), (4, 8), (2, 3), (4, 4)]
    """
    C = H * R
    kernel = (C, H, K) if dynamic else (H, K)
    shapes = (
        (B, T, left + right),
        *[(left, H * D)] * 3,
        (H * D, left),
        (right, 2 * C),
        kernel,
        (C, right),
    )
    arrays = tuple(rng.standard_normal(shape) for shape in shapes)
    options: dict[str, Any] = {"num_heads": H}
    if causal:
        options["causal"] = True
    if extra in ("key_mask", "all"):
        options["key_mask"] = rng.random((B, T)) < 0.7
    if extra in ("biases", "all"):
        widths = (H * D, H * D, H * D, left, 2 * C, right)
        options |= {name: rng.standard_normal(width) for name, width in zip(BIASES, widths, strict=True)}
    return Case(arrays, options)


_AXES = {
    "B": (1, 2), "T": (1, 7), "H": (1, 2), "D": (1, 3), "R": (1, 2), "K": (1, 4),
    "left": (1, 4), "right": (1, 4),
}  # fmt: skip
_EDGES: tuple[dict[str, Option], ...] = (
    {**dict.fromkeys(_AXES, 1), "extra": "none"},
    {"B": 0},
    {"T": 0},
    {"T": 2, "K": 4, "causal": True},
    {"left": 1, "right": 4},
    {"T": 6, "extra": "all", "dynamic": True, "causal": True},
)


@technique(
    "attention.lsra",
    entries=(22,),
    kind="function",
    source=Source("Wu et al. 2020", "arXiv:2004.11886", "section 4, Figure 3"),
    axes=_AXES,
    options={
        "dynamic": (False, True),
        "causal": (False, True),
        "extra": ("none", "key_mask", "biases", "all"),
    },
    edges=_EDGES,
    sample=sample_long_short,
    vjp="refimpl.attention.lsra:long_short_range_attention_vjp",
)
def long_short_range_attention(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    w_in: FloatArray,
    w_kernel: FloatArray,
    w_out: FloatArray,
    /,
    *,
    num_heads: int,
    causal: bool = False,
    key_mask: BoolArray | None = None,
    b_q: FloatArray | None = None,
    b_k: FloatArray | None = None,
    b_v: FloatArray | None = None,
    b_o: FloatArray | None = None,
    b_in: FloatArray | None = None,
    b_out: FloatArray | None = None,
) -> FloatArray:
    """Return ``concat(multi_head(left), conv(glu(right w_in)) w_out)`` for the two parts of the channels.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.  The first channels, as many as `w_q` has rows, are the left part; the right part is the rest,
        as many as `w_in` has rows.  The authors give each half.
    w_q, w_k, w_v, w_o : ndarray of float
        Weights of `multi_head_attention` on the left part.
    w_in : ndarray of float, shape (Mr, 2 C)
        Projection of the right part; its first C outputs are multiplied by the sigmoid of the others (GLU).
    w_kernel : ndarray of float, shape (H', K) or (C, H', K)
        Kernels of `lightweight_convolution`, or the projection of `dynamic_convolution` that predicts them.
    w_out : ndarray of float, shape (C, Mr')
        Projection of what was convolved.
    num_heads : int
        Heads of the attention; the convolution's are an axis of `w_kernel`.
    causal : bool
        Whether a token sees only itself and earlier ones, in both parts.
    key_mask : ndarray of bool, shape (B, T), optional
        True for a token, False for padding: no key for the attention, and 0 before `w_in`.
    b_q, b_k, b_v, b_o, b_in, b_out : ndarray of float, one entry a column of the weight, optional
        Biases of the projections.

    Returns
    -------
    ndarray of float, shape (B, T, M')
        In the common dtype: first what attended, then what was convolved.

    Raises
    ------
    ShapeError
        If the two parts do not make up the channels, or other shapes do not fit.
    DTypeError
        If an array is not real, or `key_mask` is not bool.
    OptionError
        If `num_heads` is below 1.

    Notes
    -----
    The block around it has a feed-forward layer that is as narrow as its tokens, M to M, because attention
    is where the work is then.  **Special cases**

    - A query that is padding attends all the same; padded tokens are 0 before the convolution's projection,
      but not after it, if `b_in` is not: the released code sets them to 0 there and nowhere else.
    - Even kernels see one token more on the right than on the left, as in the released code.

    References
    ----------
    .. [1] Wu et al., 2020, arXiv:2004.11886, section 4.
    .. [2] github.com/mit-han-lab/lite-transformer, commit 8504193, modules/multibranch.py.

    Examples
    --------
    >>> x, one = np.ones((1, 3, 2)), np.ones((1, 1))
    >>> w_in = np.array([[1.0, 0.0]])  # the gate is half open
    >>> long_short_range_attention(x, one, one, one, one, w_in, np.zeros((1, 3)), one, num_heads=1)[0, 1]
    array([1. , 0.5])
    """
    biases = dict(zip(BIASES, (b_q, b_k, b_v, b_o, b_in, b_out), strict=True))
    call = long_short_call(x, (w_q, w_k, w_v, w_o), (w_in, w_kernel, w_out), biases, key_mask, causal)
    left = multi_head_attention(call.left, *call.attention, num_heads=num_heads, **call.options)
    return np.concatenate([left, round_to(local_branch(call), left.dtype)], axis=-1)


def long_short_range_attention_vjp(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    w_in: FloatArray,
    w_kernel: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    num_heads: int,
    causal: bool = False,
    key_mask: BoolArray | None = None,
    **biases: FloatArray | None,
) -> LongShortGradients:
    """Return the gradients of ``sum(dy * long_short_range_attention(...))``.

    Parameters
    ----------
    x, w_q, w_k, w_v, w_o, w_in, w_kernel, w_out : ndarray of float
        As for `long_short_range_attention`.
    dy : ndarray of float, shape (B, T, M')
        Gradient of the output.
    num_heads, causal, key_mask, **biases
        Those of the forward call.

    Returns
    -------
    LongShortGradients
        In the dtype of the arrays; of biases only those that were given.

    Examples
    --------
    >>> x, one = np.ones((1, 3, 2)), np.ones((1, 1))
    >>> w = one, one, one, one, np.array([[1.0, 0.0]]), np.zeros((1, 1)), one
    >>> long_short_range_attention_vjp(x, *w, x, num_heads=1).dx[0, 0]
    array([1. , 0.5])
    """
    given = {name: biases.get(name) for name in BIASES}
    call = long_short_call(x, (w_q, w_k, w_v, w_o), (w_in, w_kernel, w_out), given, key_mask, causal)
    (dy,) = floating(dy=dy)
    dtype, width = call.left.dtype, call.attention[3].shape[1]
    far = multi_head_attention_vjp(
        *(call.left, *call.attention, dy[..., :width]), num_heads=num_heads, **call.options
    )
    near = local_branch_vjp(call, widen(dy[..., width:]).astype(call.right.dtype, copy=False))
    dright, dw_in, dw_kernel, dw_out, db_in, db_out = (round_to(gradient, dtype) for gradient in near)
    return LongShortGradients(
        np.concatenate([far.dx, dright], axis=-1), *far[1:5], dw_in, dw_kernel, dw_out, *far[5:9],
        None if call.b_in is None else db_in, None if call.b_out is None else db_out,
    )  # fmt: skip
