"""Router z-loss: the mean square of the logits' logsumexp, which keeps logits small.

>>> round(z_loss(np.zeros((3, 4))), 4)  # (log 4)²
1.9218
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.moe.losses_balance import counted_tokens
from refimpl.moe.losses_importance import per_expert, wide
from refimpl.moe.losses_samples import logit_terms, sample_logits
from refimpl.numerics import BoolArray, FloatArray, round_to, widen
from refimpl.registry import Source, technique

__all__ = ["LogitGradient", "logsumexp", "z_loss", "z_loss_vjp"]

Padding = Literal["excluded", "flaxformer"]


class LogitGradient(NamedTuple):
    """Gradient of the logits, shape (T, E)."""

    dlogits: FloatArray


def logsumexp(logits: FloatArray) -> FloatArray:
    """Return ``log Σ_j exp(x_j)`` of each row, the largest logit taken out first.

    Examples
    --------
    >>> logsumexp(np.array([[1000.0, 1000.0], [-np.inf, 0.0]]))
    array([1000.69314718,    0.        ])
    """
    z = wide(logits)
    largest = np.max(z, axis=1)
    return np.asarray(largest + np.log(np.sum(np.exp(z - largest[:, None]), axis=1)))


@technique(
    "moe.z_loss",
    entries=(53,),
    kind="function",
    source=Source("Zoph et al. 2022", "arXiv:2202.08906", "section 3.2, eq. 5"),
    axes={"T": (0, 9), "E": (1, 7)},
    options={
        "values": ("normal", "large", "equal"),
        "padded": (False, True),
        "padding": ("excluded", "flaxformer"),
    },
    sample=sample_logits,
    edges=(
        {"T": 0, "E": 4},
        {"T": 3, "E": 1},
        {"T": 1, "E": 6, "padded": True},
        {"T": 5, "E": 4, "values": "large", "padded": False, "padding": "excluded"},
        {"T": 5, "E": 4, "values": "equal", "padded": True, "padding": "flaxformer"},
    ),
    terms=logit_terms,
    vjp="refimpl.moe.losses_z:z_loss_vjp",
)
def z_loss(
    logits: FloatArray, /, *, counted: BoolArray | None = None, padding: Padding = "excluded"
) -> float:
    """Return the mean over tokens of ``(log Σ_j exp(x_j))²``.

    Parameters
    ----------
    logits : ndarray of float, shape (T, E)
        Scores of the experts before any softmax.  -inf excludes an expert of a token, but not all of them.
    counted : ndarray of bool, shape (T,), optional
        False for padding.  Default: all tokens.
    padding : {"excluded", "flaxformer"}
        What padding does: nothing, the mean being over the counted tokens; or, as in flaxformer, whose router
        multiplies logits by the mask, every token of it adds ``(log E)²`` and counts in the mean.

    Returns
    -------
    float
        The coefficient, 0.001 in ST-MoE, is the caller's.

    Raises
    ------
    ShapeError, DTypeError
        If the shapes do not fit, or an array has another type.
    OptionError
        If `padding` is unknown.

    Notes
    -----
    The loss depends on what a softmax does not see, a number added to all logits, and is smallest where
    that makes the logsumexp 0.  Mesh TensorFlow divides by the number of micro-batches too.

    **Special cases**: without a counted token the loss is 0; with one expert it is the mean square logit.

    References
    ----------
    .. [1] Zoph et al., 2022, arXiv:2202.08906, eq. 5.
    .. [2] google/flaxformer, ``architectures/moe/routing.py``, ``_router_z_loss``.

    Examples
    --------
    >>> z_loss(np.array([[3.0], [5.0]]), counted=np.array([True, False]))
    9.0
    """
    given, weights = _weights(logits, counted, padding)
    return float(np.sum(np.square(logsumexp(given)) * weights, dtype=np.float64))


def z_loss_vjp(
    logits: FloatArray,
    dloss: float,
    /,
    *,
    counted: BoolArray | None = None,
    padding: Padding = "excluded",
) -> LogitGradient:
    """Return the gradient of `z_loss`: ``2 logsumexp softmax / T``.

    Parameters
    ----------
    logits, counted, padding
        As for `z_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    LogitGradient
        In the dtype of the logits; 0 for padding.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `z_loss`.

    Examples
    --------
    >>> z_loss_vjp(np.array([[3.0], [5.0]]), 1.0).dlogits
    array([[3.],
           [5.]])
    """
    given, weights = _weights(logits, counted, padding)
    lse = logsumexp(given)
    softmax = np.exp(wide(given) - lse[:, None])
    each = 2 * float(dloss) * lse * weights * counted_tokens(counted, len(given))
    return LogitGradient(round_to(each[:, None] * softmax, per_expert("logits", logits).dtype))


def _weights(
    logits: FloatArray, counted: BoolArray | None, padding: Padding
) -> tuple[FloatArray, FloatArray]:
    """Return the logits, 0 where padding counts as such, and the weight of each token in the mean."""
    if padding not in ("excluded", "flaxformer"):
        raise OptionError(f"padding: expected 'excluded' or 'flaxformer', got {padding!r}")
    given = per_expert("logits", logits)
    here = counted_tokens(counted, len(given))
    if padding == "flaxformer":
        zeroed = np.where(here[:, None], widen(given), 0)
        return zeroed, np.full(len(given), 1 / max(len(given), 1))
    return given, here / max(int(here.sum()), 1)
