"""DeepSeek-V2's communication balance loss: of the tokens that devices receive, not of the work on them.

>>> p, chosen = np.full((2, 4), 0.25), np.array([[0, 1], [0, 2]])
>>> communication_balance_loss(p, chosen, device_of=np.array([0, 0, 1, 1]), device_limit=2)
0.75
"""

from __future__ import annotations

import numpy as np

from refimpl.moe.losses_balance import ProbabilityGradient, assignment
from refimpl.moe.losses_device_balance import Balance, placement
from refimpl.moe.losses_samples import device_terms, sample_devices
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import Source, technique
from refimpl.validation import whole

__all__ = ["communication_balance_loss", "communication_balance_loss_vjp"]


@technique(
    "moe.device_balance_loss.communication",
    entries=(52,),
    kind="function",
    source=Source("DeepSeek-AI 2024", "arXiv:2405.04434", "section 2.2.3, communication balance loss"),
    axes={"T": (0, 9), "E": (1, 6), "K": (1, 3), "devices": (1, 4), "device_limit": (1, 3)},
    options={"values": ("routed", "hashed", "collapsed", "equal")},
    sample=sample_devices,
    edges=(
        {"T": 0, "E": 3, "devices": 2},
        {"T": 4, "E": 1},
        {"T": 6, "E": 4, "K": 2, "devices": 1, "device_limit": 1},
    ),
    terms=device_terms,
    vjp="refimpl.moe.losses_communication:communication_balance_loss_vjp",
)
def communication_balance_loss(
    scores: FloatArray, selected: IntArray, /, *, device_of: IntArray, device_limit: int
) -> float:
    """Return ``Σ_d f''_d P''_d``, ``f''_d = D/(M T) #{t is sent to d}``: of tokens received, not of work.

    Parameters
    ----------
    scores, selected, device_of
        As for `device_balance_loss`.  D is the number of different devices in `device_of`.
    device_limit : int
        M, to how many devices at most a token goes under device-limited routing.  It only scales the loss:
        whether `selected` keeps to it is the router's concern.

    Returns
    -------
    float
        The coefficient α3 is the caller's.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `device_balance_loss`; also if `device_limit` is below 1.

    Notes
    -----
    A token whose experts lie on one device is sent there once, however many they are.

    **Special cases**: without tokens the loss is 0.

    References
    ----------
    .. [1] DeepSeek-AI, 2024, arXiv:2405.04434, section 2.2.3.

    Examples
    --------
    >>> p = np.full((2, 4), 0.25)
    >>> both = np.array([[0, 1], [0, 1]])
    >>> communication_balance_loss(p, both, device_of=np.array([0, 0, 1, 1]), device_limit=1)
    1.0
    """
    return _by_reception(scores, selected, device_of, device_limit).loss()


def communication_balance_loss_vjp(
    scores: FloatArray, selected: IntArray, dloss: float, /, *, device_of: IntArray, device_limit: int
) -> ProbabilityGradient:
    """Return the gradient of `communication_balance_loss` with respect to the scores.

    Parameters
    ----------
    scores, selected, device_of, device_limit
        As for `communication_balance_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    ProbabilityGradient
        In the dtype of the scores.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `communication_balance_loss`.

    Examples
    --------
    >>> one, device_of = np.full((1, 2), 0.5), np.array([0, 1])
    >>> options = {"device_of": device_of, "device_limit": 1}
    >>> communication_balance_loss_vjp(one, np.array([[1]]), 1.0, **options).dprobabilities
    array([[0., 2.]])
    """
    return _by_reception(scores, selected, device_of, device_limit).gradient(dloss)


def _by_reception(scores: FloatArray, selected: IntArray, device_of: IntArray, device_limit: int) -> Balance:
    given, chosen = assignment(scores, selected)
    index, devices = placement(device_of, given.shape[1])
    device_limit = whole("device_limit", device_limit)
    sent = np.zeros((len(given), devices), bool)
    np.put_along_axis(sent, index[chosen], True, axis=1)
    received = devices * sent.sum(axis=0) / (device_limit * max(len(given), 1))
    return Balance(given, received[index])
