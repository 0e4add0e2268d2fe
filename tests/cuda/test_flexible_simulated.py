"""Functions of the user's in the portable kernels, simulated: gradients, skipped tiles, caching."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.attention import forward_portable
from refimpl.attention import block_mask, flexible_attention, flexible_attention_vjp, mods
from refimpl.attention.samples_flexible import MASKS, SCORES, sample_flexible
from refimpl.attention.user_functions import as_mod
from refimpl.errors import OptionError, ShapeError, UnsupportedError
from refimpl.registry import Case
from refimpl.tolerances import cast

pytestmark = pytest.mark.cudasim

SHAPE: dict[str, Any] = {"B": 2, "Tq": 11, "Tk": 13, "Hkv": 1, "group": 2, "D": 3, "Dv": 2}
# Everything is float32 and scores are of size 1, so sums of 13 terms are off by some ulps of 2**-23.
CLOSE = 2e-5


def case_of(mask: str, score: str, seed: int = 0) -> Case:
    return cast(sample_flexible(np.random.default_rng(seed), mask=mask, score=score, **SHAPE), np.dtype("f4"))


@pytest.mark.parametrize("blocks", [(3, 4), (8, 8)])
@pytest.mark.parametrize(
    ("mask", "score"), [*((mask, "none") for mask in MASKS), *(("branching", score) for score in SCORES)]
)
def test_gradients_equal_the_reference(mask: str, score: str, blocks: tuple[int, int]) -> None:
    case = case_of(mask, score)
    do = np.random.default_rng(1).standard_normal((2, 11, 2, 2)).astype(np.float32)
    out, lse = cuda_backend.flexible_attention(*case.args, return_lse=True, block_sizes=blocks, **case.kwargs)
    found = cuda_backend.flexible_attention_vjp(*case.args, out, lse, do, block_sizes=blocks, **case.kwargs)
    exact = case.map_arrays(lambda x: x.astype(float) if x.dtype.kind == "f" else x)
    wanted = flexible_attention_vjp(*exact.args, do.astype(float), **exact.kwargs)
    assert np.abs(out - flexible_attention(*exact.args, **exact.kwargs)).max() < CLOSE
    for name in ("dq", "dk", "dv"):
        assert np.abs(getattr(found, name) - getattr(wanted, name)).max() < CLOSE, name


def test_dead_tiles_are_not_read() -> None:
    """NaN in keys of dead tiles would show in every product with them."""
    q, k, v = case_of("none", "none").args
    k[:, 8:] = np.nan
    v[:, 8:] = np.nan
    out = cuda_backend.flexible_attention(q, k, v, mask_mod=lambda b, h, i, j: j < 8, block_sizes=(4, 4))
    assert np.isfinite(out).all()


def test_a_kernel_is_compiled_once_for_functions_that_compute_the_same() -> None:
    x = np.ones((1, 2, 1, 2), np.float32)
    before = forward_portable.build.cache_info().misses
    for radius in (5, 5, 6):
        cuda_backend.flexible_attention(x, x, x, mask_mod=mods.sliding(radius))
    assert forward_portable.build.cache_info().misses == before + 2


def test_what_is_refused() -> None:
    x = np.ones((1, 2, 1, 2), np.float32)
    with pytest.raises(OptionError, match="score_mod_vjp: needed"):
        cuda_backend.flexible_attention_vjp(x, x, x, x, np.zeros((1, 1, 2)), x, score_mod=mods.softcap(2.0))
    with pytest.raises(UnsupportedError, match=r"aux\[0\] is uint16"):
        cuda_backend.flexible_attention(x, x, x, aux=(np.ones(2, np.uint16),))
    with pytest.raises(OptionError, match=r"expected a function of \(b, h, i, j\)"):
        as_mod("mask_mod", lambda i, j: j <= i)


def test_states_of_tiles_agree_with_their_scores() -> None:
    mask = mods.both(mods.causal, mods.sliding(3))
    states = block_mask(mask, 1, 1, 11, 13, block_sizes=(3, 4)).states[0, 0]
    for r, c in np.ndindex(states.shape):
        inside = [
            mask(0, 0, i, j)
            for i in range(3 * r, min(3 * r + 3, 11))
            for j in range(4 * c, min(4 * c + 4, 13))
        ]
        assert states[r, c] == (2 if all(inside) else 1 if any(inside) else 0)


def test_short_arrays_of_the_host_are_noticed() -> None:
    """In the score and in its gradient, whatever the mask allows, before a kernel runs."""
    x = np.ones((1, 3, 1, 4), np.float32)
    bent: dict[str, Any] = {"score_mod": lambda s, b, h, i, j, aux: s + aux[0][i], "aux": (np.zeros(2),)}
    with pytest.raises(ShapeError, match=r"aux\[0\]: index 2 .* line \d+, given 1 arrays: \(2,\)"):
        cuda_backend.flexible_attention(x, x, x, **bent)
    gradient: dict[str, Any] = {
        "score_mod": lambda s, b, h, i, j: s,
        "score_mod_vjp": lambda g, s, b, h, i, j, aux: g * aux[1][i],
    }
    lse = np.zeros((1, 1, 3), np.float32)
    with pytest.raises(ShapeError, match="tuple index out of range"):
        cuda_backend.flexible_attention_vjp(x, x, x, x, lse, x, aux=(np.zeros(3),), **gradient)
