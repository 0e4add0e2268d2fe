"""Attention of a few new queries over a long cache: its keys in parts, or in pages.

The last queries of a sequence see all keys before them.  A part of the keys gives an output and a log-sum-exp
of its own; parts are merged by them, so they can be computed apart, by as many processors as there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.dense import AttentionOutput, scaled_dot_product_attention
from refimpl.attention.output_spread import output_spread
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_decode import AXES, EDGES, OPTIONS, PAGED_EDGES, sample_decode, sample_paged
from refimpl.attention.scores import attention_shape
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = ["checked_pages", "gathered", "merged", "paged_attention", "split_kv_attention"]


def merged(outs: FloatArray, lses: FloatArray) -> AttentionOutput:
    """Return the attention over all parts from outputs (S, B, T, H, Dv) and log-sum-exps (S, B, H, T).

    Examples
    --------
    >>> halves = np.array([2.0, 4.0]).reshape(2, 1, 1, 1, 1), np.zeros((2, 1, 1, 1))
    >>> merged(*halves).out.item(), round(merged(*halves).lse.item(), 4)
    (3.0, 0.6931)
    """
    top = np.max(lses, axis=0, initial=-np.inf)
    base = np.where(np.isneginf(top), 0, top)
    weights = np.exp(lses - base)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):  # log(0) = -inf is the documented result
        lse = base + np.log(total)
    shares = weights / np.where(total == 0, 1, total)
    return AttentionOutput(np.sum(np.swapaxes(shares, 2, 3)[..., None] * outs, axis=0), lse)


def _split_kv_spread(case: Case) -> Any:
    return output_spread(split_kv_attention, case)


@technique(
    "attention.split_kv",
    entries=(15, 27),
    kind="function",
    source=Source("Dao et al. 2023", "crfm.stanford.edu/2023/10/12/flashdecoding", "the three steps"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_decode,
    terms=lambda case: attention_terms(_as_dense(case)),
    spread=_split_kv_spread,
)
def split_kv_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    splits: int = 1,
    k_lengths: IntArray | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> FloatArray | AttentionOutput:
    """Return the attention of the last queries over a cache, whose keys are cut in parts and merged.

    Parameters
    ----------
    q : ndarray of float, shape (B, Tq, Hq, D)
        The newest Tq tokens of each sequence.
    k, v : ndarray of float, shapes (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        The cache, new tokens included.
    splits : int
        Parts of the cache: ``ceil(Tk / splits)`` keys each, the last ones fewer or none.
    k_lengths : ndarray of int, shape (B,), optional
        Valid keys of each sequence.
    scale : float, optional
        Factor on q·k.  Default ``D ** -0.5``.
    return_lse : bool
        Also return the log-sum-exp, shape (B, Hq, Tq).

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention` with causal="bottom_right".

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention`, and if `splits` is below 1.

    Notes
    -----
    Outputs of parts stay in the wide dtype.  **Special cases**: a part in which a query sees no key has
    log-sum-exp -inf and weight 0.

    References
    ----------
    .. [1] Dao, Haziza, Massa & Sizov, 2023, Flash-Decoding for long-context inference.
    .. [2] Milakov & Gimelshein, 2018, arXiv:1805.02867, section 3.1, eq. 4: the merge.

    Examples
    --------
    >>> q, k = np.ones((1, 1, 1, 8)), np.ones((1, 4, 1, 8))
    >>> v = np.arange(4.0).reshape(1, 4, 1, 1)
    >>> split_kv_attention(q, k, v, splits=3).item()
    1.5
    """
    q, k, v = floating(q=q, k=k, v=v)
    shape, dtype, wide = attention_shape(q, k, v), q.dtype, wide_dtype(q.dtype)
    size = max(1, -(-shape.Tk // whole("splits", splits)))
    lengths = np.full(shape.B, shape.Tk) if k_lengths is None else as_array("k_lengths", k_lengths)
    scaled_dot_product_attention(q[:, :0], k, v, k_lengths=k_lengths)  # checks the lengths
    last = lengths[:, None] - shape.Tq + np.arange(shape.Tq)  # the last key of each query
    parts = []
    for start in range(0, max(shape.Tk, 1), size):
        keys = np.arange(start, min(start + size, shape.Tk))
        mask = (keys <= last[..., None])[:, None]
        args = (widen(x).astype(wide) for x in (q, k[:, keys], v[:, keys]))
        parts.append(scaled_dot_product_attention(*args, attn_mask=mask, scale=scale, return_lse=True))
    out, lse = merged(np.stack([part.out for part in parts]), np.stack([part.lse for part in parts]))
    out = round_to(out, dtype)
    return AttentionOutput(out, lse) if return_lse else out


def _as_dense(case: Case) -> Case:
    """Return the call of dense attention that a decode step stands for."""
    return case.without("splits").replace(causal="bottom_right")


def gathered(pages: FloatArray, page_table: IntArray) -> FloatArray:
    """Return the cache [B, pages × page, H, D] that a table of pages stands for; -1 is no page, zeros.

    Examples
    --------
    >>> gathered(np.arange(3.0).reshape(3, 1, 1, 1), np.array([[2, 0, -1]])).ravel()
    array([2., 0., 0.])
    """
    rows = pages[np.maximum(page_table, 0)] * (page_table >= 0)[..., None, None, None].astype(np.int8)
    B, count = page_table.shape
    return round_to(widen(rows), pages.dtype).reshape(B, count * pages.shape[1], *pages.shape[2:])


def _paged_spread(case: Case) -> Any:
    return output_spread(paged_attention, case)


@technique(
    "attention.paged",
    entries=(15,),
    kind="function",
    source=Source("Kwon et al. 2023", "arXiv:2309.06180", "section 4.1, eq. 4"),
    axes=AXES,
    options=OPTIONS,
    edges=PAGED_EDGES,
    sample=sample_paged,
    terms=lambda case: attention_terms(_as_dense(_without_pages(case))),
    spread=_paged_spread,
)
def paged_attention(
    q: FloatArray,
    k_pages: FloatArray,
    v_pages: FloatArray,
    page_table: IntArray,
    /,
    *,
    k_lengths: IntArray,
    splits: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
) -> FloatArray | AttentionOutput:
    """Return `split_kv_attention` over a cache that lies in pages.

    Parameters
    ----------
    q : ndarray of float, shape (B, Tq, Hq, D)
        The newest Tq tokens of each sequence.
    k_pages, v_pages : ndarray of float, shapes (P, page, Hkv, D), (P, page, Hkv, Dv)
        Pages of all sequences, in any order; several sequences may share one.
    page_table : ndarray of int, shape (B, n)
        The page of each run of `page` tokens; -1 where there is none, which no valid key may need.
    k_lengths : ndarray of int, shape (B,)
        Valid keys of each sequence.
    splits, scale, return_lse
        As for `split_kv_attention`.

    Returns
    -------
    ndarray or AttentionOutput
        As `split_kv_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `split_kv_attention`, and if the table names pages that there are not.

    References
    ----------
    .. [1] Kwon et al., 2023, arXiv:2309.06180, section 4.1, eq. 4.

    Examples
    --------
    >>> q, pages = np.zeros((1, 1, 1, 1)), np.array([5.0, 1.0, 3.0]).reshape(3, 1, 1, 1)
    >>> paged_attention(q, pages, pages, np.array([[1, 2]]), k_lengths=np.array([2])).item()
    2.0
    """
    q, k_pages, v_pages = floating(q=q, k_pages=k_pages, v_pages=v_pages)
    table = checked_pages(q, k_pages, v_pages, page_table, k_lengths)
    k, v = gathered(k_pages, table), gathered(v_pages, table)
    return split_kv_attention(q, k, v, splits=splits, k_lengths=k_lengths, scale=scale, return_lse=return_lse)


def checked_pages(
    q: FloatArray, k_pages: FloatArray, v_pages: FloatArray, page_table: Any, k_lengths: Any
) -> IntArray:
    """Return the table of pages, if it names pages that there are wherever a length needs one."""
    table = as_array("page_table", page_table)
    if not np.issubdtype(table.dtype, np.integer):
        raise DTypeError(f"page_table: expected whole numbers, got {table.dtype}")
    sizes = bind_axes(
        {
            "q": (q, "B Tq Hq D"),
            "k_pages": (k_pages, "P page Hkv D"),
            "v_pages": (v_pages, "P page Hkv Dv"),
            "page_table": (table, "B n"),
        }
    )
    if sizes["page"] == 0 or (table.size and sizes["P"] == 0):
        raise ShapeError(f"k_pages: expected pages of at least one token, got shape {k_pages.shape}")
    if table.size and not (table.min() >= -1 and table.max() < sizes["P"]):
        found = f"{table.min()} to {table.max()}"
        raise OptionError(f"page_table: expected pages in [-1, {sizes['P']}), got {found}")
    lengths = as_array("k_lengths", k_lengths)
    if lengths.shape == (sizes["B"],) and sizes["B"]:
        needed = np.arange(sizes["n"]) * sizes["page"] < lengths[:, None]
        if np.any(needed & (table < 0)):
            raise OptionError("page_table: -1 where k_lengths needs a page")
    return table


def _without_pages(case: Case) -> Case:
    q, k_pages, v_pages, table = case.args
    return Case((q, gathered(k_pages, table), gathered(v_pages, table)), case.kwargs)
