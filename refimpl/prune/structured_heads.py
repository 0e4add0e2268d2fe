"""Structured pruning of attention heads: masked, and the smaller layer that gives the same output."""

from __future__ import annotations

import numpy as np

from refimpl.attention.multi_head import (
    MultiHeadGradients,
    multi_head_attention,
    multi_head_attention_vjp,
)
from refimpl.errors import ShapeError
from refimpl.numerics import BoolArray, FloatArray, round_to, widen
from refimpl.prune.structured import kept_units, sample_mask
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import bind_axes, floating

__all__ = ["compacted_heads", "masked_heads", "masked_heads_vjp"]


def sample_head_units(
    rng: np.random.Generator, *, T: int, M: int, H: int, D: int, kept: str, causal: bool
) -> Case:
    """Return a call of `masked_heads`.

    Examples
    --------
    >>> shape = dict(T=2, M=3, H=2, D=4, kept="all", causal=False)
    >>> [a.shape for a in sample_head_units(np.random.default_rng(0), **shape).args]
    [(1, 2, 3), (3, 8), (3, 8), (3, 8), (8, 3), (2,)]
    """
    shapes = ((1, T, M), *((M, H * D),) * 3, (H * D, M))
    arrays = tuple(rng.standard_normal(shape) for shape in shapes)
    return Case((*arrays, sample_mask(rng, H, kept)), {"causal": causal})


def _head_terms(case: Case) -> tuple[int, FloatArray]:
    x, w_q, _, w_v, w_o, _ = case.args
    values = (np.abs(x) @ np.abs(w_v)).max(axis=1, keepdims=True, initial=0.0)
    return sum(w_q.shape) + x.shape[1] * 2 + 8, np.broadcast_to(values @ np.abs(w_o), x.shape)


@technique(
    "prune.structured.heads",
    entries=(79,),
    kind="function",
    source=Source("Michel et al. 2019", "arXiv:1905.10650", "section 2.3, eq. 1: masked heads"),
    axes={"T": (1, 4), "M": (1, 4), "H": (1, 4), "D": (1, 3)},
    options={"kept": ("some", "all", "none"), "causal": (False, True)},
    edges=(
        {"T": 0, "kept": "some", "causal": False},
        {"T": 1, "M": 1, "H": 1, "D": 1, "kept": "all"},
        {"T": 3, "M": 4, "H": 3, "D": 2, "kept": "none"},
        {"T": 3, "M": 4, "H": 4, "D": 2, "kept": "some", "causal": True},
    ),
    sample=sample_head_units,
    terms=_head_terms,
    vjp="refimpl.prune.structured_heads:masked_heads_vjp",
)
def masked_heads(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    keep: BoolArray,
    /,
    *,
    causal: bool = False,
) -> FloatArray:
    """Return multi-head attention whose heads outside `keep` give nothing.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    w_q, w_k, w_v, w_o : ndarray of float, shapes (M, H D) three times, and (H D, M)
        As for `refimpl.attention.multi_head_attention`.
    keep : ndarray of bool, shape (H,)
        Which heads stay.
    causal : bool
        As there.

    Returns
    -------
    ndarray of float, shape (B, T, M)
        0 if no head stays.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, are not real, or `keep` is not boolean.

    References
    ----------
    .. [1] Michel et al., 2019, arXiv:1905.10650, section 2.3.

    Examples
    --------
    >>> x, w = np.ones((1, 1, 2)), np.eye(2)
    >>> masked_heads(x, w, w, w, w, np.array([True, False]))
    array([[[1., 0.]]])
    """
    heads = (x, w_q, w_k, w_v, _masked(w_o, keep))
    return multi_head_attention(*heads, num_heads=len(keep), causal=causal)


def masked_heads_vjp(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    keep: BoolArray,
    dy: FloatArray,
    /,
    *,
    causal: bool = False,
) -> MultiHeadGradients:
    """Return the gradients of `masked_heads`: those of the layer, 0 for what belongs to a removed head.

    Parameters
    ----------
    x, w_q, w_k, w_v, w_o, keep, causal
        As for `masked_heads`.
    dy : ndarray of float, shape (B, T, M)
        Gradient of the output.

    Returns
    -------
    MultiHeadGradients

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `masked_heads`.

    Examples
    --------
    >>> x, w = np.ones((1, 1, 2)), np.eye(2)
    >>> masked_heads_vjp(x, w, w, w, w, np.array([True, False]), x).dw_v
    array([[1., 0.],
           [1., 0.]])
    """
    heads = (x, w_q, w_k, w_v, _masked(w_o, keep))
    found = multi_head_attention_vjp(*heads, dy, num_heads=len(keep), causal=causal)
    return found._replace(dw_o=_masked(found.dw_o, keep))


@implements("prune.structured.heads", backend="numpy")
def compacted_heads(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    keep: BoolArray,
    /,
    *,
    causal: bool = False,
) -> FloatArray:
    """Return `masked_heads` from the smaller layer: a removed head's columns and rows taken out.

    Examples
    --------
    >>> x, w = np.ones((1, 1, 2)), np.eye(2)
    >>> compacted_heads(x, w, w, w, w, np.array([True, False]))
    array([[[1., 0.]]])
    """
    keep, rows = kept_units(keep, np.size(keep)), _rows(w_o, keep)
    x, w_q, w_k, w_v, w_o = floating(x=x, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    if not keep.any():
        return np.zeros(x.shape, x.dtype)
    small = (x, w_q[:, rows], w_k[:, rows], w_v[:, rows], w_o[rows])
    return multi_head_attention(*small, num_heads=int(keep.sum()), causal=causal)


def _masked(w_o: FloatArray, keep: BoolArray) -> FloatArray:
    """Return W_o with the rows of removed heads set to 0."""
    (w_o,) = floating(w_o=w_o)
    wide = widen(w_o)
    return round_to(wide * _rows(w_o, keep)[:, None].astype(wide.dtype), w_o.dtype)


def _rows(w_o: FloatArray, keep: BoolArray) -> BoolArray:
    """Return which rows of W_o belong to heads that stay."""
    bind_axes({"w_o": (np.asarray(w_o), "H*Dv M")})
    keep = kept_units(keep, np.size(keep))
    if not keep.size or np.shape(w_o)[0] % keep.size:
        raise ShapeError(f"keep: expected a divisor of w_o's {np.shape(w_o)[0]} rows, got {keep.size} heads")
    return np.repeat(keep, np.shape(w_o)[0] // keep.size)
