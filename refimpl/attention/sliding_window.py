"""Sliding-window attention: every token sees the tokens next to it, as a convolution does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack

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
    masked_options,
    self_length,
    tiled,
    tiled_vjp,
)
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_sparse import EDGES, OPTIONS, SHAPE, sample_pattern
from refimpl.attention.scores import AttentionOptions
from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import whole

__all__ = [
    "sliding_window_attention",
    "sliding_window_attention_banded",
    "sliding_window_attention_banded_vjp",
    "sliding_window_attention_vjp",
    "window_block",
    "window_mask",
    "window_radius",
    "window_tiles",
]

SHORTEST_BLOCK = 16


def window_radius(
    window: int, /, *, convention: Literal["longformer_paper", "longformer_code", "mistral"]
) -> int:
    """Return the radius that a source's window stands for: the sources count windows in three ways.

    Parameters
    ----------
    window : int
        The source's number.
    convention : {"longformer_paper", "longformer_code", "mistral"}
        "longformer_paper": w in all, w/2 on each side [1]_, as `attention_window` in transformers;
        "longformer_code": w on each side, as `attention_window` in the authors' repository; "mistral": w keys
        with the query's own, all of them before it [2]_, to be used with a causal mask.

    Returns
    -------
    int
        Keys seen on each side.

    Raises
    ------
    OptionError
        If a total is odd, a window is negative, or one that holds the query's own key is empty.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1.
    .. [2] Jiang et al., 2023, arXiv:2310.06825, section 2, Figure 1.

    Examples
    --------
    >>> window_radius(512, convention="longformer_paper"), window_radius(4096, convention="mistral")
    (256, 4095)
    """
    if convention == "mistral":
        return whole("window", window) - 1
    if convention == "longformer_code":
        return whole("window", window, 0)
    if convention != "longformer_paper":
        raise OptionError(
            f"convention: expected 'longformer_paper', 'longformer_code' or 'mistral', got {convention!r}"
        )
    if whole("window", window, 0) % 2:
        raise OptionError(f"window: a total of w/2 on each side must be even, got {window}")
    return window // 2


def window_mask(length: int, radius: int) -> BoolArray:
    """Return where ``|i - j| <= radius``, shape (length, length).

    Examples
    --------
    >>> window_mask(4, 1).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1],
           [0, 0, 1, 1]])
    """
    i = np.arange(length)
    mask: BoolArray = np.abs(i[:, None] - i) <= radius
    return mask


def window_block(radius: int, block_size: int | None) -> int:
    """Return the queries of a tile: `block_size`, or as many as a side of the window, 16 at least."""
    return max(radius, SHORTEST_BLOCK) if block_size is None else whole("block_size", block_size)


def window_tiles(
    length: int,
    radius: int,
    block_size: int,
    *,
    backward: bool,
    sequences: Sequence[int],
    heads: Sequence[int],
) -> Iterator[Tile]:
    """Yield the band in tiles of `block_size` queries and the keys within `radius` of any of them.

    If `backward`, keys after a tile's last query are left out: a causal mask hides them.
    """
    for rows in blocks_of(np.arange(length), block_size):
        first, last = int(rows[0]), int(rows[-1])
        end = last + 1 if backward else min(length, last + radius + 1)
        columns = np.arange(max(0, first - radius), end)
        yield Tile(sequences, heads, rows, columns, np.abs(rows[:, None] - columns) <= radius)


def sample_window(rng: np.random.Generator, *, radius: int, **shape: Any) -> Case:
    """Return a call of sliding-window attention.

    Examples
    --------
    >>> shape = dict(B=1, T=4, Hkv=1, group=1, D=2, Dv=2)
    >>> sample_window(np.random.default_rng(0), radius=1, **shape).kwargs
    {'radius': 1}
    """
    return sample_pattern(rng, **shape).replace(radius=radius)


def _terms(case: Case) -> tuple[int, Any]:
    mask = window_mask(case.args[0].shape[1], case.kwargs["radius"])
    return attention_terms(dense_case(case, mask, "radius"))


@technique(
    "attention.sliding_window",
    entries=(18,),
    kind="function",
    source=Source("Beltagy et al. 2020", "arXiv:2004.05150", "section 3.1, 'Sliding Window'"),
    axes={**SHAPE, "radius": (0, 9)},
    options=OPTIONS,
    edges=tuple(
        {**edge, "radius": radius}
        for edge, radius in zip(EDGES, (0, 2, 1, 3, 5, 40, 2, 0, 17, 4), strict=False)
    ),
    sample=sample_window,
    terms=_terms,
    vjp="refimpl.attention.sliding_window:sliding_window_attention_vjp",
)
def sliding_window_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention in which token i sees token j only if ``|i - j| <= radius``.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, Dv)
        As for `scaled_dot_product_attention`, queries and keys of one sequence.
    radius : int
        Tokens seen on each side, from 0 on.  The paper's w is a total, ``w = 2 radius``, its authors'
        ``attention_window`` is the radius, Mistral's window has ``radius + 1`` keys: see `window_radius`.
    return_lse : bool
        Also return the log-sum-exp of each row.
    **options
        Those of `scaled_dot_product_attention`.  With a causal mask the lower half of the band is left.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention`, if `radius` is negative, or if q and k differ in length.

    Notes
    -----
    ``N (2 radius + 1) - radius (radius + 1)`` scores take part, for radius < N.  **Special cases**

    - At the ends of the sequence the window is cut off and the weights of what is left sum to 1; nothing
      wraps around, and nothing is padded with zeros inside the softmax.
    - With radius 0 the output is v; from radius T - 1 on it is full attention.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1, "Sliding Window".

    Examples
    --------
    With equal keys, the mean over the window:

    >>> x, v = np.ones((1, 4, 1, 8)), np.array([0.0, 3.0, 6.0, 0.0]).reshape(1, 4, 1, 1)
    >>> sliding_window_attention(x, x, v, radius=1).ravel()
    array([1.5, 3. , 3. , 3. ])
    """
    mask = window_mask(self_length(q, k), whole("radius", radius, 0))
    inside = masked_options(q, k, v, mask, options)
    if return_lse:
        return scaled_dot_product_attention(q, k, v, return_lse=True, **inside)
    return scaled_dot_product_attention(q, k, v, **inside)


