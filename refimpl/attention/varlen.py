"""Attention of sequences of different lengths, packed one behind the other without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.dense import (
    AttentionGradients,
    AttentionOutput,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.attention.output_spread import output_spread
from refimpl.attention.samples_varlen import AXES, EDGES, OPTIONS, sample_varlen, varlen_terms
from refimpl.attention.scores import AttentionShape, Causal, attention_shape
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import Array, FloatArray, IntArray, round_to, wide_dtype
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = [
    "EVERYWHERE",
    "Packing",
    "Seen",
    "checked_window",
    "gradients_by_sequence",
    "key_ranges",
    "packing",
    "varlen_attention",
    "varlen_attention_vjp",
]

EVERYWHERE = (-1, -1)  # flash-attention's window that is none


class Packing(NamedTuple):
    """Where the sequences of a call lie, checked; `shape` is that of the packed arrays, as one sequence."""

    shape: AttentionShape
    queries: IntArray
    keys: IntArray

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Yield where the queries and the keys of each sequence lie."""
        for s in range(self.queries.size - 1):
            yield slice(*self.queries[s : s + 2].tolist()), slice(*self.keys[s : s + 2].tolist())


def packing(
    q: Array, k: Array, v: Array, cu_seqlens_q: Any, cu_seqlens_k: Any, /, *, causal: Causal = False
) -> Packing:
    """Check the arrays of `varlen_attention`, which documents them, and return where sequences lie.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        See `varlen_attention`.
    """
    bind_axes({"q": (q, "Tq Hq D"), "k": (k, "Tk Hkv D"), "v": (v, "Tk Hkv Dv")})
    shape = attention_shape(q[None], k[None], v[None])
    queries = _starts("cu_seqlens_q", cu_seqlens_q, shape.Tq)
    keys = _starts("cu_seqlens_k", cu_seqlens_k, shape.Tk)
    if queries.size != keys.size:
        raise ShapeError(
            f"cu_seqlens_k: expected {queries.size - 1} sequences, as cu_seqlens_q, got {keys.size - 1}"
        )
    if causal is True and not np.array_equal(queries, keys):
        raise OptionError(
            "causal: True is ambiguous for lengths that differ; say 'top_left' or 'bottom_right'"
        )
    if not isinstance(causal, bool | np.bool_) and causal not in ("top_left", "bottom_right"):
        raise OptionError(f"causal: expected False, True, 'top_left' or 'bottom_right', got {causal!r}")
    return Packing(shape, queries, keys)


