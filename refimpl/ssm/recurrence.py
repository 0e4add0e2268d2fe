"""The recurrence ``h_t = a_t h_{t-1} + b_t``, and why it needs no loop over t.

A step is the map ``h -> a h + b``.  Two steps, one after the other, are again such a map, and composing maps
is associative: so all prefixes come from a scan, of depth log T, and any chunk of steps is one step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.numerics import FloatArray

__all__ = ["Step", "associative_scan", "combine"]


class Step(NamedTuple):
    """The map ``h -> decay * h + drive``; (1, 0) changes nothing."""

    decay: FloatArray
    drive: FloatArray


def combine(first: Step, second: Step) -> Step:
    """Return the step that does `first` and then `second`: associative, not commutative.

    References
    ----------
    .. [1] Blelloch, 1990, "Prefix sums and their applications", CMU-CS-90-190, section 4.1.

    Examples
    --------
    >>> half, quarter, one = np.array([0.5]), np.array([0.25]), np.array([1.0])
    >>> combine(Step(half, one), Step(quarter, 3 * one))
    Step(decay=array([0.125]), drive=array([3.25]))
    """
    return Step(first.decay * second.decay, second.decay * first.drive + second.drive)


def associative_scan(steps: Step) -> FloatArray:
    """Return the states after each step along axis 1, from 0, in depth ``2 log2 T`` and O(T) work.

    Neighbours are combined, the half as many steps are scanned, and the states between are one step further.

    Parameters
    ----------
    steps : Step
        Arrays of shape (B, T, ...).

    Returns
    -------
    ndarray of float, shape (B, T, ...)
        ``h_t = a_t h_{t-1} + b_t`` with ``h_{-1} = 0``.

    Examples
    --------
    >>> ones = np.ones((1, 5))
    >>> associative_scan(Step(2 * ones, ones))
    array([[ 1.,  3.,  7., 15., 31.]])
    """
    decay, drive = steps
    T = drive.shape[1]
    if T < 2:
        return drive.copy()
    even, odd = slice(0, T - 1, 2), slice(1, None, 2)
    second = associative_scan(
        combine(Step(decay[:, even], drive[:, even]), Step(decay[:, odd], drive[:, odd]))
    )
    states = np.empty_like(drive)
    states[:, 0] = drive[:, 0]
    states[:, 1::2] = second
    states[:, 2::2] = decay[:, 2::2] * second[:, : (T - 1) // 2] + drive[:, 2::2]
    return states
