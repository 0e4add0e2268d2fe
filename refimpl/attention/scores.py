"""What every attention of this project does to a score between the product q·k and the softmax.

A `ScoreRule` is built once from the caller's options and then asked for any part of the score matrix: all of
it by the dense reference, one tile at a time by the tiled ones.  It takes the indices of what is asked for
(sequence b, query head h, query rows i, key columns j), so no part knows how another part was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, wide_dtype, widen
from refimpl.random import as_seed, dropout_keep
from refimpl.validation import as_array, bind_axes, broadcastable, finite, floating, fraction, positive

__all__ = [
    "AttentionOptions",
    "AttentionShape",
    "Causal",
    "ScoreRule",
    "attention_shape",
    "backward_rule",
    "score_rule",
    "with_seed",
]

Causal: TypeAlias = bool | Literal["top_left", "bottom_right"]


class AttentionOptions(TypedDict, total=False):
    """Keyword options that every attention takes; `scaled_dot_product_attention` documents them."""

    causal: Causal
    attn_mask: BoolArray | None
    bias: FloatArray | None
    alibi_slopes: FloatArray | None
    softcap: float | None
    scale: float | None
    q_lengths: IntArray | None
    k_lengths: IntArray | None
    dropout_p: float
    rng: np.random.Generator | int | None
    dropout_mask: BoolArray | None


class AttentionShape(NamedTuple):
    """Sizes of the axes: sequences, queries, keys, query heads, key heads, head width, value width."""

    B: int
    Tq: int
    Tk: int
    Hq: int
    Hkv: int
    D: int
    Dv: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.Hq // self.Hkv


@dataclass(frozen=True)
class ScoreRule:
    """The options of one call, validated, with masks and biases broadcast as views."""

    shape: AttentionShape
    scale: float
    softcap: float | None
    bias: FloatArray | None
    slopes: FloatArray | None
    mask: BoolArray | None
    causal: bool
    offset: IntArray
    q_lengths: IntArray | None
    k_lengths: IntArray | None
    dropout_p: float
    seed: int
    dropout_mask: BoolArray | None
    wide: np.dtype[Any]

    def scores(
        self, product: FloatArray, b: IntArray, h: IntArray, rows: IntArray, columns: IntArray
    ) -> FloatArray:
        """Return the scores for a part of q·k, with -inf where a query may not attend.

        The order is that of flash-attention: scale, softcap, bias, ALiBi, and masks last, by selection:
        multiplying by 0 would turn an infinite or NaN score behind a mask into NaN.

        Parameters
        ----------
        product : ndarray of float, shape (..., Br, Bc)
            Dot products of queries `rows` with keys `columns`.
        b, h : ndarray of int
            Sequences and query heads, broadcasting to the leading shape.
        rows, columns : ndarray of int, shape (Br,) and (Bc,)
            Positions in the whole sequence.

        Returns
        -------
        ndarray of float, shape (..., Br, Bc)
            In the dtype of `product`.
        """
        s = product * product.dtype.type(self.scale)
        if self.softcap is not None:
            cap = product.dtype.type(self.softcap)
            s = cap * np.tanh(s / cap)
        if self.bias is not None:
            s = s + _part(self.bias, b, h, rows, columns).astype(s.dtype)
        if self.slopes is not None:
            distance = np.abs(rows[:, None] + self._offset(b) - columns)
            s = s - (self.slopes[h][..., None, None] * distance).astype(s.dtype)
        return np.where(self.allowed(b, h, rows, columns), s, s.dtype.type(-np.inf))

    def allowed(self, b: IntArray, h: IntArray, rows: IntArray, columns: IntArray) -> BoolArray:
        """Return, in the shape of `scores`, where a query may attend to a key."""
        i, j = rows[:, None], columns[None, :]
        shape = (*np.broadcast_shapes(np.shape(b), np.shape(h)), rows.size, columns.size)
        allowed = np.ones(shape, dtype=bool)
        if self.causal:
            allowed &= j <= i + self._offset(b)
        if self.q_lengths is not None:
            allowed &= i < self.q_lengths[b][..., None, None]
        if self.k_lengths is not None:
            allowed &= j < self.k_lengths[b][..., None, None]
        if self.mask is not None:
            allowed &= _part(self.mask, b, h, rows, columns)
        return allowed

    def keep(self, b: IntArray, h: IntArray, rows: IntArray, columns: IntArray) -> FloatArray | None:
        """Return the dropout factors of this part, 0 or 1 / (1 - p), in the wide dtype; None if p is 0."""
        if self.dropout_p == 0.0:
            return None
        if self.dropout_mask is not None:
            kept = _part(self.dropout_mask, b, h, rows, columns)
        else:
            kept = dropout_keep(self.seed, self.dropout_p, b, h, rows, columns)
        factors: FloatArray = np.where(kept, 1.0 / (1.0 - self.dropout_p), 0.0).astype(self.wide)
        return factors

    def product_gradient(self, ds: FloatArray, product: FloatArray) -> FloatArray:
        """Return the gradient of q·k, given that of the scores: through softcap and scale."""
        ds = ds * ds.dtype.type(self.scale)
        if self.softcap is None:
            return ds
        slope: FloatArray = 1 - np.tanh(product * (self.scale / self.softcap)) ** 2
        return ds * slope.astype(ds.dtype)

    def _offset(self, b: IntArray) -> Any:
        return self.offset[b][..., None, None]


def _part(array: Array, b: IntArray, h: IntArray, rows: IntArray, columns: IntArray) -> Array:
    index = np.asarray(b)[..., None, None], np.asarray(h)[..., None, None], rows[:, None], columns[None, :]
    part: Array = array[index]
    return part


def attention_shape(q: Array, k: Array, v: Array) -> AttentionShape:
    """Return the sizes of the axes of ``q [B,Tq,Hq,D]``, ``k [B,Tk,Hkv,D]``, ``v [B,Tk,Hkv,Dv]``.

    Raises
    ------
    ShapeError
        If an array has not four axes, shared axes differ, D is 0, or Hkv does not divide Hq.

    Examples
    --------
    >>> attention_shape(np.ones((1, 5, 4, 8)), np.ones((1, 7, 2, 8)), np.ones((1, 7, 2, 3)))
    AttentionShape(B=1, Tq=5, Tk=7, Hq=4, Hkv=2, D=8, Dv=3)
    """
    sizes = bind_axes({"q": (q, "B Tq Hq D"), "k": (k, "B Tk Hkv D"), "v": (v, "B Tk Hkv Dv")})
    if sizes["D"] == 0:
        raise ShapeError(f"q: axis D must be at least 1; got 0 (q has shape {q.shape})")
    if sizes["Hkv"] == 0 or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(
            f"k: axis Hkv must divide Hq; got Hkv={sizes['Hkv']}, Hq={sizes['Hq']} (q has shape {q.shape})"
        )
    return AttentionShape(**sizes)


def score_rule(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: Causal = False,
    attn_mask: BoolArray | None = None,
    bias: FloatArray | None = None,
    alibi_slopes: FloatArray | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_lengths: IntArray | None = None,
    k_lengths: IntArray | None = None,
    dropout_p: float = 0.0,
    rng: np.random.Generator | int | None = None,
    dropout_mask: BoolArray | None = None,
) -> ScoreRule:
    """Check the options of an attention against its arrays and return the rule they make.

    Parameters are those of `scaled_dot_product_attention`, which documents them.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        See `scaled_dot_product_attention`.

    Examples
    --------
    >>> x = np.ones((1, 4, 2, 16))
    >>> score_rule(x, x, x).scale
    0.25
    """
    shape = attention_shape(q, k, v)
    full = (shape.B, shape.Hq, shape.Tq, shape.Tk)
    wide = wide_dtype(q.dtype)
    queries = _lengths("q_lengths", q_lengths, shape.B, shape.Tq)
    keys = _lengths("k_lengths", k_lengths, shape.B, shape.Tk)
    lengths_agree = _lengths_agree(shape, queries, keys)
    aligned = _causal(causal, shape, lengths_agree)
    offset = np.zeros(shape.B, dtype=np.int64)
    if aligned == "bottom_right":
        offset += (shape.Tk if keys is None else keys) - (shape.Tq if queries is None else queries)
    slopes = None
    if alibi_slopes is not None:
        if not aligned and not lengths_agree:
            raise OptionError(
                f"alibi_slopes: the distance |i - j| is ambiguous for {_sizes(shape, queries, keys)} without "
                "causal='top_left' or 'bottom_right'; pass bias instead"
            )
        slopes = _floats("alibi_slopes", alibi_slopes, wide)
        if slopes.shape != (shape.Hq,):
            raise ShapeError(f"alibi_slopes: expected shape ({shape.Hq},), got {slopes.shape}")
    p = fraction("dropout_p", dropout_p)
    if dropout_mask is not None and p == 0.0:
        raise OptionError("dropout_mask: given, but dropout_p is 0; both say what is dropped")
    if dropout_mask is not None and rng is not None:
        raise OptionError("dropout_mask and rng: both say what is dropped; give one")
    seed = as_seed(rng) if rng is not None or (p > 0.0 and dropout_mask is None) else 0
    return ScoreRule(
        shape=shape,
        scale=shape.D**-0.5 if scale is None else finite("scale", scale),
        softcap=None if softcap is None else positive("softcap", softcap),
        bias=None if bias is None else broadcastable("bias", _floats("bias", bias, wide), full),
        slopes=slopes,
        mask=_boolean("attn_mask", attn_mask, full),
        causal=bool(aligned),
        offset=offset,
        q_lengths=queries,
        k_lengths=keys,
        dropout_p=p,
        seed=seed,
        dropout_mask=_boolean("dropout_mask", dropout_mask, full),
        wide=wide,
    )


def backward_rule(q: Array, k: Array, v: Array, **options: Unpack[AttentionOptions]) -> ScoreRule:
    """Return the rule of a backward pass, which must drop what the forward pass dropped.

    Raises
    ------
    OptionError
        If dropout is on and `rng` is not an integer: a generator's or fresh draws would be other ones.
    ShapeError, DTypeError, OptionError
        As `score_rule`.

    Examples
    --------
    >>> x = np.ones((1, 4, 2, 16))
    >>> backward_rule(x, x, x, dropout_p=0.5, rng=3).seed
    3
    """
    rule = score_rule(q, k, v, **options)
    drawn = rule.dropout_p > 0.0 and rule.dropout_mask is None
    if drawn and not isinstance(options.get("rng"), int | np.integer):
        raise OptionError("rng: a backward pass needs the integer seed of its forward pass, or dropout_mask")
    return rule


def with_seed(options: AttentionOptions) -> AttentionOptions:
    """Return the options with the seed that a generator, or nothing, stands for: one draw for both passes."""
    if options.get("dropout_p", 0.0) == 0.0 or options.get("dropout_mask") is not None:
        return options
    return {**options, "rng": as_seed(options.get("rng"))}


def _lengths_agree(shape: AttentionShape, queries: IntArray | None, keys: IntArray | None) -> bool:
    """Return whether every sequence has as many queries as keys, so that alignments do not differ."""
    tq = shape.Tq if queries is None else queries
    tk = shape.Tk if keys is None else keys
    return bool(np.all(np.equal(tq, tk)))


def _sizes(shape: AttentionShape, queries: IntArray | None, keys: IntArray | None) -> str:
    given = "" if queries is None and keys is None else ", lengths that differ"
    return f"Tq={shape.Tq}, Tk={shape.Tk}{given}"


def _causal(causal: Any, shape: AttentionShape, lengths_agree: bool) -> str:
    if isinstance(causal, bool | np.bool_):
        if not causal:
            return ""
        if not lengths_agree:
            raise OptionError(
                f"causal: True is ambiguous for Tq={shape.Tq}, Tk={shape.Tk} or lengths that differ; "
                "say 'top_left' or 'bottom_right'"
            )
        return "top_left"
    if not isinstance(causal, str) or causal not in ("top_left", "bottom_right"):
        raise OptionError(f"causal: expected False, True, 'top_left' or 'bottom_right', got {causal!r}")
    return causal


def _floats(name: str, value: Any, wide: np.dtype[Any]) -> FloatArray:
    (array,) = floating(**{name: value})
    return widen(array).astype(wide, copy=False)


def _boolean(name: str, value: Any, shape: tuple[int, ...]) -> BoolArray | None:
    if value is None:
        return None
    array = as_array(name, value)
    if array.dtype != np.bool_:
        raise DTypeError(
            f"{name}: expected bool, True = attend, got {array.dtype}; additive terms go to bias"
        )
    return broadcastable(name, array, shape)


def _lengths(name: str, value: npt.ArrayLike | None, count: int, limit: int) -> IntArray | None:
    if value is None:
        return None
    array = as_array(name, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"{name}: expected integers, got {array.dtype}")
    if array.shape != (count,):
        raise ShapeError(f"{name}: expected shape ({count},), one length a sequence, got {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() <= limit):
        raise OptionError(f"{name}: expected lengths in [0, {limit}], got {array.min()} to {array.max()}")
    return array.astype(np.int64)
