"""MiniLLM: the gradient of a reverse KL, estimated from sequences that the student samples.

``KL(q || p)`` takes its expectation under the student q, so the student settles on modes that it can cover.
`refimpl.distill.reverse_kl` has the exact value and gradient where all sequences can be listed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from refimpl.distill.reverse_kl import log_ratio
from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.objectives.cross_entropy import log_softmax, token_ids
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["Estimator", "minillm_gradient"]

Estimator = Literal["reinforce", "single_step", "length_normalized"]


def sample_paths(rng: np.random.Generator, *, n: int, T: int, V: int, estimator: str, weighted: bool) -> Case:
    """Return a call of `minillm_gradient`.

    Examples
    --------
    >>> shape = dict(n=2, T=3, V=4, estimator="reinforce", weighted=False)
    >>> [a.shape for a in sample_paths(np.random.default_rng(0), **shape).args]
    [(2, 3, 4), (2, 3, 4), (2, 3)]
    """
    student, teacher = rng.standard_normal((2, n, T, V))
    options: dict[str, object] = {"estimator": estimator}
    if weighted:
        options["weights"] = np.exp(rng.standard_normal((n, T)))
    return Case((student, teacher, rng.integers(0, V, (n, T))), options)


@technique(
    "distill.minillm",
    entries=(87,),
    kind="function",
    source=Source("Gu et al. 2023", "arXiv:2306.08543", "eq. 2, 3, 5 and 7"),
    axes={"n": (1, 3), "T": (1, 4), "V": (1, 4)},
    options={"estimator": ("reinforce", "single_step", "length_normalized"), "weighted": (False, True)},
    edges=(
        {"n": 0, "T": 2, "V": 3},
        {"n": 1, "T": 0, "V": 3},
        {"n": 1, "T": 1, "V": 1, "estimator": "reinforce", "weighted": False},
        {"n": 2, "T": 4, "V": 3, "estimator": "length_normalized", "weighted": True},
    ),
    sample=sample_paths,
    terms=lambda case: (
        4 * sum(case.args[0].shape),
        np.full(
            case.args[0].shape,
            4.0 * sum(case.args[0].shape) * np.max(np.abs(case.args[0]), initial=1.0)
            * np.max(case.kwargs.get("weights", np.ones(1)), initial=1.0),
        ),
    ),
)  # fmt: skip
def minillm_gradient(
    student: FloatArray,
    teacher: FloatArray,
    tokens: IntArray,
    /,
    *,
    estimator: Estimator = "single_step",
    weights: FloatArray | None = None,
) -> FloatArray:
    """Return an estimate of the reverse KL's gradient from sampled sequences.

    Parameters
    ----------
    student, teacher : ndarray of float, shape (n, T, V)
        Logits along the sequences: those at [i, t] predict ``tokens[i, t]``.
    tokens : ndarray of int, shape (n, T)
        Sampled from the student, or from a mixture with the teacher (then with `weights`).
    estimator : {"reinforce", "single_step", "length_normalized"}
        ``"reinforce"``: ``-(R_t - 1) ∇ log q(y_t)`` with R_t the sum of ``log p/q`` from t on.
        ``"single_step"``: the part of step t in closed form over the vocabulary, and for the rest
        ``-R_{t+1} ∇ log q(y_t)``.  ``"length_normalized"``: the same with R_{t+1} divided by the number of
        steps that it sums.
    weights : ndarray of float, shape (n, T), optional
        Importance of each step, q / p̃ of the tokens up to it, or of its token alone as the paper
        approximates.  Default 1.

    Returns
    -------
    ndarray of float, shape (n, T, V)
        With respect to the student's logits; its sum over sequences is the estimate, each having share 1 / n.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not of their kinds.
    OptionError
        If a token is no class, or `estimator` unknown.

    Notes
    -----
    The -1 of R_t - 1 changes no expectation.  The first two are unbiased, the third is not: it is what keeps
    long sequences from being given up.

    A token that a top-k filter excludes has a logit of -inf and counts for nothing.

    The released code differs: it averages R_t, the current step included, over the steps from t on, although
    the closed form has that step too; whitens these averages over the batch; weighs them, and not the closed
    form, by q / p̃ of the one token; and adds PPO's clipping and a loss on plain text.

    References
    ----------
    .. [1] Gu et al., 2023, arXiv:2306.08543, section 2.2, eq. 2 to 7.
    .. [2] microsoft/LMOps @7b14bef, minillm/minillm/losses.py, ``_get_advantages_and_returns``, ``ppo_loss``.

    Examples
    --------
    >>> student, teacher = np.zeros((1, 1, 2)), np.log([[[0.75, 0.25]]])
    >>> minillm_gradient(student, teacher, np.array([[0]])).round(6)
    array([[[-0.274653,  0.274653]]])
    """
    student, teacher = floating(student=student, teacher=teacher)
    tokens = token_ids("tokens", tokens)
    size = bind_axes(
        {"student": (student, "n T V"), "teacher": (teacher, "n T V"), "tokens": (tokens, "n T")}
    )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < size["V"]:
        raise OptionError(f"tokens: expected ids in [0, {size['V']}), got {tokens.min()} to {tokens.max()}")
    if estimator not in ("reinforce", "single_step", "length_normalized"):
        raise OptionError(
            f"estimator: expected 'reinforce', 'single_step' or 'length_normalized', got {estimator!r}"
        )
    share: FloatArray = np.ones(tokens.shape)
    if weights is not None:
        (weights,) = floating(weights=weights)
        bind_axes({"tokens": (tokens, "n T"), "weights": (weights, "n T")})
        share = widen(weights)
    if not student.size:
        return np.zeros(student.shape, student.dtype)
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    q = np.exp(log_q)
    score = -q  # ∇ log q(y) = onehot(y) - q
    np.put_along_axis(score, tokens[..., None], np.take_along_axis(score, tokens[..., None], 2) + 1, axis=2)
    ratio = -log_ratio(log_q, log_p)
    reward = np.take_along_axis(ratio, tokens[..., None], axis=2)[..., 0]
    to_go = np.cumsum(reward[:, ::-1], axis=1)[:, ::-1]
    if estimator == "reinforce":
        gradient = -(to_go - 1)[..., None] * score
    else:
        later = to_go - reward
        if estimator == "length_normalized":
            later = later / np.maximum(np.arange(size["T"] - 1, -1, -1), 1)
        single = q * (ratio - np.sum(q * ratio, axis=2, keepdims=True))
        gradient = -single - later[..., None] * score
    return round_to(
        (gradient * share[..., None] / size["n"]).astype(wide_dtype(student.dtype)), student.dtype
    )