def _starts(name: str, value: Any, total: int) -> IntArray:
    array = as_array(name, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ShapeError(f"{name}: expected shape (sequences + 1,), got {array.shape}")
    starts = array.astype(np.int64)
    if starts[0] != 0 or starts[-1] > total or np.any(np.diff(starts) < 0):
        raise OptionError(
            f"{name}: expected sums of lengths, from 0 to at most {total} tokens, got {array.tolist()}"
        )
    return starts


def _spread(case: Case) -> Any:
    return output_spread(varlen_attention, case)


@technique(
    "attention.varlen",
    entries=(8, 29),
    kind="function",
    source=Source("Dao et al. 2022", "github.com/Dao-AILab/flash-attention", "flash_attn_varlen_func"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_varlen,
    terms=varlen_terms,
    spread=_spread,
    vjp="refimpl.attention.varlen:varlen_attention_vjp",
)
def varlen_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    /,
    *,
    causal: Causal = False,
    window_size: tuple[int, int] = EVERYWHERE,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    memory: Memory | None = None,
) -> FloatArray | AttentionOutput:
    """Return attention within each of several sequences of variable length, packed one behind the other.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (total_q, Hq, D), (total_k, Hkv, D), (total_k, Hkv, Dv)
        All tokens.  Hkv divides Hq.
    cu_seqlens_q, cu_seqlens_k : ndarray of int, shape (sequences + 1,)
        Where the queries and the keys of each sequence start, from 0, and where those of the last one end:
        sequence s has queries ``cu_seqlens_q[s]`` up to, and without, ``cu_seqlens_q[s + 1]``.
    causal : bool or {"top_left", "bottom_right"}
        As for `scaled_dot_product_attention`, in each sequence by its own lengths.
    window_size : tuple of int
        How many keys a query sees on the left and on the right of the one at its own place; -1: all of them.
        Causality sees none on the right.  Places are counted from the ends of a sequence, as for
        "bottom_right", but for causal="top_left".
    softcap, scale
        As for `scaled_dot_product_attention`.
    return_lse : bool
        Also return the log-sum-exp, shape (Hq, total_q).
    memory : Memory, optional
        Counts what moves.

    Returns
    -------
    ndarray or AttentionOutput
        The output, shape (total_q, Hq, Dv), in the dtype of the arrays.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit each other, or the starts are no integers.
    OptionError
        If starts do not begin with 0, decrease, or end behind the last token; or causal=True and lengths
        differ; or a side of the window is below -1.

    Notes
    -----
    **Special cases**

    - Tokens behind the last sequence are padding: nobody sees the keys, and the queries give 0 and a
      log-sum-exp of -inf, as those of a sequence without keys do.
    - A sequence may be empty.

    References
    ----------
    .. [1] Dao et al., flash-attention, flash_attn_interface.py, ``flash_attn_varlen_func``: the layout.

    Examples
    --------
    >>> x = np.array([1.0, 3.0, 5.0]).reshape(3, 1, 1)
    >>> varlen_attention(0 * x, x, x, np.array([0, 2, 3]), np.array([0, 2, 3])).ravel()
    array([2., 2., 5.])
    """
    q, k, v = floating(q=q, k=k, v=v)
    pack, moved = packing(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal), memory or Memory()
    seen = Seen(pack, causal, window_size)
    out = np.zeros((pack.shape.Tq, pack.shape.Hq, pack.shape.Dv), q.dtype)
    lse = np.full((pack.shape.Tq, pack.shape.Hq), -np.inf, wide_dtype(q.dtype))
    for queries, keys in pack.parts():
        with moved.on_chip():
            rows = (("Q", q, queries), ("K", k, keys), ("V", v, keys))
            parts = [round_to(moved.load(name, x, part), q.dtype)[None] for name, x, part in rows]
            found = scaled_dot_product_attention(
                *parts, **seen.within(queries, keys), softcap=softcap, scale=scale, return_lse=True
            )
            moved.store("O", out, queries, found.out[0])
            if return_lse:
                moved.store("L", lse, queries, found.lse[0].T)
    return AttentionOutput(out, lse.T) if return_lse else out


def varlen_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    do: FloatArray,
    /,
    *,
    causal: Causal = False,
    window_size: tuple[int, int] = EVERYWHERE,
    softcap: float | None = None,
    scale: float | None = None,
) -> AttentionGradients:
    """Return the gradients of ``sum(do * varlen_attention(q, k, v, ...))`` in q, k and v.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k
        As for `varlen_attention`.
    do : ndarray of float, shape (total_q, Hq, Dv)
        Gradient of the output.
    causal, window_size, softcap, scale
        Those of the forward call.

    Returns
    -------
    AttentionGradients
        In the dtype of the arrays; 0 for padding.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `varlen_attention`.

    Examples
    --------
    >>> x, starts = np.ones((3, 1, 4)), np.array([0, 2, 3])
    >>> varlen_attention_vjp(x, x, x, starts, starts, x).dv[:, 0, 0]
    array([1., 1., 1.])
    """
    q, k, v, do = floating(q=q, k=k, v=v, do=do)
    pack = packing(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal)
    bind_axes({"q": (q, "Tq Hq D"), "v": (v, "Tk Hkv Dv"), "do": (do, "Tq Hq Dv")})
    return gradients_by_sequence(
        scaled_dot_product_attention_vjp, (q, k, v), pack, Seen(pack, causal, window_size),
        lambda queries: (do[queries],), softcap=softcap, scale=scale,
    )  # fmt: skip


