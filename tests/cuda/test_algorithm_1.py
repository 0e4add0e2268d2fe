"""The kernel of Algorithm 1, whose traffic is counted on a GPU, computes attention in the simulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.cuda.algorithm_1 import THREADS, WIDTH, build

# Tests run with the simulator on, which compiles nothing: another process compiles.
PROGRAM = """
import json
import numba
from cuda_backend import aot
from tests.cuda.algorithm_1 import SHARED, source

number = numba.float32
arrays = [numba.types.Array(number, axes, "C") for axes in (3, 3, 3, 3, 2, 2)]
ptx = aot.compile_ptx(source(), numba.void(*arrays, number), aot.HOPPER)
print(json.dumps([*aot.resources(ptx, aot.HOPPER), SHARED]))
"""


@pytest.mark.cudasim
@pytest.mark.parametrize(("N", "Tk"), [(3, 70), (35, 5)])
def test_it_is_attention(N: int, Tk: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, rows, WIDTH)).astype(np.float32) for rows in (N, Tk, Tk))
    o, sums, maxima = (
        np.full_like(q, np.nan),
        np.full((2, N), np.nan, np.float32),
        np.full((2, N), np.nan, np.float32),
    )
    build()[2, THREADS](q, k, v, o, sums, maxima, np.float32(0.125))
    scores = 0.125 * np.einsum("hnd,hkd->hnk", q, k, dtype=np.float64)
    largest = scores.max(-1)
    weights = np.exp(scores - largest[..., None])
    np.testing.assert_allclose(maxima, largest, rtol=1e-5)
    np.testing.assert_allclose(sums, weights.sum(-1), rtol=1e-5)
    expected = np.einsum("hnk,hkd->hnd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(o, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.aot
def test_all_that_it_moves_is_the_algorithms() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    registers, spilled, local, shared = json.loads(run.stdout)
    assert (spilled, local) == (0, 0)
    assert registers <= 64, "fewer blocks would run at once than shared memory allows"
    assert shared <= 48 << 10
