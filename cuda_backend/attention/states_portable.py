"""States of tiles on a GPU: a block a tile counts the scores that a mask function allows."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda, kernel, types
from cuda_backend.attention.arguments import array_type, aux_signature
from cuda_backend.attention.tiles_portable import INDEX
from cuda_backend.attention.user_device import Mods, blamed, mask_on_device
from refimpl.attention.block_mask import DEAD, FULL, PARTIAL

__all__ = ["StatesVariant", "build", "signature", "source"]

_NO, _YES = np.int32(0), np.int32(1)  # as the barriers that count take them


class StatesVariant(NamedTuple):
    """One compiled kernel: the mask function with its arrays, queries and keys of a tile, threads."""

    mods: Mods
    Br: int
    Bc: int
    threads: int


def signature(variant: StatesVariant) -> Any:
    """Return the argument types of the kernel."""
    return types.void(array_type(types.uint8, 4), aux_signature(variant.mods), types.int64, types.int64)


@functools.cache
def build(variant: StatesVariant) -> Any:
    """Return the compiled kernel."""
    with blamed(variant.mods):
        return kernel(signature(variant))(source(variant))


def source(variant: StatesVariant) -> Any:
    """Return the kernel as a Python function; the constants of its closure shape the code."""
    Br, Bc, THREADS = variant.Br, variant.Bc, variant.threads
    allows = mask_on_device(variant.mods.mask)

    def tile_states(states: Any, aux: Any, n_q: Any, n_k: Any) -> None:
        thread = cuda.threadIdx.x & (THREADS - 1)
        tile = cuda.blockIdx.x & INDEX
        c = tile % states.shape[3]
        r = tile // states.shape[3] % states.shape[2]
        h = tile // (states.shape[3] * states.shape[2]) % states.shape[1]
        b = tile // (states.shape[3] * states.shape[2] * states.shape[1])
        some, every = _NO, _YES
        for e in range(thread, Br * Bc, THREADS):
            i = r * Br + (e & INDEX) // Bc
            j = c * Bc + (e & INDEX) % Bc
            if i < n_q and j < n_k:  # behind the last query and key nothing speaks against a full tile
                if allows(b, h, i, j, aux):
                    some = _YES
                else:
                    every = _NO
        some = cuda.syncthreads_or(some)
        every = cuda.syncthreads_and(every)
        if thread == 0:
            state = DEAD
            if some:
                state = PARTIAL
            if every:
                state = FULL
            states[b, h, r, c] = state

    return tile_states
