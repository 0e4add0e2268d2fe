"""Cases on which layers with experts are judged, and experts that show what a router did.

>>> case = sample_layer(np.random.default_rng(0), T=5, D=2, E=3, F=4)
>>> [array.shape for array in case.args], dict(case.kwargs)
([(5, 2), (2, 3), (3, 2, 4), (3, 4, 2)], {'activation': 'relu'})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import Case

__all__ = ["LAYER_AXES", "LAYER_EDGES", "layer_terms", "observed_weights", "sample_layer", "scaling_experts"]

LAYER_AXES = {"T": (0, 9), "D": (1, 4), "E": (1, 5), "F": (1, 4)}
LAYER_EDGES: tuple[dict[str, Any], ...] = (
    {"T": 0, "E": 3},
    {"T": 1, "D": 1, "E": 1, "F": 1},
    {"T": 7, "E": 4, "values": "ties"},  # every token chooses the lowest expert: the others stay empty
    {"T": 7, "E": 4, "values": "large"},  # logits in the hundreds: gates of 1 and of 0
)


def sample_layer(
    rng: np.random.Generator,
    *,
    T: int,
    D: int,
    E: int,
    F: int,
    values: str = "normal",
    experts: str = "relu",
) -> Case:
    """Return ``(x, w_router, w_in, w_out)`` of a layer and the options of its experts.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    T, D, E, F : int
        Tokens, their features, experts, hidden units of each.
    values : {"normal", "ties", "large"}
        "ties": a router of zeros.  "large": logits in the hundreds.
    experts : str
        Name of the activation, with ``"gated "`` before it for gated experts.

    Returns
    -------
    Case
        In float64.
    """
    x, w_router = rng.standard_normal((T, D)), rng.standard_normal((D, E))
    w_in, w_out = rng.standard_normal((E, D, F)), rng.standard_normal((E, F, D))
    factor = {"normal": 1.0, "ties": 0.0, "large": 300.0}[values]
    options: dict[str, Any] = {"activation": experts.removeprefix("gated ")}
    if experts.startswith("gated "):
        options["w_gate"] = rng.standard_normal((E, D, F))
    return Case((x, factor * w_router, w_in, w_out), options)


def layer_terms(case: Case) -> tuple[int, Any]:
    """Return the length of the sums of a layer, and their absolute terms if every expert had weight 1.

    An activation is at most its argument in size, and weights are at most 1, so this bounds every routing.
    """
    x, w_router, w_in, w_out = (np.abs(array) for array in case.args[:4])
    hidden = np.einsum("td,edf->tef", x, w_in)
    if case.kwargs.get("w_gate") is not None:
        hidden = hidden * np.einsum("td,edf->tef", x, np.abs(case.kwargs["w_gate"]))
    n = 2 * x.shape[1] + w_in.shape[2] + w_router.shape[1]
    return n, np.einsum("tef,efd->td", hidden, w_out)


def scaling_experts(scales: FloatArray, D: int) -> tuple[FloatArray, FloatArray]:
    """Return weights of ungated experts that multiply their input: expert e by ``scales[e]``.

    Every activation here is ``x Φ(x)`` with ``Φ(x) + Φ(-x) = 1``, so ``act(x) - act(-x) = x``: two hidden
    units a feature make the identity, whatever the activation is.

    Examples
    --------
    >>> from refimpl.moe.expert_ffn import expert_ffn
    >>> expert_ffn(np.ones((2, 1, 1)), *scaling_experts(np.array([3.0, 0.0]), 1), activation="silu")[:, 0, 0]
    array([3., 0.])
    """
    identity = np.eye(D)
    w_in = np.broadcast_to(np.hstack([identity, -identity]), (len(scales), D, 2 * D))
    return w_in.copy(), np.asarray(scales)[:, None, None] * np.vstack([identity, -identity])


def observed_weights(f: Callable[..., Any], case: Case) -> FloatArray:
    """Return the weight that a layer gives each expert for each token, seen from outside; shape (T, E).

    The layer ``f(x, w_router, w_in, w_out, ...)`` is run with experts of which one at a time is the identity
    and the others give 0: its output is then the token times its weight for that expert.  So laws can ask any
    implementation what it routed where, a token of zeros excepted, which has weight 0.
    """
    x, w_router = case.args[:2]
    E, D = w_router.shape[1], x.shape[1]
    weights = np.zeros((len(x), E))
    square = np.sum(x * x, axis=1)
    for e in range(E):
        probe = case.without("w_gate").replace(x, w_router, *scaling_experts(np.eye(E)[e], D), *case.args[4:])
        y = np.asarray(probe.call(f), np.float64)
        weights[:, e] = np.divide(np.sum(x * y, axis=1), square, out=np.zeros(len(x)), where=square > 0)
    return weights