def gradients_by_sequence(
    gradients: Callable[..., AttentionGradients],
    arrays: tuple[FloatArray, FloatArray, FloatArray],
    pack: Packing,
    seen: Seen,
    of_queries: Callable[[slice], tuple[FloatArray, ...]],
    **options: Any,
) -> AttentionGradients:
    """Return what `gradients` says of each sequence of packed q, k and v, packed again; 0 for padding.

    ``of_queries(part)`` returns what it takes behind them, of the queries of a sequence.

    Examples
    --------
    >>> x, starts = np.ones((3, 1, 4)), np.array([0, 2, 3])
    >>> pack = packing(x, x, x, starts, starts)
    >>> def twice(q, k, v, do, **_):
    ...     return AttentionGradients(2 * q, 2 * k, 2 * do)
    >>> seen = Seen(pack, False, EVERYWHERE)
    >>> gradients_by_sequence(twice, (x, x, x), pack, seen, lambda part: (x[part],)).dv[:, 0, 0]
    array([2., 2., 2.])
    """
    q, k, v = arrays
    dq, dk, dv = (np.zeros_like(x) for x in arrays)
    for queries, keys in pack.parts():
        parts = q[queries], k[keys], v[keys], *of_queries(queries)
        found = gradients(*(x[None] for x in parts), **seen.within(queries, keys), **options)
        dq[queries], dk[keys], dv[keys] = found.dq[0], found.dk[0], found.dv[0]
    return AttentionGradients(dq, dk, dv)


def checked_window(window_size: Any) -> tuple[int, int]:
    """Return how many keys a window has on the left and on the right of a query's own; -1: all.

    Raises
    ------
    DTypeError, OptionError
        If it is no pair of whole numbers, or one is below -1.

    Examples
    --------
    >>> checked_window((3, 0))
    (3, 0)
    """
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise OptionError(f"window_size: expected two numbers, left and right, got {window_size!r}")
    left, right = (whole("window_size", side, -1) for side in window_size)
    return left, right


def key_ranges(
    pack: Packing, causal: Causal = False, window_size: tuple[int, int] = EVERYWHERE
) -> tuple[IntArray, IntArray]:
    """Return the first key that each query sees, and the one behind the last: what it sees has no gaps.

    Padding, and whoever sees nothing, gets an empty range.  Both are int64, shape (total_q,).

    Examples
    --------
    >>> x, starts = np.ones((4, 1, 1)), np.array([0, 2, 3])
    >>> key_ranges(packing(x, x, x, starts, starts), "top_left")
    (array([0, 0, 2, 0]), array([1, 2, 3, 0]))
    >>> key_ranges(packing(x, x, x, starts, starts), "top_left", (0, -1))
    (array([0, 1, 2, 0]), array([1, 2, 3, 0]))
    """
    left, right = checked_window(window_size)
    right = 0 if causal else right
    first, behind = np.zeros(pack.shape.Tq, np.int64), np.zeros(pack.shape.Tq, np.int64)
    for queries, keys in pack.parts():
        place = keys.start + np.arange(queries.stop - queries.start)
        if causal != "top_left":  # ends lie at the same place
            place += (keys.stop - keys.start) - place.size
        begin = np.full(place.size, keys.start) if left < 0 else place - left
        end = np.full(place.size, keys.stop) if right < 0 else place + right + 1
        first[queries] = np.clip(begin, keys.start, keys.stop)
        behind[queries] = np.maximum(first[queries], np.clip(end, keys.start, keys.stop))
    return first, behind


class Seen:
    """What the queries of a sequence see of its keys, as options of `scaled_dot_product_attention`."""

    def __init__(self, pack: Packing, causal: Causal, window_size: tuple[int, int]) -> None:
        self._causal, self._ranges = causal, None
        if checked_window(window_size) != EVERYWHERE:
            self._ranges = key_ranges(pack, causal, window_size)

    def within(self, queries: slice, keys: slice) -> dict[str, Any]:
        """Return them for one sequence."""
        if self._ranges is None:
            return {"causal": self._causal}
        first, behind = (array[queries, None] for array in self._ranges)
        key = np.arange(keys.start, keys.stop)
        return {"attn_mask": (first <= key) & (key < behind)}
