"""Global attention added to a window: a few tokens see everything, and everything sees them."""

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
from refimpl.attention.patterns import (
    Tile,
    blocks_of,
    dense_case,
    looks_back_only,
    self_shape,
    tiled,
    tiled_vjp,
)
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_sparse import GLOBAL_EDGES, OPTIONS, SHAPE, sample_global
from refimpl.attention.scores import AttentionOptions, AttentionShape
from refimpl.attention.sliding_window import window_mask
from refimpl.attention.sliding_window_banded import window_block, window_tiles
from refimpl.errors import DTypeError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import as_array, broadcastable, whole

__all__ = [
    "global_of_each",
    "global_tiles",
    "global_tokens_attention",
    "global_tokens_attention_blocked",
    "global_tokens_attention_blocked_vjp",
    "global_tokens_attention_vjp",
    "local_tiles",
]


def global_of_each(is_global: BoolArray, shape: AttentionShape) -> BoolArray:
    """Return which tokens of each sequence are global, shape (B, T).

    Raises
    ------
    DTypeError, ShapeError
        If `is_global` is not bool, or does not broadcast.
    """
    array = as_array("is_global", is_global)
    if array.dtype != np.bool_:
        raise DTypeError(f"is_global: expected bool, True = global, got {array.dtype}")
    return broadcastable("is_global", array, (shape.B, shape.Tq))


def _as_dense(case: Case) -> Case:
    """Return the same call of dense attention."""
    shape = self_shape(*case.args[:3])
    hub = global_of_each(case.kwargs["is_global"], shape)[:, None]
    near = window_mask(shape.Tq, whole("radius", case.kwargs["radius"], 0))
    return dense_case(case, near | hub[..., None] | hub[..., None, :], "radius", "is_global")


