"""Which blocks of keys a block of queries sees in BigBird: random ones, a window, and global ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from refimpl.attention.patterns import Tile, blocks_of
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import BoolArray, IntArray
from refimpl.validation import as_array, whole

__all__ = [
    "bigbird_block_mask",
    "bigbird_plan",
    "bigbird_tiles",
    "checked_plan",
    "global_indices",
    "window_indices",
]


def bigbird_plan(
    num_blocks: int,
    /,
    *,
    heads: int,
    random_blocks: int = 3,
    window_blocks: int = 3,
    global_blocks: Sequence[int] = (0, -1),
    rng: np.random.Generator | int | None = None,
) -> IntArray:
    """Return the random blocks of keys of each head and block of queries, drawn without replacement.

    Parameters
    ----------
    num_blocks : int
        Blocks of the sequence.
    heads : int
        Query heads; each has draws of its own.
    random_blocks : int
        r, blocks drawn for a block of queries, among those that are neither in its window nor global.
    window_blocks, global_blocks
        As for `bigbird_attention`.
    rng : numpy.random.Generator or int, optional
        The source of the draws.

    Returns
    -------
    ndarray of int, shape (heads, num_blocks, random_blocks)
        -1 where there was nothing left to draw; all -1 for a global block, which sees everything.

    Raises
    ------
    OptionError
        If a number is out of range.

    Notes
    -----
    The released plan draws per head once, when the model is built [2]_, so it is an argument of the attention
    here and not drawn by it.  For 1024, 3072 and 4096 tokens the released code draws among the first 1024
    only; other lengths have a plan of parts; and transformers, in evaluation, takes block 0 for every draw.

    References
    ----------
    .. [1] Zaheer et al., 2020, arXiv:2007.14062, section 2 and appendix D.
    .. [2] github.com/google-research/bigbird, bigbird/core/attention.py, `bigbird_block_rand_mask_with_head`.

    Examples
    --------
    >>> bigbird_plan(6, heads=1, random_blocks=1, rng=0)[0].ravel().tolist()
    [-1, 4, 4, 1, 2, -1]
    """
    random_blocks, generator = whole("random_blocks", random_blocks, 0), np.random.default_rng(rng)
    num_blocks, heads = whole("num_blocks", num_blocks, 0), whole("heads", heads, 0)
    always = global_indices(global_blocks, num_blocks)
    plan = np.full((heads, num_blocks, random_blocks), -1, dtype=np.int64)
    for i in set(range(num_blocks)) - set(always.tolist()):
        taken = np.union1d(window_indices(i, num_blocks, window_blocks), always)
        left = num_blocks - taken.size
        count = min(random_blocks, left)
        for h in range(heads):
            drawn = np.sort(generator.choice(left, count, replace=False))
            for block in taken:  # numbers among what is left become numbers among all
                drawn[drawn >= block] += 1
            plan[h, i, :count] = drawn
    return plan


def global_indices(global_blocks: Sequence[int], num_blocks: int) -> IntArray:
    """Return the global blocks, counted from 0, each once and in order.

    Examples
    --------
    >>> global_indices((0, -1), 4).tolist(), global_indices((0, -1), 0).tolist()
    ([0, 3], [])
    """
    if num_blocks == 0:
        return np.zeros(0, dtype=np.int64)
    for block in global_blocks:
        if not -num_blocks <= whole("global_blocks", block, -num_blocks) < num_blocks:
            raise OptionError(f"global_blocks: expected blocks below {num_blocks}, got {block}")
    return np.unique(np.asarray([block % num_blocks for block in global_blocks], dtype=np.int64))


def window_indices(block: int, num_blocks: int, window_blocks: int) -> IntArray:
    """Return the blocks of the window around `block`, cut off at the ends; none if `window_blocks` is 0.

    Examples
    --------
    >>> window_indices(0, 4, 3).tolist(), window_indices(2, 4, 3).tolist()
    ([0, 1], [1, 2, 3])
    """
    if whole("window_blocks", window_blocks, 0) % 2 == 0 and window_blocks:
        raise OptionError(f"window_blocks: expected 0 or an odd number, got {window_blocks}")
    reach = (window_blocks - 1) // 2
    return np.arange(max(0, block - reach), min(num_blocks, block + reach + 1))


def checked_plan(plan: IntArray | None, heads: int, num_blocks: int) -> IntArray:
    """Return `plan`, of shape (heads or 1, num_blocks, r); without one, of no random blocks.

    Raises
    ------
    DTypeError, ShapeError, OptionError
        If it is not whole numbers, of another shape, or names blocks that there are not.
    """
    if plan is None:
        return np.full((1, num_blocks, 0), -1, dtype=np.int64)
    array = as_array("plan", plan)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"plan: expected whole numbers, got {array.dtype}")
    if array.ndim != 3 or array.shape[0] not in (1, heads) or array.shape[1] != num_blocks:
        raise ShapeError(f"plan: expected shape ({heads} or 1, {num_blocks}, r), got {array.shape}")
    if array.size and not (array.min() >= -1 and array.max() < num_blocks):
        raise OptionError(
            f"plan: expected blocks from -1 (none) to {num_blocks - 1}, got {array.min()} to {array.max()}"
        )
    return array.astype(np.int64)


def bigbird_block_mask(
    num_blocks: int, plan: IntArray, *, window_blocks: int, global_blocks: Sequence[int]
) -> BoolArray:
    """Return which block of queries sees which block of keys, shape (heads or 1, num_blocks, num_blocks).

    Examples
    --------
    >>> nothing_random = np.zeros((1, 5, 0), dtype=int)
    >>> bigbird_block_mask(5, nothing_random, window_blocks=1, global_blocks=(0,))[0].astype(int)
    array([[1, 1, 1, 1, 1],
           [1, 1, 0, 0, 0],
           [1, 0, 1, 0, 0],
           [1, 0, 0, 1, 0],
           [1, 0, 0, 0, 1]])
    """
    always = global_indices(global_blocks, num_blocks)
    mask = np.zeros((plan.shape[0], num_blocks, num_blocks), dtype=bool)
    for i in range(num_blocks):
        mask[:, i, window_indices(i, num_blocks, window_blocks)] = True
    head, row, draw = np.nonzero(plan >= 0)
    mask[head, row, plan[head, row, draw]] = True
    mask[:, always, :] = mask[:, :, always] = True
    return mask


def bigbird_tiles(
    length: int,
    plan: IntArray,
    *,
    block_size: int,
    window_blocks: int,
    global_blocks: Sequence[int],
    backward: bool,
    sequences: Sequence[int],
    heads: Sequence[int],
) -> Iterator[Tile]:
    """Yield a tile for each block of queries and each head whose random blocks are its own.

    If `backward`, blocks of keys after the queries' own are left out: a causal mask hides them.
    """
    blocks = blocks_of(np.arange(length), block_size)
    always = global_indices(global_blocks, len(blocks))
    for i, rows in enumerate(blocks):
        if i in always:
            yield Tile(sequences, heads, rows, np.arange(rows[-1] + 1 if backward else length))
            continue
        shared = np.union1d(window_indices(i, len(blocks), window_blocks), always)
        for p, drawn in enumerate(plan[:, i]):
            seen = np.union1d(shared, drawn[drawn >= 0])
            seen = seen[seen <= i] if backward else seen
            columns = np.concatenate([np.zeros(0, np.int64), *(blocks[j] for j in seen)])
            yield Tile(sequences, heads if len(plan) == 1 else [heads[p]], rows, columns)
