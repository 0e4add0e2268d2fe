"""Cases on which Mamba blocks are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import Case, Option
from refimpl.ssm.samples import draw

__all__ = ["BLOCK_AXES", "BLOCK_EDGES", "BLOCK_OPTIONS", "sample_block"]

BLOCK_AXES = {
    "B": (0, 2),
    "T": (0, 7),
    "M": (1, 3),
    "Din": (1, 4),
    "N": (1, 3),
    "R": (1, 2),
    "k": (1, 4),
}
BLOCK_OPTIONS = {"discretization": ("euler", "zoh"), "extra": ("released", "biases", "states", "bare")}
_SMALL = {"B": 2, "T": 6, "M": 2, "Din": 3, "N": 2, "R": 1}
BLOCK_EDGES: tuple[Mapping[str, Option], ...] = (
    {"B": 0, "T": 2},
    {"B": 2, "T": 0, "extra": "states"},
    {"B": 1, "T": 1, "M": 1, "Din": 1, "N": 1, "R": 1, "k": 1},
    {**_SMALL, "k": 4, "T": 2, "extra": "states"},  # fewer tokens than the convolution remembers
    {**_SMALL, "k": 4, "extra": "released"},
    {**_SMALL, "k": 2, "extra": "biases", "discretization": "zoh"},
    {**_SMALL, "k": 3, "extra": "bare"},
)


def sample_block(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    M: int,
    Din: int,
    N: int,
    R: int,
    k: int,
    discretization: str,
    extra: str,
) -> Case:
    """Return one call of `mamba_block`.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    B, T, M, Din, N, R, k : int
        Sequences, tokens, width of the model and of the block, states of a channel, rank of the step, taps.
    discretization : {"euler", "zoh"}
        Passed on.
    extra : str
        ``"released"``: with a bias of the convolution, as published models have; ``"biases"``: of the
        projections too; ``"states"``: with states before the first token; ``"bare"``: nothing.

    Returns
    -------
    Case
        Arrays of float64 that float32 holds exactly.

    Examples
    --------
    >>> shape = dict(B=1, T=3, M=2, Din=4, N=3, R=1, k=4, discretization="euler", extra="bare")
    >>> case = sample_block(np.random.default_rng(0), **shape)
    >>> {name: value.shape for name, value in case.kwargs.items() if name.startswith("w")}
    {'w_in': (2, 8), 'w_conv': (4, 4), 'w_x': (4, 7), 'w_dt': (1, 4), 'w_out': (4, 2)}
    """

    def weight(rows: int, *columns: int) -> FloatArray:
        # A power of 2 near the variance 1 / rows keeps the numbers exact in float32.
        return draw(rng, rows, *columns) / float(2 ** round(math.log2(rows) / 2))

    options = {
        "w_in": weight(M, 2 * Din), "w_conv": draw(rng, Din, k) / 2, "w_x": weight(Din, R + 2 * N),
        "w_dt": weight(R, Din), "b_dt": draw(rng, Din), "A_log": draw(rng, Din, N) / 2, "D": draw(rng, Din),
        "w_out": weight(Din, M),
    }  # fmt: skip
    if extra in ("released", "biases", "states"):
        options["b_conv"] = draw(rng, Din) / 2
    if extra == "biases":
        options |= {"b_in": draw(rng, 2 * Din) / 2, "b_out": draw(rng, M) / 2}
    if extra == "states":
        options |= {"conv_state": draw(rng, B, k - 1, Din), "scan_state": draw(rng, B, Din, N)}
    return Case((draw(rng, B, T, M),), {"discretization": discretization, **options})
