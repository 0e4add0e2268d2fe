"""Dilated sliding-window attention: a window with gaps, which spans more with as many keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from refimpl.attention.dense import (
    AttentionGradients,
    AttentionOutput,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.attention.patterns import Tile, dense_case, looks_back_only, self_shape, tiled, tiled_vjp
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_sparse import EDGES, OPTIONS, SHAPE, sample_pattern
from refimpl.attention.scores import AttentionOptions
from refimpl.attention.sliding_window_banded import window_block, window_tiles
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import as_array, whole

__all__ = [
    "dilated_window_attention",
    "dilated_window_attention_banded",
    "dilated_window_attention_banded_vjp",
    "dilated_window_attention_vjp",
]


def sample_dilated(
    rng: np.random.Generator, *, radius: int, dilation: int, heads: str = "alike", **shape: Any
) -> Case:
    """Return a call of dilated-window attention; `heads` "apart" gives each a dilation of its own.

    Examples
    --------
    >>> shape = dict(B=1, T=4, Hkv=1, group=2, D=2, Dv=2, radius=1, dilation=2)
    >>> sample_dilated(np.random.default_rng(0), heads="apart", **shape).kwargs
    {'radius': 1, 'dilation': array([2, 3])}
    """
    case = sample_pattern(rng, **shape)
    gaps = dilation if heads == "alike" else dilation + np.arange(case.args[0].shape[2])
    return case.replace(radius=radius, dilation=gaps)


def _gaps(dilation: int | IntArray, heads: int) -> IntArray:
    """Return the dilation of each head, shape (heads,)."""
    array = as_array("dilation", dilation)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"dilation: expected whole numbers, got {array.dtype}")
    if array.shape not in ((), (heads,)):
        raise ShapeError(f"dilation: expected one number or shape ({heads},), got shape {array.shape}")
    if array.size and array.min() < 1:
        raise OptionError(f"dilation: expected at least 1, got {array.min()}")
    return np.broadcast_to(array, (heads,))


def _as_dense(case: Case) -> Case:
    """Return the same call of dense attention."""
    shape = self_shape(*case.args[:3])
    gaps = _gaps(case.kwargs["dilation"], shape.Hq)[:, None, None]
    i = np.arange(shape.Tq)
    distance = np.abs(i[:, None] - i)
    radius = whole("radius", case.kwargs["radius"], 0)
    mask: BoolArray = (distance % gaps == 0) & (distance <= radius * gaps)
    return dense_case(case, mask, "radius", "dilation")


@technique(
    "attention.dilated_window",
    entries=(19,),
    kind="function",
    source=Source("Beltagy et al. 2020", "arXiv:2004.05150", "section 3.1, 'Dilated Sliding Window'"),
    axes={**SHAPE, "radius": (0, 6), "dilation": (1, 4)},
    options={**OPTIONS, "heads": ("alike", "apart")},
    edges=tuple(
        {**edge, "radius": radius, "dilation": dilation, "heads": "alike"}
        for edge, radius, dilation in zip(
            EDGES, (0, 2, 1, 3, 5, 40, 2, 1, 17, 4), (1, 2, 1, 2, 3, 2, 30, 1, 5, 2), strict=True
        )
    ),
    sample=sample_dilated,
    terms=lambda case: attention_terms(_as_dense(case)),
    vjp="refimpl.attention.dilated_window:dilated_window_attention_vjp",
)
def dilated_window_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    dilation: int | IntArray,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention in which token i sees ``i + m dilation`` for ``|m| <= radius``.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, Dv)
        As for `scaled_dot_product_attention`, queries and keys of one sequence.
    radius : int
        Keys seen on each side, as in `sliding_window_attention`: dilation moves them apart, it adds none.
    dilation : int or ndarray of int, shape (Hq,)
        Distance between two keys, 1 for none left out; the paper gives heads different ones.
    return_lse : bool
        Also return the log-sum-exp of each row.
    **options
        Those of `scaled_dot_product_attention`.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `sliding_window_attention`, and if a dilation is below 1 or there is not one for each head.

    Notes
    -----
    A layer spans ``2 radius dilation + 1`` tokens and sees ``2 radius + 1`` of them.  **Special cases**

    - Tokens whose positions differ modulo the dilation never meet, in however many layers of it.
    - From ``dilation >= T`` on the output is v.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1, "Dilated Sliding Window".

    Examples
    --------
    The even and the odd tokens, apart:

    >>> x, v = np.ones((1, 4, 1, 8)), np.array([0.0, 10.0, 2.0, 30.0]).reshape(1, 4, 1, 1)
    >>> dilated_window_attention(x, x, v, radius=1, dilation=2).ravel()
    array([ 1., 20.,  1., 20.])
    """
    pattern = {"radius": radius, "dilation": dilation}
    case = Case((q, k, v), {**options, **pattern, "return_lse": return_lse})
    result: FloatArray | AttentionOutput = _as_dense(case).call(scaled_dot_product_attention)
    return result


