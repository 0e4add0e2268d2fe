"""The kernel of Algorithm 1, whose traffic is counted on a GPU, computes attention in the simulator."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.algorithm_1 import ROWS, WIDTH, build

pytestmark = pytest.mark.cudasim


@pytest.mark.parametrize(("N", "Tk"), [(3, 70), (66, 5)])
def test_it_is_attention(N: int, Tk: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, rows, WIDTH)).astype(np.float32) for rows in (N, Tk, Tk))
    o, sums, maxima = (
        np.full_like(q, np.nan),
        np.full((2, N), np.nan, np.float32),
        np.full((2, N), np.nan, np.float32),
    )
    build()[2, ROWS](q, k, v, o, sums, maxima, np.float32(0.125))
    scores = 0.125 * np.einsum("hnd,hkd->hnk", q, k, dtype=np.float64)
    largest = scores.max(-1)
    weights = np.exp(scores - largest[..., None])
    np.testing.assert_allclose(maxima, largest, rtol=1e-5)
    np.testing.assert_allclose(sums, weights.sum(-1), rtol=1e-5)
    expected = np.einsum("hnk,hkd->hnd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(o, expected, rtol=1e-4, atol=1e-5)
