"""DeepSeek-V3's router: sigmoid scores, a bias that balances experts without a loss, few nodes for a token.

What is chosen and what it weighs are two things here: the bias moves choices and never a weight, so that no
gradient has to balance the load.  Experts stand in groups, one for each node, and a token enters few of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import OptionError
from refimpl.moe.routing import top_k_indices
from refimpl.numerics import BoolArray, FloatArray, IntArray, wide_dtype, widen
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import bind_axes, floating, positive, whole

__all__ = ["BiasedGradients", "deepseek_v3", "deepseek_v3_vjp", "gates_by_masks"]

PAPER = Source("DeepSeek-AI 2024 (DeepSeek-V3)", "arXiv:2412.19437", "section 2.1.2, eq. 13 to 16")


class BiasedGradients(NamedTuple):
    """Gradients of logits and bias; the latter is 0, for a bias only chooses."""

    dlogits: FloatArray
    dbias: FloatArray


def _sample(
    rng: np.random.Generator, *, T: int, groups: int, size: int, top: int, k: int, values: str, chosen_by: str
) -> Case:
    """Return logits and a bias whose scores are so far apart that a small step changes no choice."""
    top = min(top, groups)
    k = min(k, top * size)
    options = {"k": k, "groups": groups, "top_groups": top, "scale": 2.5}
    while True:
        logits = {"normal": 1.0, "large": 300.0}[values] * rng.standard_normal((T, groups * size))
        bias = rng.standard_normal(groups * size) * {"scores": 0.0, "both": 0.4}[chosen_by]
        if values == "large":  # scores of 0 and 1, which a bias tells apart
            bias = rng.permutation(groups * size) / 37
        scores = 1 / (1 + np.exp(-np.clip(logits, -700, 700))) + bias
        inside = np.sort(scores.reshape(T, groups, size), axis=2)
        distances = [
            np.diff(np.sort(inside[..., -each:].sum(axis=2), axis=1)) for each in (2, max(1, k // top))
        ]
        distances.append(np.diff(np.sort(scores, axis=1)))
        if min(float(np.min(gap, initial=1.0)) for gap in distances) > 1e-5:
            return Case((logits, bias), options)


def _terms(case: Case) -> tuple[int, Any]:
    logits = case.args[0]
    return logits.shape[1] + 8, np.full(logits.shape, case.kwargs["scale"])


@technique(
    "moe.deepseek_v3",
    entries=(34,),
    kind="function",
    source=PAPER,
    axes={"T": (0, 6), "groups": (1, 4), "size": (1, 4), "top": (1, 3), "k": (1, 6)},
    options={"values": ("normal", "large"), "chosen_by": ("both", "scores")},
    edges=(
        {"T": 0, "groups": 2, "size": 2, "top": 1, "k": 2},
        {"T": 3, "groups": 1, "size": 1, "top": 1, "k": 1},
        {"T": 5, "groups": 1, "size": 6, "top": 1, "k": 3, "values": "normal"},  # no groups
        {"T": 5, "groups": 4, "size": 1, "top": 2, "k": 2, "values": "normal"},  # a group is an expert
        {"T": 5, "groups": 3, "size": 3, "top": 2, "k": 6, "chosen_by": "both"},  # all of two groups
        {"T": 6, "groups": 4, "size": 4, "top": 2, "k": 6, "chosen_by": "both", "values": "normal"},
        {"T": 6, "groups": 4, "size": 3, "top": 2, "k": 3, "values": "large"},
    ),
    sample=_sample,
    terms=_terms,
    vjp="refimpl.moe.deepseek_v3:deepseek_v3_vjp",
)
def deepseek_v3(
    logits: FloatArray,
    bias: FloatArray,
    /,
    *,
    k: int,
    groups: int = 1,
    top_groups: int = 1,
    per_group: int = 2,
    scale: float = 1.0,
) -> FloatArray:
    """Return the gates of all experts, all but those of the k chosen ones 0.

    Parameters
    ----------
    logits : ndarray of float, shape (T, E)
        What the router says of the routed experts; shared experts have no gate.
    bias : ndarray of float, shape (E,)
        Added to the scores ``σ(logits)`` for the choice alone; see `refimpl.moe.balanced_bias`.
    k : int
        Experts a token.
    groups, top_groups : int
        Groups of consecutive experts, and of how many of them a token may take its experts.  One group is no
        limit.  DeepSeek-V3 has 8 of 32 experts and lets 4.
    per_group : int
        A group is judged by the sum of so many of its best biased scores.  The released code has 2, the paper
        ``k / top_groups``: both are 2 in DeepSeek-V3.  Groups of fewer experts are judged by all.
    scale : float
        What the gates of a token sum to, 2.5 in DeepSeek-V3: its "routed scaling factor".

    Returns
    -------
    ndarray of float, shape (T, E)
        In the wide dtype of the logits.

    Raises
    ------
    OptionError
        If `groups` does not divide E, `top_groups` exceeds it, the taken groups have fewer than k experts, or
        `scale` is not above 0.
    ShapeError, DTypeError
        If `logits` is no real matrix, or `bias` has not a number for each expert.

    Notes
    -----
    Gates are ``scale s_i / Σ s_j`` over chosen experts, computed as the softmax of ``log σ(logits)``: the
    released code divides by the sum, plus 1e-20 in transformers, and is 0 or NaN where all scores vanish.

    **Special cases**

    - Experts outside the taken groups are never chosen.  Early released code set their scores to 0 instead,
      which are chosen before negative ones: biased scores may be negative.
    - Ties go to the lowest index, of groups and of experts.
    - With one group, no bias and `scale` 1 the experts are those of `top_k_gates`, with other weights.

    References
    ----------
    .. [1] DeepSeek-AI, 2024, arXiv:2412.19437, section 2.1.2: eq. 13 to 15, eq. 16 for the bias, and
       "Node-Limited Routing".
    .. [2] github.com/deepseek-ai/DeepSeek-V3, inference/model.py, ``Gate``.

    Examples
    --------
    >>> logits, bias = np.log([[3.0, 1.0, 1 / 3, 1 / 9]]), np.array([0.0, 0.0, 0.4, 0.0])
    >>> deepseek_v3(logits, 0 * bias, k=2)
    array([[0.6, 0.4, 0. , 0. ]])
    >>> deepseek_v3(logits, bias, k=2)
    array([[0.75, 0.  , 0.25, 0.  ]])
    >>> deepseek_v3(logits, bias, k=2, groups=2)
    array([[0.6, 0.4, 0. , 0. ]])
    """
    wide, expert = _chosen(logits, bias, k, groups, top_groups, per_group)
    gates = np.zeros_like(wide)
    kept = _log_sigmoid(np.take_along_axis(wide, expert, axis=1))
    np.put_along_axis(gates, expert, softmax(kept) * wide.dtype.type(positive("scale", scale)), axis=1)
    return gates


def deepseek_v3_vjp(
    logits: FloatArray,
    bias: FloatArray,
    dgates: FloatArray,
    /,
    *,
    k: int,
    groups: int = 1,
    top_groups: int = 1,
    per_group: int = 2,
    scale: float = 1.0,
) -> BiasedGradients:
    """Return the gradients of ``sum(dgates * deepseek_v3(logits, bias, ...))``, through kept gates only.

    Parameters
    ----------
    logits, bias, k, groups, top_groups, per_group, scale
        As for `deepseek_v3`.
    dgates : ndarray of float, shape (T, E)
        Gradient of the gates; that of an expert which is not chosen is not looked at.

    Returns
    -------
    BiasedGradients
        In the dtype of the gates.

    Examples
    --------
    >>> zero = np.zeros((1, 3))
    >>> deepseek_v3_vjp(zero, zero[0], np.array([[4.0, 0.0, 9.0]]), k=2).dlogits
    array([[ 0.5, -0.5,  0. ]])
    """
    wide, expert = _chosen(logits, bias, k, groups, top_groups, per_group)
    (dgates,) = floating(dgates=dgates)
    bind_axes({"logits": (wide, "T E"), "dgates": (dgates, "T E")})
    chosen = np.take_along_axis(wide, expert, axis=1)
    share = softmax(_log_sigmoid(chosen))
    dkept = np.take_along_axis(widen(dgates).astype(wide.dtype, copy=False), expert, axis=1)
    dkept = dkept * wide.dtype.type(positive("scale", scale))
    dscores = share * (dkept - np.sum(share * dkept, axis=1, keepdims=True))
    dlogits = np.zeros_like(wide)
    # The derivative of log σ(z) is σ(-z).
    np.put_along_axis(dlogits, expert, dscores * np.exp(_log_sigmoid(-chosen)), axis=1)
    return BiasedGradients(dlogits, np.zeros(wide.shape[1], wide.dtype))


@implements("moe.deepseek_v3", backend="numpy")
def gates_by_masks(
    logits: FloatArray,
    bias: FloatArray,
    /,
    *,
    k: int,
    groups: int = 1,
    top_groups: int = 1,
    per_group: int = 2,
    scale: float = 1.0,
) -> FloatArray:
    """Return `deepseek_v3` without an index: every choice is a count of what beats it.

    Examples
    --------
    >>> gates_by_masks(np.zeros((1, 4)), np.arange(4.0), k=2, groups=2)
    array([[0. , 0. , 0.5, 0.5]])
    """
    wide, offset = _checked(logits, bias, k, groups, top_groups)
    scores = np.exp(_log_sigmoid(wide)) + offset
    T, E = scores.shape
    inside = scores.reshape(T, groups, E // groups)
    counted = np.where(_among_best(inside, whole("per_group", per_group)), inside, 0).sum(axis=2)
    open_groups = _among_best(counted, top_groups)
    allowed = np.repeat(open_groups, E // groups, axis=1)
    kept = _among_best(np.where(allowed, scores, -np.inf), k)
    logs = np.where(kept, _log_sigmoid(wide), -np.inf)
    powers = np.exp(logs - logs.max(axis=1, keepdims=True, initial=-np.inf, where=kept))
    total = powers.sum(axis=1, keepdims=True)
    return np.asarray(powers / total * wide.dtype.type(positive("scale", scale)))


def _among_best(scores: FloatArray, count: int) -> BoolArray:
    """Return which scores are beaten by fewer than `count` others of their row, by a lower index in a tie."""
    one, other = scores[..., :, None], scores[..., None, :]
    earlier = np.tri(scores.shape[-1], k=-1, dtype=bool)
    beaten: BoolArray = ((other > one) | ((other == one) & earlier)).sum(axis=-1) < count
    return beaten


def _log_sigmoid(z: FloatArray) -> FloatArray:
    """Return ``log(1 / (1 + exp(-z)))``, which overflows nowhere."""
    return np.asarray(np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z))))


def _checked(
    logits: FloatArray, bias: FloatArray, k: int, groups: int, top_groups: int
) -> tuple[FloatArray, FloatArray]:
    """Return logits and bias in the wide dtype of the logits."""
    (logits,), (bias,) = floating(logits=logits), floating(bias=bias)  # each of a dtype of its own
    experts = bind_axes({"logits": (logits, "T E"), "bias": (bias, "E")})["E"]
    if experts % whole("groups", groups):
        raise OptionError(f"groups: expected a divisor of the {experts} experts, got {groups}")
    if whole("top_groups", top_groups) > groups:
        raise OptionError(f"top_groups: expected at most {groups}, the number of groups, got {top_groups}")
    room = top_groups * (experts // groups)
    if whole("k", k) > room:
        raise OptionError(
            f"k: expected at most {room}, the experts of {top_groups} of {groups} groups, got {k}"
        )
    dtype = wide_dtype(logits.dtype)
    return widen(logits).astype(dtype, copy=False), widen(bias).astype(dtype, copy=False)


def _chosen(
    logits: FloatArray, bias: FloatArray, k: int, groups: int, top_groups: int, per_group: int
) -> tuple[FloatArray, IntArray]:
    """Return wide logits and the chosen experts of each token, shape (T, k)."""
    wide, offset = _checked(logits, bias, k, groups, top_groups)
    scores = np.exp(_log_sigmoid(wide)) + offset
    (T, E), each = scores.shape, min(whole("per_group", per_group), scores.shape[1] // groups)
    inside = np.sort(scores.reshape(T, groups, E // groups), axis=2)
    taken = top_k_indices(inside[..., E // groups - each :].sum(axis=2), top_groups)
    allowed = np.zeros((T, groups), bool)
    np.put_along_axis(allowed, taken, True, axis=1)
    limited = np.where(np.repeat(allowed, E // groups, axis=1), scores, -np.inf)
    return wide, top_k_indices(limited, k)
