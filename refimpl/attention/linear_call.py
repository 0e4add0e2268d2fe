"""What every form of linear attention makes of its arguments: features, heads, and who sees which key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np

from refimpl.attention.key_mask import checked_key_mask
from refimpl.attention.scores import Causal, score_rule
from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, IntArray, wide_dtype, widen
from refimpl.validation import finite, floating

__all__ = [
    "EPS",
    "Alignment",
    "LinearCall",
    "LinearHead",
    "LinearOptions",
    "alignment",
    "elu_feature_map",
    "elu_feature_map_slope",
    "linear_call",
    "normalized",
]

# The authors' default: fast_transformers/attention/{linear,causal_linear}_attention.py, `eps`.
EPS = 1e-6


class LinearOptions(TypedDict, total=False):
    """Keyword options that every form of linear attention takes; `linear_attention` documents them."""

    causal: Causal
    key_mask: BoolArray | None
    eps: float


class Alignment(NamedTuple):
    """A call cut into parts that need no mask, and one square part along the diagonal.

    The first `blind` queries see no key.  Query ``blind + t``, for t below `steps`, sees the first ``prefix``
    keys and the t + 1 after them.  Later queries see ``prefix + steps`` keys; nobody sees the rest.
    """

    prefix: int
    steps: int
    blind: int

    def visible(self, Tq: int) -> IntArray:
        """Return how many of the first keys each of `Tq` queries sees.

        >>> Alignment(prefix=2, steps=3, blind=0).visible(4)
        array([3, 4, 5, 5])
        """
        return self.prefix + np.clip(np.arange(Tq) - self.blind + 1, 0, self.steps)

    def transposed(self, Tq: int, Tk: int) -> Alignment:
        """Return the alignment of the reversed keys as queries of the reversed queries.

        >>> Alignment(prefix=2, steps=3, blind=0).transposed(3, 5)
        Alignment(prefix=0, steps=3, blind=0)
        """
        return Alignment(Tq - self.blind - self.steps, self.steps, Tk - self.prefix - self.steps)


def alignment(Tq: int, Tk: int, offset: int | None) -> Alignment:
    """Return how queries see keys: query i those up to ``i + offset``, or all of them if `offset` is None.

    Examples
    --------
    >>> alignment(2, 5, None), alignment(2, 5, 3)
    (Alignment(prefix=5, steps=0, blind=0), Alignment(prefix=3, steps=2, blind=0))
    """
    if offset is None:
        return Alignment(Tk, 0, 0)
    prefix, blind = max(offset, 0), max(-offset, 0)
    return Alignment(prefix, min(Tq - blind, Tk - prefix), blind)


def elu_feature_map(x: FloatArray, /) -> FloatArray:
    """Return ``elu(x) + 1``: ``x + 1`` above 0 and ``exp(x)`` below, in float32 at least.

    Written so that it stays positive: ``elu(x) + 1`` as the authors compute it is 0 from about -17 in
    float32 on, because ``exp(x) - 1`` rounds to -1.

    Examples
    --------
    >>> elu_feature_map(np.array([0.0, 2.0]))
    array([1., 3.])
    """
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    return np.asarray(np.maximum(wide, 0) + np.exp(np.minimum(wide, 0)))


def elu_feature_map_slope(x: FloatArray, /) -> FloatArray:
    """Return the derivative of `elu_feature_map`: 1 above 0 and ``exp(x)`` below.

    Examples
    --------
    >>> elu_feature_map_slope(np.array([0.0, 2.0]))
    array([1., 1.])
    """
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    return np.asarray(np.exp(np.minimum(wide, 0)))


def normalized(numerator: FloatArray, denominator: FloatArray, eps: float) -> FloatArray:
    """Return ``numerator / (denominator + eps)``, and 0 where that would divide by 0.

    Examples
    --------
    >>> normalized(np.array([[3.0], [0.0]]), np.array([2.0, 0.0]), 0.0)
    array([[1.5],
           [0. ]])
    """
    total = (denominator + denominator.dtype.type(eps))[..., None]
    return np.divide(numerator, total, out=np.zeros_like(numerator), where=total != 0)


@dataclass(frozen=True)
class LinearHead:
    """One key head of one sequence, with the query heads that share it; views, read through `Memory`."""

    name: str
    q: FloatArray  # (Tq, group, D)
    k: FloatArray  # (Tk, D)
    v: FloatArray  # (Tk, Dv)
    out: FloatArray  # (Tq, group, Dv)
    key_mask: BoolArray | None  # (Tk,)

    def queries(self, hbm: Memory, rows: slice) -> FloatArray:
        """Load queries and return their features, shape (n, group, D)."""
        return elu_feature_map(hbm.load("Q", self.q, rows))

    def keys(self, hbm: Memory, rows: slice) -> tuple[FloatArray, FloatArray]:
        """Load keys and values; return features, 0 for padding, shape (n, D), and the values (n, Dv)."""
        features, v = elu_feature_map(hbm.load("K", self.k, rows)), hbm.load("V", self.v, rows)
        if self.key_mask is not None:
            features = features * hbm.load("key_mask", self.key_mask, rows)[:, None]
        return features, v.astype(features.dtype, copy=False)


class LinearCall(NamedTuple):
    """A call that was checked: its output, not yet written, its alignment, and the constant eps."""

    q: FloatArray
    k: FloatArray
    v: FloatArray
    out: FloatArray
    key_mask: BoolArray | None
    plan: Alignment
    eps: float

    def heads(self) -> Iterator[LinearHead]:
        """Yield the heads: one for each sequence and key head."""
        B, _, Hkv, _ = self.k.shape
        group = self.q.shape[2] // Hkv
        for b, h in np.ndindex(B, Hkv):
            queries = slice(h * group, (h + 1) * group)
            mask = None if self.key_mask is None else self.key_mask[b]
            yield LinearHead(
                f"[{b}, {h}]",
                self.q[b, :, queries],
                self.k[b, :, h],
                self.v[b, :, h],
                self.out[b, :, queries],
                mask,
            )


def linear_call(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    *,
    causal: Causal = False,
    key_mask: BoolArray | None = None,
    eps: float = EPS,
) -> LinearCall:
    """Check a call of linear attention and return what its forms work on.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        See `linear_attention`.

    Examples
    --------
    >>> x = np.ones((2, 3, 4, 5))
    >>> [head.name for head in linear_call(x, x[:, :, :1], x[:, :, :1]).heads()]
    ['[0, 0]', '[1, 0]']
    """
    q, k, v = floating(q=q, k=k, v=v)
    rule = score_rule(q, k, v, causal=causal)
    shape = rule.shape
    if finite("eps", eps) < 0:
        raise OptionError(f"eps: expected a number of at least 0, got {eps}")
    mask = checked_key_mask(key_mask, shape.B, shape.Tk)
    out = np.zeros((shape.B, shape.Tq, shape.Hq, shape.Dv), q.dtype)
    offset = shape.Tk - shape.Tq if causal == "bottom_right" else 0
    plan = alignment(shape.Tq, shape.Tk, offset if rule.causal else None)
    return LinearCall(q, k, v, out, mask, plan, float(eps))
