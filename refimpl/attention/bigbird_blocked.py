"""BigBird computed in blocks: the keys that a block of queries sees are gathered, the others never read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from refimpl.attention.bigbird_plan import bigbird_tiles, checked_plan
from refimpl.attention.dense import AttentionGradients, AttentionOutput
from refimpl.attention.patterns import Tile, looks_back_only, self_shape, tiled, tiled_vjp
from refimpl.attention.scores import AttentionOptions
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import implements
from refimpl.validation import whole

__all__ = ["bigbird_attention_blocked", "bigbird_attention_blocked_vjp"]


@implements("attention.bigbird", backend="numpy")
def bigbird_attention_blocked(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: Sequence[int] = (0, -1),
    plan: IntArray | None = None,
    return_lse: bool = False,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `bigbird_attention`, the keys of a block gathered: O(N) time and memory for a given layout.

    Parameters
    ----------
    q, k, v, block_size, window_blocks, global_blocks, plan, return_lse, **options
        As for `bigbird_attention`.
    memory : Memory, optional
        Counts traffic and operations.

    Returns
    -------
    ndarray or AttentionOutput
        As `bigbird_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `bigbird_attention`.

    References
    ----------
    .. [1] Zaheer et al., 2020, arXiv:2007.14062, appendix D, Figures 3 to 6.

    Examples
    --------
    >>> import numpy as np
    >>> from refimpl.attention import bigbird_attention
    >>> x, layout = np.random.default_rng(0).standard_normal((1, 40, 1, 4)), {"block_size": 4}
    >>> blocked = bigbird_attention_blocked(x, x, x, **layout)
    >>> bool(np.allclose(blocked, bigbird_attention(x, x, x, **layout)))
    True
    """
    tiles = _tiles(q, k, v, options, block_size, window_blocks, global_blocks, plan)
    return tiled(q, k, v, tiles, options, return_lse=return_lse, memory=memory)


def bigbird_attention_blocked_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: Sequence[int] = (0, -1),
    plan: IntArray | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `bigbird_attention_blocked`, in O(N) time and memory.

    Raises
    ------
    UnsupportedError
        With `bias`, whose gradient is as large as the scores.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 3, 1, 4))
    >>> layout = dict(block_size=1, window_blocks=1, global_blocks=())
    >>> bigbird_attention_blocked_vjp(x, x, x, x, **layout).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    tiles = _tiles(q, k, v, options, block_size, window_blocks, global_blocks, plan)
    return tiled_vjp(q, k, v, do, tiles, options)


def _tiles(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    options: AttentionOptions,
    block_size: int,
    window_blocks: int,
    global_blocks: Sequence[int],
    plan: IntArray | None,
) -> Iterator[Tile]:
    shape = self_shape(q, k, v)
    num_blocks = -(-shape.Tq // whole("block_size", block_size))
    return bigbird_tiles(
        shape.Tq,
        checked_plan(plan, shape.Hq, num_blocks),
        block_size=block_size,
        window_blocks=window_blocks,
        global_blocks=global_blocks,
        backward=looks_back_only(options),
        sequences=range(shape.B),
        heads=range(shape.Hq),
    )
