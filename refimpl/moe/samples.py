"""Cases on which layers with experts are judged, and experts that show what a router did.

>>> case = sample_layer(np.random.default_rng(0), T=5, D=2, E=3, F=4)
>>> [array.shape for array in case.args], dict(case.kwargs)
([(5, 2), (2, 3), (3, 2, 4), (3, 4, 2)], {'activation': 'relu'})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case

__all__ = [
    "EXPERTS",
    "LAYER_AXES",
    "LAYER_EDGES",
    "ROUTED_AXES",
    "ROUTED_EDGES",
    "ROUTED_OPTIONS",
    "VALUES",
    "gap",
    "layer_terms",
    "observed_weights",
    "routers_apart",
    "sample_layer",
    "sample_routed",
    "scaling_experts",
    "separated_logits",
]

LAYER_AXES = {"T": (0, 9), "D": (1, 4), "E": (1, 5), "F": (1, 4)}
VALUES = ("normal", "large")
EXPERTS = ("relu", "gelu", "gated silu")
LAYER_EDGES: tuple[dict[str, Any], ...] = (
    {"T": 0, "E": 3},
    {"T": 1, "D": 1, "E": 1, "F": 1},
    {"T": 7, "E": 4, "values": "large"},  # gates of 1 and of 0
    {"T": 9, "E": 2, "experts": "gated silu"},
)


ROUTED_AXES = {**LAYER_AXES, "T": (0, 6), "capacity": (-1, 3), "groups": (1, 2)}
ROUTED_OPTIONS: dict[str, tuple[Any, ...]] = {"values": VALUES, "experts": EXPERTS}
ROUTED_EDGES: tuple[dict[str, Any], ...] = (
    {"T": 0, "E": 3, "groups": 2},
    {"T": 1, "D": 1, "E": 1, "F": 1, "capacity": 1, "groups": 1},
    {"T": 5, "E": 2, "capacity": 0},  # everything is dropped
    {"T": 6, "E": 3, "capacity": 1, "groups": 2},
    {"T": 6, "E": 4, "capacity": 6, "values": "large"},  # nothing is
    {"T": 6, "E": 3, "capacity": -1, "experts": "gated silu"},
)


def gap(logits: FloatArray, values: str = "normal") -> bool:
    """Return whether the logits of each token are so far apart that a small step changes no choice.

    Choices are discontinuous: a difference across one says nothing of a gradient.  Large logits must also be
    so far apart that the softmax is flat, because a difference over its steep part has no accuracy.

    Examples
    --------
    >>> gap(np.array([[1.0, 2.0]])), gap(np.array([[1.0, 1.0]])), gap(np.zeros((2, 1)))
    (True, False, True)
    """
    distances = np.diff(np.sort(logits, axis=1), axis=1)
    return bool(np.min(distances, initial=np.inf) > {"normal": 1e-3, "large": 40.0}[values])


def routers_apart(
    rng: np.random.Generator, T: int, D: int, E: int, values: str = "normal"
) -> tuple[FloatArray, FloatArray]:
    """Return tokens and a router whose logits have a `gap`; "large" ones are in the thousands.

    Examples
    --------
    >>> [a.shape for a in routers_apart(np.random.default_rng(0), 2, 3, 4)]
    [(2, 3), (3, 4)]
    """
    scale = {"normal": 1.0, "large": 1e3}[values]
    while True:
        x, w_router = rng.standard_normal((T, D)), scale * rng.standard_normal((D, E))
        if gap(x @ w_router, values):
            return x, w_router


def separated_logits(rng: np.random.Generator, T: int, E: int, values: str = "normal") -> FloatArray:
    """Return logits with a `gap`, shape (T, E).

    Examples
    --------
    >>> separated_logits(np.random.default_rng(0), 2, 3).shape
    (2, 3)
    """
    x, w_router = routers_apart(rng, T, max(1, E), E, values)
    return np.asarray(x @ w_router)


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
    values : {"normal", "large"}
        "large": logits in the thousands, gates of 0 and of 1.
    experts : str
        Name of the activation, with ``"gated "`` before it for gated experts.

    Returns
    -------
    Case
        In float64.  No two logits of a token are equal: ties are tried by laws.
    """
    x, w_router = routers_apart(rng, T, D, E, values)
    w_in, w_out = rng.standard_normal((E, D, F)), rng.standard_normal((E, F, D))
    options: dict[str, Any] = {"activation": experts.removeprefix("gated ")}
    if experts.startswith("gated "):
        options["w_gate"] = rng.standard_normal((E, D, F))
    return Case((x, w_router, w_in, w_out), options)


def sample_routed(rng: np.random.Generator, *, capacity: int, groups: int, T: int, **shape: Any) -> Case:
    """Return one call of a layer with buffers: `sample_layer` of ``T * groups`` tokens and a capacity.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    capacity : int
        Places of each expert for a group; -1: from the factor, rounded as in one of the sources.
    groups, T : int
        Groups, and tokens of each.
    **shape
        As for `sample_layer`.

    Returns
    -------
    Case
        With ``capacity``, or a factor and a rounding, among the options.

    Examples
    --------
    >>> case = sample_routed(np.random.default_rng(0), capacity=1, groups=2, T=3, D=2, E=2, F=2)
    >>> case.args[0].shape, case.kwargs["capacity"]
    ((6, 2), 1)
    """
    case = sample_layer(rng, T=T * groups, **shape).replace(groups=groups)
    if capacity >= 0:
        return case.replace(capacity=capacity)
    rounding = ("mesh_tf", "flaxformer", "vmoe")[int(rng.integers(3))]
    return case.replace(
        capacity_factor=float(rng.choice([0.5, 1.0, 1.25])), rounding=rounding, min_capacity=1
    )


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
    tokens = widen(x).astype(np.float64)
    square = np.sum(tokens * tokens, axis=1)
    weights = np.zeros((len(x), E))
    for e in range(E):
        experts = (round_to(w, x.dtype) for w in scaling_experts(np.eye(E)[e], D))
        y = widen(np.asarray(case.without("w_gate").replace(x, w_router, *experts).call(f)))
        weights[:, e] = np.divide(np.sum(tokens * y, axis=1), square, out=weights[:, e], where=square > 0)
    return weights