@technique(
    "attention.global_tokens",
    entries=(20,),
    kind="function",
    source=Source("Beltagy et al. 2020", "arXiv:2004.05150", "section 3.1, 'Global Attention'"),
    axes={**SHAPE, "radius": (0, 6), "hubs": (0, 4)},
    options={**OPTIONS, "alike": (True, False)},
    edges=GLOBAL_EDGES,
    sample=sample_global,
    terms=lambda case: attention_terms(_as_dense(case)),
    vjp="refimpl.attention.global_tokens:global_tokens_attention_vjp",
)
def global_tokens_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    is_global: BoolArray,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention in which i sees j if they are near, or one of them is global.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, Dv)
        As for `scaled_dot_product_attention`, queries and keys of one sequence.  Local and global attention
        share them ("tied"); with projections of their own for global queries see `longformer_attention`.
    radius : int
        Tokens that a local token sees on each side, as in `sliding_window_attention`.
    is_global : ndarray of bool, broadcastable to (B, T)
        True for a global token: the first one for classification, those of the question for answers.
    return_lse : bool
        Also return the log-sum-exp of each row.
    **options
        Those of `scaled_dot_product_attention`; they hold for global tokens too, so that a global query does
        not see padding, nor the future under a causal mask.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `sliding_window_attention`, and if `is_global` is not bool or does not broadcast.

    Notes
    -----
    **Special cases**

    - A global key inside the window counts once.
    - Without global tokens it is `sliding_window_attention`, with nothing but global ones full attention.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1, "Global Attention".

    Examples
    --------
    The first token sees everything, the others themselves and the first:

    >>> x, v = np.ones((1, 3, 1, 8)), np.array([0.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    >>> global_tokens_attention(x, x, v, radius=0, is_global=np.arange(3) == 0).ravel()
    array([2., 1., 2.])
    """
    pattern = {"radius": radius, "is_global": is_global}
    case = Case((q, k, v), {**options, **pattern, "return_lse": return_lse})
    result: FloatArray | AttentionOutput = _as_dense(case).call(scaled_dot_product_attention)
    return result


def global_tokens_attention_vjp(
    q: FloatArray, k: FloatArray, v: FloatArray, do: FloatArray, /, **options: Any
) -> AttentionGradients:
    """Return the gradients of `global_tokens_attention`: those of dense attention under its mask.

    Examples
    --------
    >>> x, nothing = np.ones((1, 3, 1, 4)), np.zeros(3, dtype=bool)
    >>> global_tokens_attention_vjp(x, x, x, x, radius=0, is_global=nothing).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    return scaled_dot_product_attention_vjp(q, k, v, do, **_as_dense(Case((q, k, v), options)).kwargs)


@implements("attention.global_tokens", backend="numpy")
def global_tokens_attention_blocked(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    is_global: BoolArray,
    return_lse: bool = False,
    block_size: int | None = None,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `global_tokens_attention`, the global keys gathered beside the band: O(N (radius + g)).

    Parameters
    ----------
    q, k, v, radius, is_global, return_lse, **options
        As for `global_tokens_attention`.
    block_size : int, optional
        Queries of a block.  Default ``max(radius, 16)``.
    memory : Memory, optional
        Counts traffic and operations.

    Returns
    -------
    ndarray or AttentionOutput
        As `global_tokens_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `global_tokens_attention`, and if `block_size` is not positive.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1.

    Examples
    --------
    >>> x, pattern = np.random.default_rng(0).standard_normal((1, 40, 1, 4)), np.arange(40) % 9 == 0
    >>> blocked = global_tokens_attention_blocked(x, x, x, radius=3, is_global=pattern)
    >>> bool(np.allclose(blocked, global_tokens_attention(x, x, x, radius=3, is_global=pattern)))
    True
    """
    tiles = _tiles(q, k, v, options, radius, is_global, block_size)
    return tiled(q, k, v, tiles, options, return_lse=return_lse, memory=memory)


def global_tokens_attention_blocked_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    radius: int,
    is_global: BoolArray,
    block_size: int | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `global_tokens_attention_blocked`, in O(N (radius + g)) time.

    Raises
    ------
    UnsupportedError
        With `bias`, whose gradient is as large as the scores.

    Examples
    --------
    >>> x, nothing = np.ones((1, 3, 1, 4)), np.zeros(3, dtype=bool)
    >>> global_tokens_attention_blocked_vjp(x, x, x, x, radius=0, is_global=nothing).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    return tiled_vjp(q, k, v, do, _tiles(q, k, v, options, radius, is_global, block_size), options)


def _tiles(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    options: AttentionOptions,
    radius: int,
    is_global: BoolArray,
    block_size: int | None,
) -> Iterator[Tile]:
    shape, backward = self_shape(q, k, v), looks_back_only(options)
    block = window_block(whole("radius", radius, 0), block_size)
    for b, hub in enumerate(global_of_each(is_global, shape)):
        yield from local_tiles(hub, radius, block, backward=backward, sequences=[b], heads=range(shape.Hq))
        yield from global_tiles(hub, block, backward=backward, sequences=[b], heads=range(shape.Hq))


def local_tiles(
    hub: BoolArray, radius: int, block: int, *, backward: bool, sequences: Sequence[int], heads: Sequence[int]
) -> Iterator[Tile]:
    """Yield the band of the tokens that are not global, with the global keys beside those of the window."""
    everywhere = np.flatnonzero(hub)
    for tile in window_tiles(len(hub), radius, block, backward=backward, sequences=sequences, heads=heads):
        rows = tile.rows[~hub[tile.rows]]
        if rows.size:
            columns = np.union1d(tile.columns, everywhere[everywhere <= rows[-1]] if backward else everywhere)
            allowed = hub[columns] | (np.abs(rows[:, None] - columns) <= radius)
            yield Tile(sequences, heads, rows, columns, allowed)


def global_tiles(
    hub: BoolArray, block: int, *, backward: bool, sequences: Sequence[int], heads: Sequence[int]
) -> Iterator[Tile]:
    """Yield the global queries with all keys."""
    for rows in blocks_of(np.flatnonzero(hub), block):
        yield Tile(sequences, heads, rows, np.arange(rows[-1] + 1 if backward else len(hub)))