def sliding_window_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    radius: int,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `sliding_window_attention`: those of dense attention under the band.

    Examples
    --------
    >>> x = np.ones((1, 3, 1, 4))
    >>> sliding_window_attention_vjp(x, x, x, x, radius=0).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    mask = window_mask(self_length(q, k), whole("radius", radius, 0))
    return scaled_dot_product_attention_vjp(q, k, v, do, **masked_options(q, k, v, mask, options))


@implements("attention.sliding_window", backend="numpy")
def sliding_window_attention_banded(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    return_lse: bool = False,
    block_size: int | None = None,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `sliding_window_attention`, computed in blocks of queries: O(N radius) time and memory.

    Parameters
    ----------
    q, k, v, radius, return_lse, **options
        As for `sliding_window_attention`.
    block_size : int, optional
        Queries of a block; it reads ``block_size + 2 radius`` keys.  Default ``max(radius, 16)``.
    memory : Memory, optional
        Counts traffic and operations.

    Returns
    -------
    ndarray or AttentionOutput
        As `sliding_window_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `sliding_window_attention`, and if `block_size` is not positive.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, appendix A (blocks that overlap: "chunks").

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((1, 40, 1, 4))
    >>> banded = sliding_window_attention_banded(x, x, x, radius=3)
    >>> bool(np.allclose(banded, sliding_window_attention(x, x, x, radius=3)))
    True
    """
    tiles = _tiles(q, k, radius, block_size, options)
    return tiled(q, k, v, tiles, options, return_lse=return_lse, memory=memory)


def sliding_window_attention_banded_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    radius: int,
    block_size: int | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `sliding_window_attention_banded`, in O(N radius) time and memory.

    Raises
    ------
    UnsupportedError
        With `bias`, whose gradient is as large as the scores.

    Examples
    --------
    >>> x = np.ones((1, 3, 1, 4))
    >>> sliding_window_attention_banded_vjp(x, x, x, x, radius=0).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    return tiled_vjp(q, k, v, do, _tiles(q, k, radius, block_size, options), options)


def _tiles(
    q: FloatArray, k: FloatArray, radius: int, block_size: int | None, options: AttentionOptions
) -> Iterator[Tile]:
    length, radius = self_length(q, k), whole("radius", radius, 0)
    return window_tiles(
        length,
        radius,
        window_block(radius, block_size),
        backward=looks_back_only(options),
        sequences=range(q.shape[0]),
        heads=range(q.shape[2]),
    )
