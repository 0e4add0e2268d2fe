"""What a mask allows, as bits: asked once, and read by the Hopper kernels ever after.

A kernel that asks a function for every score of a partial tile spends more on that than on the score.  Bits
of 64 rows and a tile of keys are 1 KB, in the order in which threads hold scores: of a thread eight bytes,
its first row's bits and those of the row eight below.  Bit ``2 i + e`` is of column
``8 i + 2 (lane % 4) + e``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, kernel, types
from cuda_backend.arrays import View, absent
from cuda_backend.attention.arguments import array_type, aux_signature
from cuda_backend.attention.tile_states import device_bytes
from cuda_backend.attention.traced import traced_mask
from cuda_backend.attention.user_device import Mods, blamed
from cuda_backend.launch import launch

__all__ = ["MOST_BYTES", "WORD_BYTES", "WordsVariant", "bytes_of", "mask_words", "signature", "source"]

THREADS = 128
WORD_BYTES = 8  # of a thread and a tile
MOST_BYTES = 1 << 28  # kept for one mask; beyond that the kernels ask the function


class WordsVariant(NamedTuple):
    """One compiled kernel: the mask function with its arrays, keys of a tile."""

    mods: Mods
    block_n: int


def bytes_of(tiles: int) -> int:
    """Return how many bytes the bits of so many tiles are.

    >>> bytes_of(3)
    3072
    """
    return tiles * THREADS * WORD_BYTES


def mask_words(
    mods: Mods, arrays: tuple[View, ...], partial: View, lengths: tuple[int, int], block_n: int, on: int
) -> View:
    """Return the bits of tiles, uint32 [tiles, 128, 2], on the GPU.

    Parameters
    ----------
    mods : Mods
        Whose mask is asked.
    arrays : tuple of View
        What it reads.
    partial : View
        `lists_hopper.KeyLists.partial`, to be kept until the stream has come so far; of its first tile
        nothing is allowed.
    lengths : tuple of int
        Queries and keys: no key behind the last one is allowed, and a row behind the last query is as that.
    block_n : int
        Keys of a tile.
    on : int
        The stream.
    """
    words = device_bytes((partial.shape[0], THREADS, 2), on, "uint32")
    given = arrays or (absent("float32", 1),)
    made = build(WordsVariant(mods._replace(score=None, vjp=None), block_n))
    arguments: list[Any] = [words, partial, given, *map(np.int64, lengths)]
    launch(made, arguments, blocks=partial.shape[0], threads=THREADS, shared_bytes=0, stream=on)
    return words


def signature(variant: WordsVariant) -> Any:
    """Return the argument types of the kernel."""
    arrays = array_type(types.uint32, 3), array_type(types.int32, 2)
    return types.void(*arrays, aux_signature(variant.mods), types.int64, types.int64)


@functools.cache
def build(variant: WordsVariant) -> Any:
    """Return the compiled kernel."""
    with blamed(variant.mods):
        return kernel(signature(variant))(source(variant))


def source(variant: WordsVariant) -> Any:
    """Return the kernel as a Python function; the constants of its closure shape the code."""
    block_n, columns = variant.block_n, variant.block_n // 8
    allows = traced_mask(variant.mods.mask, variant.mods.aux)

    def mask_words(words: Any, partial: Any, aux: Any, n_q: Any, n_k: Any) -> None:
        thread, tile = np.int32(cuda.threadIdx.x), np.int32(cuda.blockIdx.x)
        b, h = partial[tile, 0], partial[tile, 1]
        row = np.int32(64 * partial[tile, 2] + 16 * (thread >> 5) + ((thread >> 2) & 7))
        first = np.int32(block_n * partial[tile, 3] + 2 * (thread & 3))
        for half in range(2):
            i = np.int32(min(row + 8 * half, n_q - 1))
            word = np.uint32(0)
            for column in range(columns):
                for e in range(2):
                    j = np.int32(first + 8 * column + e)
                    if tile > 0 and j < n_k and allows(b, h, i, j, aux):
                        word = np.uint32(word | np.uint32(np.uint32(1) << np.uint32(2 * column + e)))
            words[tile, thread, half] = word

    return mask_words
