"""From a continuous system ``h' = A h + B u`` to one that moves by steps of size Δ: ``h = Ā h + B̄ u``.

A is diagonal here, so everything is done entry by entry.  The paper holds the input constant over a step; the
released code keeps its exact decay, and replaces its input gain by the step size, to which that tends for
small ΔA.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray

__all__ = ["Discretization", "Discretized", "discretize", "discretize_vjp", "step_size", "step_size_slope"]

Discretization: TypeAlias = Literal["zoh", "euler"]

# Below this the closed form of φ' loses digits to cancellation; so many terms of its series give them all.
SERIES_BELOW, SERIES_TERMS = 0.5, 17


class Discretized(NamedTuple):
    """Decay Ā, and gain B̄ / B, by which the input enters."""

    decay: FloatArray
    gain: FloatArray


def step_size(delta: FloatArray, bias: FloatArray | None, softplus: bool) -> FloatArray:
    """Return the size of steps: the bias is added first, then softplus keeps it positive.

    Examples
    --------
    >>> step_size(np.array([-1000.0, 0.0]), None, True).round(4)
    array([0.    , 0.6931])
    """
    moved = delta if bias is None else delta + bias
    return np.logaddexp(moved, moved.dtype.type(0)) if softplus else moved


def step_size_slope(delta: FloatArray, bias: FloatArray | None, softplus: bool) -> FloatArray:
    """Return the derivative of `step_size` with respect to `delta`, and to `bias`.

    Examples
    --------
    >>> step_size_slope(np.zeros(1), None, True)
    array([0.5])
    """
    from scipy.special import expit

    moved = delta if bias is None else delta + bias
    return np.asarray(expit(moved)) if softplus else np.ones_like(moved)


def discretize(exponent: FloatArray, delta: FloatArray, method: Discretization) -> Discretized:
    """Return decay and gain of a step.

    Parameters
    ----------
    exponent : ndarray of float
        ΔA, entry by entry.
    delta : ndarray of float, broadcastable to `exponent`
        Size of the step.
    method : {"zoh", "euler"}
        ``"zoh"``: ``B̄ = (ΔA)⁻¹ (exp(ΔA) - 1) ΔB`` (Gu and Dao, eq. 4), the zero-order hold.  ``"euler"``:
        ``B̄ = ΔB``, as released.  ``Ā = exp(ΔA)`` in both.

    Returns
    -------
    Discretized
        Where A is 0 both gains are Δ.

    Raises
    ------
    OptionError
        If `method` is neither.

    Examples
    --------
    >>> discretize(np.array([-1.0, 0.0]), np.array([1.0]), "zoh")
    Discretized(decay=array([0.36787944, 1.        ]), gain=array([0.63212056, 1.        ]))
    """
    with np.errstate(over="ignore"):  # a system that grows without bound does overflow
        decay = np.exp(exponent)
    if method == "euler":
        return Discretized(decay, delta)
    if method == "zoh":
        return Discretized(decay, delta * _phi(exponent))
    raise OptionError(f"discretization: expected one of {get_args(Discretization)}, got {method!r}")


def discretize_vjp(
    exponent: FloatArray, delta: FloatArray, method: Discretization, cotangent: Discretized
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of exponent and step size, both in the shape of the exponent.

    Examples
    --------
    >>> discretize_vjp(np.zeros(1), np.ones(1), "zoh", Discretized(np.zeros(1), np.ones(1)))
    (array([0.5]), array([1.]))
    """
    ddecay, dgain = cotangent
    dexponent = ddecay * np.exp(exponent)
    if method == "euler":
        return dexponent, dgain
    return dexponent + dgain * delta * _phi_slope(exponent), dgain * _phi(exponent)


def _phi(x: FloatArray) -> FloatArray:
    """Return ``(exp(x) - 1) / x``, and its limit 1 at 0."""
    with np.errstate(over="ignore"):
        return np.divide(np.expm1(x), x, out=np.ones_like(x), where=x != 0)


def _phi_slope(x: FloatArray) -> FloatArray:
    """Return the derivative of φ, ``(exp(x) - φ(x)) / x``, and near 0 its series ``Σ k x^(k-1) / (k+1)!``."""
    near = np.abs(x) < SERIES_BELOW
    small = np.where(near, x, 0)
    series = np.zeros_like(x)
    for k in range(SERIES_TERMS, 0, -1):  # Horner: the term of k is k / ((k - 1) (k + 1)) x times that before
        series = series * small * ((k + 1) / (k * (k + 2))) + 1
    far = np.where(near, 1, x)
    return np.where(near, series / 2, (np.exp(far) - _phi(far)) / far).astype(x.dtype, copy=False)
