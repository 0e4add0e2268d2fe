"""The Hopper kernel with functions of the user's, played as `int8_attention_played` does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend._numba import cuda
from cuda_backend.attention.lists_hopper import ROWS, key_lists
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant, candidates
from cuda_backend.launch import simulation
from refimpl.attention.block_mask import FULL, block_mask
from refimpl.attention.user_functions import as_mod
from tests.cuda.int8_attention_played import MAPS, _play

NAN = np.float32(np.nan)


def attention(
    monkeypatch: pytest.MonkeyPatch,
    build: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    mask_mod: Any = None,
    score_mod: Any = None,
    aux: tuple[Any, ...] = (),
    scale: float | None = None,
    which: int = 0,
) -> tuple[Any, Any]:
    """Return what the kernel made by `build` writes for NumPy arrays of float16: the output, log-sum-exps.

    `which` is that of the candidates for tiles.
    """
    (B, Tq, H, D), (_, Tk, kv_heads, Dv) = q.shape, v.shape
    tiles, _ = candidates("f16", D, Dv)[which]
    given = Mods(
        None if mask_mod is None else as_mod("mask_mod", mask_mod),
        None if score_mod is None else as_mod("score_mod", score_mod, ("score",)),
    )
    ragged = Tk % tiles.block_n != 0
    states = np.full((1, 1, -(-Tq // ROWS), -(-Tk // tiles.block_n)), FULL, np.uint8)
    if mask_mod is not None:
        states = block_mask(mask_mod, B, H, Tq, Tk, block_sizes=(ROWS, tiles.block_n), aux=aux).states
    work, steps = key_lists(states, tiles.consumers, B, H, 1, ragged=ragged)
    rows = (tiles.block_m, tiles.block_n, tiles.block_n)
    matrices = [(np.ascontiguousarray(x).view(np.uint8), r) for x, r in zip((q, k, v), rows, strict=True)]
    _play(monkeypatch, matrices)
    out, lse = np.full((B, Tq, H, Dv), NAN, np.float16), np.full((B, H, Tq), NAN, np.float32)
    counter = np.zeros(2, np.uint32)
    kernel = cuda.jit(build(FlexibleVariant(tiles, given, ragged)))
    factor = D**-0.5 if scale is None else scale
    exponent = np.log2(np.e) * (factor if score_mod is None else 1)
    fake = cuda.devicearray.FakeCUDAArray
    arrays = tuple(fake(np.asarray(x)) for x in aux or (np.zeros(1, np.float32),))
    with simulation():
        kernel[1, tiles.threads, 0, 16](
            MAPS,
            *(np.uint64(x.ctypes.data) for x in (out, lse, counter, work, steps)),
            *map(np.float32, (factor, exponent)),
            *map(np.int32, (len(work), H, H // kv_heads, Tq, Tk, Dv)),
            arrays,
        )
    assert not counter.any(), "the counter is 0 for the next launch"
    return out, lse
