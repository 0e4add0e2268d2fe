"""Auxiliary loss of GShard and Switch: share of tokens times mean probability, summed over experts.

>>> round(balance_loss(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([[0], [0]])), 12)
1.7
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.moe.losses_importance import wide
from refimpl.moe.losses_samples import device_terms, sample_assignment
from refimpl.numerics import BoolArray, FloatArray, IntArray, round_to
from refimpl.registry import Source, technique
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = [
    "Normalization",
    "ProbabilityGradient",
    "assignment",
    "balance_loss",
    "balance_loss_vjp",
    "counted_tokens",
]

Normalization = Literal["switch", "gshard", "flaxformer"]
NORMALIZATIONS = ("switch", "gshard", "flaxformer")


class ProbabilityGradient(NamedTuple):
    """Gradient of the probabilities, shape (T, E); assignments have none."""

    dprobabilities: FloatArray


@technique(
    "moe.balance_loss",
    entries=(51,),
    kind="function",
    source=Source("Fedus et al. 2021", "arXiv:2101.03961", "section 2.2, eq. 4 to 6"),
    axes={"T": (0, 5), "E": (1, 6), "K": (1, 3), "groups": (1, 3)},
    options={
        "values": ("routed", "hashed", "collapsed", "equal"),
        "normalization": NORMALIZATIONS,
        "padded": (False, True),
    },
    sample=sample_assignment,
    edges=(
        {"T": 0, "E": 4, "groups": 2},
        {"T": 3, "E": 1},
        {"T": 1, "E": 5, "padded": True},
        {"T": 5, "E": 4, "values": "equal", "normalization": "flaxformer", "K": 2},
        {"T": 5, "E": 4, "values": "collapsed", "K": 1},
        {"T": 4, "E": 3, "groups": 3, "padded": True},
    ),
    terms=device_terms,
    vjp="refimpl.moe.losses_balance:balance_loss_vjp",
)
def balance_loss(
    probabilities: FloatArray,
    selected: IntArray,
    /,
    *,
    normalization: Normalization = "switch",
    groups: int = 1,
    counted: BoolArray | None = None,
) -> float:
    """Return ``E Σ_e f_e P_e``: f the share of tokens that go to expert e, P its mean probability.

    Parameters
    ----------
    probabilities : ndarray of float, shape (T, E)
        Softmax of the router over all experts.
    selected : ndarray of int, shape (T, K)
        The experts of each token before capacity, different ones, the most probable first.
    normalization : {"switch", "gshard", "flaxformer"}
        "switch": f counts first choices.  "gshard": the same as Algorithm 1 prints it, ``1/E Σ f_e P_e``,
        smaller by E²; lingvo's and V-MoE's code multiply by E² and so agree with "switch".  "flaxformer": f
        counts all K choices, as Mixtral's does in transformers: balance then gives K, not 1.
    groups : int
        Routing groups of T / groups consecutive tokens, whose losses are averaged.
    counted : ndarray of bool, shape (T,), optional
        False for padding, which is then in neither mean.  Default: all tokens.

    Returns
    -------
    float
        The coefficient, 0.01 in Switch, is the caller's (`loss_coefficients`).

    Raises
    ------
    ShapeError
        If shapes do not fit, or `groups` does not divide T.
    DTypeError
        If `probabilities` are not real, `selected` not whole or `counted` not true and false.
    OptionError
        If an expert does not exist or is selected twice by a token, or an option is unknown.

    Notes
    -----
    f has no gradient: it flows through P alone.

    **Special cases**: a group without a counted token has loss 0.  Uniform probabilities give 1 whatever is
    selected, and everything on one expert gives E; yet the loss can be below 1, if the tokens of a popular
    expert are torn and others are sure: (0.51, 0.49) three times and (0, 1) twice give 0.9224.

    References
    ----------
    .. [1] Fedus et al., 2021, arXiv:2101.03961, eq. 4 to 6.
    .. [2] Lepikhin et al., 2020, arXiv:2006.16668, Algorithm 1, line 13.
    .. [3] google/flaxformer, ``architectures/moe/routing.py``, ``_load_balancing_loss``.

    Examples
    --------
    >>> p = np.array([[0.51, 0.49]] * 3 + [[0.0, 1.0]] * 2)
    >>> round(balance_loss(p, np.array([[0], [0], [0], [1], [1]])), 4)
    0.9224
    """
    given, shares, size = _shares(probabilities, selected, normalization, groups, counted)
    return float(np.sum(shares * wide(given), dtype=np.float64) * size)


def balance_loss_vjp(
    probabilities: FloatArray,
    selected: IntArray,
    dloss: float,
    /,
    *,
    normalization: Normalization = "switch",
    groups: int = 1,
    counted: BoolArray | None = None,
) -> ProbabilityGradient:
    """Return the gradient of `balance_loss` with respect to the probabilities: f over the number of tokens.

    Parameters
    ----------
    probabilities, selected, normalization, groups, counted
        As for `balance_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    ProbabilityGradient
        In the dtype of the probabilities.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `balance_loss`.

    Examples
    --------
    >>> balance_loss_vjp(np.full((2, 2), 0.5), np.array([[0], [0]]), 1.0).dprobabilities
    array([[1., 0.],
           [1., 0.]])
    """
    given, shares, size = _shares(probabilities, selected, normalization, groups, counted)
    return ProbabilityGradient(round_to(float(dloss) * size * shares, given.dtype))


def _shares(
    probabilities: FloatArray,
    selected: IntArray,
    normalization: Normalization,
    groups: int,
    counted: BoolArray | None,
) -> tuple[FloatArray, FloatArray, float]:
    """Return the probabilities, what each of them is multiplied by, and a factor on the whole."""
    if normalization not in NORMALIZATIONS:
        raise OptionError(
            f"normalization: expected one of {', '.join(NORMALIZATIONS)}; got {normalization!r}"
        )
    given, chosen = assignment(probabilities, selected)
    T, E = given.shape
    if whole("groups", groups) > 1 and T % groups:
        raise ShapeError(f"groups: must divide the tokens; got groups={groups}, T={T}")
    if normalization != "flaxformer":
        chosen = chosen[:, :1]
    here = counted_tokens(counted, T).reshape(groups, -1)
    hits = np.zeros((T, E))
    np.put_along_axis(hits, chosen, 1.0, axis=1)
    tokens = np.maximum(here.sum(axis=1), 1)[:, None, None]
    f = np.sum(hits.reshape(groups, -1, E), axis=1, keepdims=True, where=here[:, :, None]) / tokens
    shares = np.where(here[:, :, None], f / tokens, 0.0) / groups
    shares = shares.reshape(T, E).astype(wide(given).dtype)
    return given, shares, 1 / E if normalization == "gshard" else float(E)


def assignment(probabilities: FloatArray, selected: IntArray) -> tuple[FloatArray, IntArray]:
    """Return probabilities and the different experts that each token selects, as arrays that fit together.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `balance_loss`.

    Examples
    --------
    >>> assignment([[0.5, 0.5]], [[1]])[1]
    array([[1]])
    """
    (given,) = floating(probabilities=probabilities)
    chosen = as_array("selected", selected)
    sizes = bind_axes({"probabilities": (given, "T E"), "selected": (chosen, "T K")})
    if not (sizes["E"] and sizes["K"]):
        raise ShapeError(
            f"selected: expected at least 1 expert and 1 choice; got E={sizes['E']}, K={sizes['K']}"
        )
    if not np.issubdtype(chosen.dtype, np.integer):
        raise DTypeError(f"selected: expected whole numbers, got {chosen.dtype}")
    if np.any((chosen < 0) | (chosen >= sizes["E"])):
        raise OptionError(
            f"selected: expected experts in [0, {sizes['E']}), got {chosen.min()} to {chosen.max()}"
        )
    ordered = np.sort(chosen, axis=1)
    if np.any(ordered[:, 1:] == ordered[:, :-1]):
        raise OptionError("selected: a token selects an expert twice; expected different ones")
    return given, chosen


def counted_tokens(counted: BoolArray | None, tokens: int) -> BoolArray:
    """Return which tokens count, all if None.

    Raises
    ------
    ShapeError, DTypeError
        If it is not one truth value a token.

    Examples
    --------
    >>> counted_tokens(None, 2)
    array([ True,  True])
    """
    if counted is None:
        return np.ones(tokens, bool)
    array = as_array("counted", counted)
    if array.shape != (tokens,):
        raise ShapeError(f"counted: expected shape ({tokens},), got {array.shape}")
    if array.dtype != np.bool_:
        raise DTypeError(f"counted: expected true and false, got {array.dtype}")
    return array