def dilated_window_attention_vjp(
    q: FloatArray, k: FloatArray, v: FloatArray, do: FloatArray, /, **options: Any
) -> AttentionGradients:
    """Return the gradients of `dilated_window_attention`: those of dense attention under its mask.

    Examples
    --------
    >>> x = np.ones((1, 3, 1, 4))
    >>> dilated_window_attention_vjp(x, x, x, x, radius=1, dilation=3).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    return scaled_dot_product_attention_vjp(q, k, v, do, **_as_dense(Case((q, k, v), options)).kwargs)


@implements("attention.dilated_window", backend="numpy")
def dilated_window_attention_banded(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    dilation: int | IntArray,
    return_lse: bool = False,
    block_size: int | None = None,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `dilated_window_attention` as a sliding window over each class of positions: O(N radius).

    Parameters
    ----------
    q, k, v, radius, dilation, return_lse, **options
        As for `dilated_window_attention`.
    block_size : int, optional
        Queries of a block, all of one class.  Default ``max(radius, 16)``.
    memory : Memory, optional
        Counts traffic and operations.

    Returns
    -------
    ndarray or AttentionOutput
        As `dilated_window_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `dilated_window_attention`, and if `block_size` is not positive.

    Notes
    -----
    Positions that are alike modulo the dilation are neighbours among themselves, so each class is entry 18.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((1, 40, 1, 4))
    >>> banded = dilated_window_attention_banded(x, x, x, radius=3, dilation=4)
    >>> bool(np.allclose(banded, dilated_window_attention(x, x, x, radius=3, dilation=4)))
    True
    """
    tiles = _tiles(q, k, v, options, radius, dilation, block_size)
    return tiled(q, k, v, tiles, options, return_lse=return_lse, memory=memory)


def dilated_window_attention_banded_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    radius: int,
    dilation: int | IntArray,
    block_size: int | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `dilated_window_attention_banded`, in O(N radius) time and memory.

    Raises
    ------
    UnsupportedError
        With `bias`, whose gradient is as large as the scores.

    Examples
    --------
    >>> x = np.ones((1, 3, 1, 4))
    >>> dilated_window_attention_banded_vjp(x, x, x, x, radius=1, dilation=3).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    return tiled_vjp(q, k, v, do, _tiles(q, k, v, options, radius, dilation, block_size), options)


def _tiles(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    options: AttentionOptions,
    radius: int,
    dilation: int | IntArray,
    block_size: int | None,
) -> Iterator[Tile]:
    """Yield the bands of each dilation's classes, the heads that share a dilation together."""
    shape, radius = self_shape(q, k, v), whole("radius", radius, 0)
    gaps, block = _gaps(dilation, shape.Hq), window_block(radius, block_size)
    for gap in np.unique(gaps):
        heads: Sequence[int] = np.flatnonzero(gaps == gap).tolist()
        for first in range(min(int(gap), shape.Tq)):
            members = np.arange(first, shape.Tq, gap)
            for tile in window_tiles(
                len(members),
                radius,
                block,
                backward=looks_back_only(options),
                sequences=range(shape.B),
                heads=heads,
            ):
                yield tile._replace(rows=members[tile.rows], columns=members[tile.columns])
