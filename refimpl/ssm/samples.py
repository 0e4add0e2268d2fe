"""Cases on which selective scans and Mamba blocks are judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import Case, Option

__all__ = ["AXES", "EDGES", "OPTIONS", "sample_scan", "scan_terms"]

AXES = {"B": (0, 2), "T": (0, 9), "Din": (1, 3), "N": (1, 4)}
OPTIONS = {
    "discretization": ("euler", "zoh"),
    "extra": ("none", "skip", "gate", "state", "all"),
    "steps": ("softplus", "plain", "tiny", "huge", "zero"),
    "system": ("selective", "invariant", "integrator", "unit"),
}
EDGES: tuple[Mapping[str, Option], ...] = (
    {"B": 0, "T": 3},
    {"B": 2, "T": 0, "extra": "state"},
    {"B": 1, "T": 1, "Din": 1, "N": 1, "extra": "all"},
    *(
        {"B": 2, "T": 9, "Din": 2, "N": 3, "extra": "all", "steps": steps, "discretization": method}
        for steps in ("softplus", "tiny", "huge", "zero")
        for method in ("euler", "zoh")
    ),
    {"B": 1, "T": 7, "Din": 2, "N": 2, "system": "integrator", "discretization": "zoh", "extra": "state"},
    {"B": 1, "T": 8, "Din": 2, "N": 2, "system": "invariant", "steps": "plain", "discretization": "zoh"},
    {"B": 2, "T": 5, "Din": 2, "N": 1, "system": "unit", "steps": "softplus", "discretization": "zoh"},
)


def draw(rng: np.random.Generator, *shape: int) -> FloatArray:
    """Return normal numbers that float32 holds exactly: libraries that round to it then judge in float64.

    Examples
    --------
    >>> x = draw(np.random.default_rng(0), 2, 3)
    >>> x.dtype, bool(np.all(x == x.astype(np.float32)))
    (dtype('float64'), True)
    """
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def sample_scan(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    Din: int,
    N: int,
    discretization: str = "euler",
    extra: str = "none",
    steps: str = "softplus",
    system: str = "selective",
) -> Case:
    """Return one call of `selective_scan`.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    B, T, Din, N : int
        Sequences, tokens, channels, states of a channel.
    discretization : {"euler", "zoh"}
        Passed on.
    extra : str
        ``"skip"`` adds D, ``"gate"`` z, ``"state"`` an initial state, ``"all"`` these and a bias.
    steps : str
        ``"softplus"`` of what is drawn; or steps themselves: ``"plain"``, ``"tiny"``, ``"huge"``, which
        forget the state (an integrator cannot, and has plain ones: its output would curve too much in A for
        finite differences), or some that are ``"zero"``, which keep it.
    system : str
        ``"selective"``; ``"invariant"``, with the same delta, B and C at every token; ``"integrator"``, with
        A = 0; or ``"unit"``, with A = -1 and B = 1, as in Theorem 1 of the paper.

    Returns
    -------
    Case
        Arrays of float64 that float32 holds exactly.

    Examples
    --------
    >>> case = sample_scan(np.random.default_rng(0), B=1, T=4, Din=2, N=3, extra="skip")
    >>> [array.shape for array in case.args], sorted(case.kwargs)
    ([(1, 4, 2), (1, 4, 2), (2, 3), (1, 4, 3), (1, 4, 3)], ['D', 'delta_softplus', 'discretization'])
    """
    u, delta = draw(rng, B, T, Din), draw(rng, B, T, Din)
    A = -np.exp(draw(rng, Din, N)).astype(np.float32).astype(np.float64)
    inputs, reads = draw(rng, B, T, N), draw(rng, B, T, N)
    scale = {"tiny": 2.0**-30, "huge": 1.0 if system == "integrator" else 2.0**9}.get(steps, 1.0)
    if steps != "softplus":
        delta = scale * np.abs(delta)
    if steps == "zero":
        delta[:, ::2] = 0.0
    if system == "invariant" and T:
        delta, inputs, reads = (np.repeat(x[:, :1], T, axis=1) for x in (delta, inputs, reads))
    if system == "integrator":
        A = np.zeros_like(A)
    if system == "unit":
        A, inputs = -np.ones_like(A), np.ones_like(inputs)
    options: dict[str, Any] = {"discretization": discretization, "delta_softplus": steps == "softplus"}
    if extra in ("skip", "all"):
        options["D"] = draw(rng, Din)
    if extra in ("gate", "all"):
        options["z"] = draw(rng, B, T, Din)
    if extra in ("state", "all"):
        options["initial_state"] = draw(rng, B, Din, N)
    if extra == "all":
        # Steps are positive: where softplus does not see to it, the bias does not change that.
        bias = draw(rng, Din)
        options["delta_bias"] = bias if steps == "softplus" else scale * np.abs(bias)
    return Case((u, delta, A, inputs, reads), options)


def scan_terms(case: Case) -> tuple[int, Any]:
    """Return the length of the sums of a call of `selective_scan`, and the sums of their absolute values.

    Decays are positive, so these are the outputs of the same system for the sizes of its arrays.

    Examples
    --------
    >>> case = sample_scan(np.random.default_rng(0), B=1, T=4, Din=2, N=3)
    >>> scan_terms(case)[0]
    7
    """
    from refimpl.ssm.selective_scan import selective_scan

    u, delta, A, B, C = case.args
    sizes = {name: np.abs(case.kwargs[name]) for name in ("D", "z", "initial_state") if name in case.kwargs}
    positive = case.replace(np.abs(u), delta, A, np.abs(B), np.abs(C), **sizes)
    return u.shape[1] + A.shape[1], positive.call(selective_scan)
