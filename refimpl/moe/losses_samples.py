"""Cases on which the losses of routers are judged, their arrays drawn from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import Case

__all__ = [
    "coefficient_terms",
    "device_terms",
    "load_terms",
    "logit_terms",
    "sample_assignment",
    "sample_devices",
    "sample_gates",
    "sample_load",
    "sample_logits",
    "sample_tasks",
]

SCALES = {"normal": 2.0, "large": 1e3, "equal": 0.0}


def _softmax(logits: FloatArray) -> FloatArray:
    powers = np.exp(logits - np.max(logits, axis=-1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sample_gates(rng: np.random.Generator, *, T: int, E: int, values: str, **options: Any) -> Case:
    """Return a call of `importance_loss`: gates of a softmax, of its top 2, or all equal.

    Examples
    --------
    >>> sample_gates(np.random.default_rng(0), T=1, E=2, values="equal").args
    (array([[0.5, 0.5]]),)
    """
    gates = _softmax(2 * rng.standard_normal((T, E)) if values != "equal" else np.zeros((T, E)))
    if values == "sparse":
        gates[gates < np.sort(gates, axis=1)[:, -min(2, E)][:, None]] = 0
    return Case((gates,), options)


def coefficient_terms(case: Case) -> tuple[int, float]:
    """Return the length of the sums behind a coefficient of variation, and the size of what they subtract."""
    gates = case.args[0]
    return gates.shape[0] + 4 * gates.shape[1], 1.0 + gates.shape[1]


def sample_load(rng: np.random.Generator, *, T: int, E: int, k: int, values: str, **options: Any) -> Case:
    """Return a call of `load_loss`: clean logits, noisy ones, and the noise's standard deviations.

    Examples
    --------
    >>> case = sample_load(np.random.default_rng(0), T=2, E=3, k=1, values="normal")
    >>> [array.shape for array in case.args], case.kwargs
    ([(2, 3), (2, 3), (2, 3)], {'k': 1})
    """
    clean = {"normal": 1.0, "wide": 30.0, "equal": 0.0}[values] * rng.standard_normal((T, E))
    std = 0.2 + rng.random((T, E))
    return Case((clean, clean + std * rng.standard_normal((T, E)), std), {"k": min(k, E), **options})


def load_terms(case: Case) -> tuple[int, float]:
    """Return the length of the sums behind the loads' variation, and the size of what they subtract."""
    T, E = case.args[0].shape
    return T + 4 * E, 4.0 * (1.0 + E)


def _assigned(rng: np.random.Generator, T: int, E: int, K: int, values: str) -> tuple[FloatArray, IntArray]:
    """Return probabilities and K distinct experts a token: the most probable ones, or any."""
    logits = {"routed": 2.0, "hashed": 1.0, "collapsed": 1.0, "equal": 0.0}[values] * rng.standard_normal(
        (T, E)
    )
    if values == "collapsed":
        logits[:, 0] += 40
    probabilities = _softmax(logits)
    order = rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1) if values == "hashed" else None
    chosen = np.argsort(-probabilities, axis=1, kind="stable") if order is None else order
    return probabilities, chosen[:, : min(K, E)]


def sample_assignment(
    rng: np.random.Generator,
    *,
    T: int,
    E: int,
    K: int,
    values: str,
    padded: bool = False,
    groups: int = 1,
    **options: Any,
) -> Case:
    """Return a call of a balance loss: probabilities, and the experts that each token selects.

    Examples
    --------
    >>> case = sample_assignment(np.random.default_rng(0), T=2, E=3, K=2, values="equal")
    >>> case.args[1]
    array([[0, 1],
           [0, 1]])
    """
    probabilities, selected = _assigned(rng, T * groups, E, K, values)
    if padded:
        options["counted"] = rng.random(T * groups) < 0.7
    if groups != 1:
        options["groups"] = groups
    return Case((probabilities, selected), options)


def sample_devices(
    rng: np.random.Generator, *, T: int, E: int, K: int, values: str, devices: int, **options: Any
) -> Case:
    """Return a call of `device_balance_loss`: experts lie on devices in any order, on some of them none.

    Examples
    --------
    >>> sample_devices(np.random.default_rng(1), T=2, E=3, K=1, values="routed", devices=2).kwargs
    {'device_of': array([0, 1, 0])}
    """
    probabilities, selected = _assigned(rng, T, E, K, values)
    return Case((probabilities, selected), {"device_of": rng.integers(0, devices, E), **options})


def device_terms(case: Case) -> tuple[int, float]:
    """Return the length of the sums in a balance loss, and a bound of what they add: E for one expert."""
    T, E = case.args[0].shape
    return T + 2 * E, float(E * case.args[1].shape[1]) + 1.0


def sample_logits(
    rng: np.random.Generator, *, T: int, E: int, values: str, padded: bool = False, **options: Any
) -> Case:
    """Return a call of a loss of logits: near 2, near 1000, or all 0.

    Examples
    --------
    >>> sample_logits(np.random.default_rng(0), T=1, E=2, values="equal").args
    (array([[0., 0.]]),)
    """
    logits = SCALES[values] * rng.standard_normal((T, E)) + 0.0  # no zeros below 0
    if padded:
        options["counted"] = rng.random(T) < 0.7
    return Case((logits,), options)


def sample_tasks(
    rng: np.random.Generator, *, T: int, E: int, tasks: int, values: str, **options: Any
) -> Case:
    """Return a call of `task_information_loss`: logits, and the task that each token comes from.

    Examples
    --------
    >>> sample_tasks(np.random.default_rng(0), T=3, E=2, tasks=2, values="equal").args[1].shape
    (3,)
    """
    return Case((SCALES[values] * rng.standard_normal((T, E)), rng.integers(0, tasks, T)), options)


def logit_terms(case: Case) -> tuple[int, float]:
    """Return the length of the sums in a loss of logits, and the size of squared logsumexps."""
    logits = case.args[0]
    T, E = logits.shape
    return T + 2 * E, (float(np.max(np.abs(logits), initial=0.0)) + float(np.log(E)) + 1.0) ** 2
