"""DeepSeekMoE's balance losses: of experts, and of the devices that hold them.

>>> p = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]])
>>> chosen = np.array([[0], [1]])
>>> round(expert_balance_loss(p, chosen), 12)  # experts 0 and 1 have two shares each
1.6
>>> round(device_balance_loss(p, chosen, device_of=np.array([0, 1, 0, 1])), 12)  # the devices are balanced
1.0
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import DTypeError, ShapeError
from refimpl.moe.losses_balance import ProbabilityGradient, assignment
from refimpl.moe.losses_importance import wide
from refimpl.moe.losses_samples import device_terms, sample_assignment, sample_devices
from refimpl.numerics import FloatArray, IntArray, round_to
from refimpl.registry import Source, technique
from refimpl.validation import as_array

__all__ = [
    "Balance",
    "device_balance_loss",
    "device_balance_loss_vjp",
    "expert_balance_loss",
    "expert_balance_loss_vjp",
    "placement",
]


class Balance(NamedTuple):
    """Scores, and what the mean score of each expert is multiplied by."""

    scores: FloatArray
    factors: FloatArray

    def loss(self) -> float:
        """The factors times the mean scores."""
        means = np.sum(wide(self.scores), axis=0) / max(self.scores.shape[0], 1)
        return float(np.sum(means * self.factors.astype(means.dtype), dtype=np.float64))

    def gradient(self, dloss: float) -> ProbabilityGradient:
        """The factors, shared out over the tokens."""
        each = float(dloss) * self.factors / max(self.scores.shape[0], 1)
        full = np.broadcast_to(each, self.scores.shape).copy()
        return ProbabilityGradient(round_to(full, self.scores.dtype))


@technique(
    "moe.device_balance_loss.expert",
    entries=(52,),
    kind="function",
    source=Source("Dai et al. 2024", "arXiv:2401.06066", "section 3.3, eq. 12 to 14"),
    axes={"T": (0, 9), "E": (1, 6), "K": (1, 3)},
    options={"values": ("routed", "hashed", "collapsed", "equal")},
    sample=sample_assignment,
    edges=(
        {"T": 0, "E": 3},
        {"T": 4, "E": 1},
        {"T": 6, "E": 3, "K": 3},
        {"T": 6, "E": 4, "K": 2, "values": "equal"},
        {"T": 5, "E": 5, "K": 1, "values": "collapsed"},
    ),
    terms=device_terms,
    vjp="refimpl.moe.losses_device_balance:expert_balance_loss_vjp",
)
def expert_balance_loss(scores: FloatArray, selected: IntArray, /) -> float:
    """Return ``Σ_i f_i P_i`` over routed experts, ``f_i = N/(K T) #{t selects i}`` and P the mean score.

    Parameters
    ----------
    scores : ndarray of float, shape (T, N)
        Affinities of the routed experts: softmax over all N of them, shared ones left out.
    selected : ndarray of int, shape (T, K)
        Routed experts that each token selects.

    Returns
    -------
    float
        1 for uniform scores, whatever K: f is divided by K.  The coefficient α1 is the caller's.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `balance_loss`.

    Notes
    -----
    **Special cases**: without tokens the loss is 0.  It is the loss of flaxformer divided by K.

    References
    ----------
    .. [1] Dai et al., 2024, arXiv:2401.06066, eq. 12 to 14.

    Examples
    --------
    >>> expert_balance_loss(np.eye(4), np.array([[0], [1], [2], [3]]))
    1.0
    """
    return _by_expert(scores, selected).loss()


def expert_balance_loss_vjp(scores: FloatArray, selected: IntArray, dloss: float, /) -> ProbabilityGradient:
    """Return the gradient of `expert_balance_loss` with respect to the scores.

    Parameters
    ----------
    scores, selected
        As for `expert_balance_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    ProbabilityGradient
        In the dtype of the scores.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `balance_loss`.

    Examples
    --------
    >>> expert_balance_loss_vjp(np.full((1, 2), 0.5), np.array([[1]]), 1.0).dprobabilities
    array([[0., 2.]])
    """
    return _by_expert(scores, selected).gradient(dloss)


@technique(
    "moe.device_balance_loss",
    entries=(52,),
    kind="function",
    source=Source("Dai et al. 2024", "arXiv:2401.06066", "section 3.3, eq. 15 to 17"),
    axes={"T": (0, 9), "E": (1, 6), "K": (1, 3), "devices": (1, 4)},
    options={"values": ("routed", "hashed", "collapsed", "equal")},
    sample=sample_devices,
    edges=(
        {"T": 0, "E": 3, "devices": 2},
        {"T": 4, "E": 1},
        {"T": 6, "E": 4, "K": 2, "devices": 1},
        {"T": 6, "E": 5, "K": 3, "devices": 4, "values": "equal"},
    ),
    terms=device_terms,
    vjp="refimpl.moe.losses_device_balance:device_balance_loss_vjp",
)
def device_balance_loss(scores: FloatArray, selected: IntArray, /, *, device_of: IntArray) -> float:
    """Return ``Σ_d f'_d P'_d``: of each device the mean f of its experts, and the sum of their P.

    Parameters
    ----------
    scores, selected
        As for `expert_balance_loss`.
    device_of : ndarray of int, shape (N,)
        The device of each routed expert; any whole numbers.

    Returns
    -------
    float
        1 if the devices are balanced, even where their experts are not.  The coefficient α2 is the caller's.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `balance_loss`; also if `device_of` is not one whole number an expert.

    Notes
    -----
    **Special cases**: with one expert a device it is `expert_balance_loss`, with all experts on one device
    ``Σ_i P_i``, which is 1 for a softmax.  Without tokens it is 0.

    References
    ----------
    .. [1] Dai et al., 2024, arXiv:2401.06066, eq. 15 to 17.

    Examples
    --------
    >>> device_balance_loss(np.eye(2), np.array([[0], [0]]), device_of=np.array([5, 5]))
    1.0
    """
    return _by_device(scores, selected, device_of).loss()


def device_balance_loss_vjp(
    scores: FloatArray, selected: IntArray, dloss: float, /, *, device_of: IntArray
) -> ProbabilityGradient:
    """Return the gradient of `device_balance_loss` with respect to the scores.

    Parameters
    ----------
    scores, selected, device_of
        As for `device_balance_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    ProbabilityGradient
        In the dtype of the scores.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `device_balance_loss`.

    Examples
    --------
    >>> one = np.full((1, 2), 0.5)
    >>> device_balance_loss_vjp(one, np.array([[1]]), 1.0, device_of=np.array([0, 0])).dprobabilities
    array([[1., 1.]])
    """
    return _by_device(scores, selected, device_of).gradient(dloss)


def _by_expert(scores: FloatArray, selected: IntArray) -> Balance:
    given, chosen = assignment(scores, selected)
    experts = given.shape[1]
    counts = np.bincount(chosen.reshape(-1), minlength=experts)
    return Balance(given, experts * counts / max(chosen.size, 1))


def _by_device(scores: FloatArray, selected: IntArray, device_of: IntArray) -> Balance:
    given, f = _by_expert(scores, selected)
    index, devices = placement(device_of, len(f))
    means = np.bincount(index, f, devices) / np.bincount(index, minlength=devices)
    return Balance(given, means[index])


def placement(device_of: IntArray, experts: int) -> tuple[IntArray, int]:
    """Return the device of each expert, numbered from 0, and how many there are.

    Raises
    ------
    ShapeError, DTypeError
        If it is not one whole number an expert.

    Examples
    --------
    >>> placement(np.array([7, 3, 7]), 3)
    (array([1, 0, 1]), 2)
    """
    array = as_array("device_of", device_of)
    if array.shape != (experts,):
        raise ShapeError(f"device_of: expected shape ({experts},), one device an expert; got {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"device_of: expected whole numbers, got {array.dtype}")
    known, index = np.unique(array, return_inverse=True)
    return index.reshape(-1), len(known)
