"""Blocks of an array that share a scale: whole, by row, by column, by group, the last one possibly shorter.

A granularity is the shape of a block.  For a matrix, ``None`` is one block for the whole tensor,
``(1, None)`` one a row, ``(None, 1)`` one a column, and ``(1, 64)`` one for every 64 numbers of a row.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import Array

__all__ = ["Block", "block_sizes", "expand", "reduce_blocks"]

Block: TypeAlias = tuple[int | None, ...] | None


def block_sizes(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Return the extent of a block along every axis; None stands for the whole axis.

    Raises
    ------
    OptionError
        If `block` names another number of axes than `shape`, or an extent is below 1.

    Examples
    --------
    >>> block_sizes((3, 7), (1, None)), block_sizes((3, 7), None)
    ((1, 7), (3, 7))
    """
    extents = (None,) * len(shape) if block is None else tuple(block)
    if len(extents) != len(shape):
        raise OptionError(f"block: expected an extent for each of the {len(shape)} axes, got {block}")
    if any(extent is not None and extent < 1 for extent in extents):
        raise OptionError(f"block: expected extents of at least 1 or None, got {block}")
    return tuple(max(size, 1) if b is None else int(b) for size, b in zip(shape, extents, strict=True))


def reduce_blocks(reduction: np.ufunc, x: Array, block: Block) -> Array:
    """Return `reduction` over every block, one number a block; an axis of size 0 has no blocks.

    Examples
    --------
    >>> reduce_blocks(np.maximum, np.array([[1, 5, 2, 9, 4]]), (1, 2))
    array([[5, 9, 4]])
    """
    for axis, extent in enumerate(block_sizes(x.shape, block)):
        x = reduction.reduceat(x, np.arange(0, x.shape[axis], extent), axis=axis)
    return x


def expand(values: Array, shape: tuple[int, ...], block: Block) -> Array:
    """Return `values`, one a block, repeated to the `shape` of the array that the blocks cut.

    Raises
    ------
    OptionError
        If `values` is not shaped like the blocks of `shape`.

    Examples
    --------
    >>> expand(np.array([[5, 9, 4]]), (1, 5), (1, 2))
    array([[5, 5, 9, 9, 4]])
    """
    extents = block_sizes(shape, block)
    blocks = tuple(-(-size // extent) for size, extent in zip(shape, extents, strict=True))
    if values.shape != blocks:
        raise OptionError(
            f"block: {block} cuts shape {shape} into {blocks} blocks, got values of shape {values.shape}"
        )
    for axis, extent in enumerate(extents):
        values = np.repeat(values, extent, axis=axis)
    return values[tuple(slice(size) for size in shape)]
