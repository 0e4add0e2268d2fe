"""Mutual information of experts with tokens or with tasks, negated: low where each has experts of its own.

>>> one_hot = 1e3 * np.eye(4)
>>> round(mutual_information_loss(one_hot), 4)  # -log 4
-1.3863
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError
from refimpl.moe.losses_importance import per_expert, wide
from refimpl.moe.losses_samples import logit_terms, sample_logits, sample_tasks
from refimpl.moe.losses_z import LogitGradient, logsumexp
from refimpl.numerics import FloatArray, IntArray, round_to
from refimpl.registry import Source, technique
from refimpl.validation import as_array, bind_axes

__all__ = [
    "mutual_information_loss",
    "mutual_information_loss_vjp",
    "task_information_loss",
    "task_information_loss_vjp",
]

Marginal = Literal["exact", "moduleformer"]
TaskWeights = Literal["equal", "frequency"]
EPSILON = 1e-8


class _Gates(NamedTuple):
    """Probabilities and their logarithms, of a softmax."""

    p: FloatArray
    log_p: FloatArray

    def back(self, dp: FloatArray, like: FloatArray) -> LogitGradient:
        """Take a gradient of the probabilities to the logits."""
        dlogits = self.p * (dp - np.sum(self.p * dp, axis=1, keepdims=True))
        return LogitGradient(round_to(dlogits, like.dtype))


def _gates(logits: FloatArray) -> _Gates:
    log_p = wide(logits) - logsumexp(logits)[:, None]
    return _Gates(np.exp(log_p), log_p)


def _xlogx(x: FloatArray) -> FloatArray:
    return np.asarray(x * np.log(np.where(x > 0, x, 1.0)))


@technique(
    "moe.mutual_information_loss",
    entries=(54,),
    kind="function",
    source=Source("Shen et al. 2023", "arXiv:2306.04640", "mutual information loss; released code"),
    axes={"T": (0, 9), "E": (1, 7)},
    options={"values": ("normal", "large", "equal"), "marginal": ("exact", "moduleformer")},
    sample=sample_logits,
    edges=(
        {"T": 0, "E": 4},
        {"T": 3, "E": 1},
        {"T": 1, "E": 5},
        {"T": 6, "E": 4, "values": "large"},
        {"T": 6, "E": 4, "values": "equal"},
    ),
    terms=logit_terms,
    vjp="refimpl.moe.losses_mutual_information:mutual_information_loss_vjp",
)
def mutual_information_loss(logits: FloatArray, /, *, marginal: Marginal = "exact") -> float:
    """Return ``-I(X; E) = Σ_e p̄_e log p̄_e - mean_t Σ_e p_te log p_te`` for p the softmax of each token.

    Parameters
    ----------
    logits : ndarray of float, shape (T, E)
        Scores of the experts.
    marginal : {"exact", "moduleformer"}
        ``p̄ log p̄``, or ``p̄ log(p̄ + 1e-8)`` as in ModuleFormer's code.

    Returns
    -------
    float
        From -log E, if every token is sure and the experts are balanced, to 0, if the gate does not look at
        the token.  The coefficient is the caller's.

    Raises
    ------
    ShapeError, DTypeError
        If `logits` are no real array of two axes with an expert.
    OptionError
        If `marginal` is unknown.

    Notes
    -----
    It rewards what a balance loss does not ask for: that a token is sure of its expert.  The mean over a
    batch stands for the distribution of tokens.  ModuleFormer's code has another branch instead of this
    one: `balance_loss` plus a tenth of `z_loss`.

    **Special cases**: 0 without tokens, and with one token or one expert.

    References
    ----------
    .. [1] Shen et al., 2023, arXiv:2306.04640; IBM/ModuleFormer, ``moduleformer/utils/moe.py``.

    Examples
    --------
    >>> mutual_information_loss(np.zeros((5, 2)))
    0.0
    """
    gates, mean = _with_mean(logits, marginal)
    if not len(gates.p):
        return 0.0
    shifted = mean + (EPSILON if marginal == "moduleformer" else 0.0)
    negative_entropy = np.sum(mean * np.log(np.where(shifted > 0, shifted, 1)), dtype=np.float64)
    conditional = np.sum(gates.p * np.where(gates.p > 0, gates.log_p, 0), dtype=np.float64) / len(gates.p)
    return float(negative_entropy - conditional)


def mutual_information_loss_vjp(
    logits: FloatArray, dloss: float, /, *, marginal: Marginal = "exact"
) -> LogitGradient:
    """Return the gradient of `mutual_information_loss`: through each token's gates and through their mean.

    Parameters
    ----------
    logits, marginal
        As for `mutual_information_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    LogitGradient
        In the dtype of the logits.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `mutual_information_loss`.

    Examples
    --------
    >>> mutual_information_loss_vjp(np.zeros((2, 2)), 1.0).dlogits
    array([[0., 0.],
           [0., 0.]])
    """
    gates, mean = _with_mean(logits, marginal)
    epsilon = EPSILON if marginal == "moduleformer" else 0.0
    shifted = np.where(mean + epsilon > 0, mean + epsilon, 1.0)
    # Terms that are the same for all experts of a token vanish behind the softmax.
    dp = np.log(shifted) + mean / shifted - np.where(gates.p > 0, gates.log_p, 0.0)
    return gates.back(float(dloss) * dp / max(len(gates.p), 1), per_expert("logits", logits))


def _with_mean(logits: FloatArray, marginal: Marginal) -> tuple[_Gates, FloatArray]:
    if marginal not in ("exact", "moduleformer"):
        raise OptionError(f"marginal: expected 'exact' or 'moduleformer', got {marginal!r}")
    gates = _gates(per_expert("logits", logits))
    return gates, np.sum(gates.p, axis=0) / max(len(gates.p), 1)


@technique(
    "moe.mutual_information_loss.tasks",
    entries=(54,),
    kind="function",
    source=Source("Chen et al. 2023", "arXiv:2212.08066", "mutual information of tasks and experts"),
    axes={"T": (0, 9), "E": (1, 6), "tasks": (1, 4)},
    options={"values": ("normal", "large", "equal"), "task_weights": ("equal", "frequency")},
    sample=sample_tasks,
    edges=(
        {"T": 0, "E": 4},
        {"T": 3, "E": 1, "tasks": 2},
        {"T": 6, "E": 5, "tasks": 1},
        {"T": 8, "E": 4, "tasks": 4, "values": "large"},
        {"T": 8, "E": 4, "tasks": 4, "values": "equal"},
    ),
    terms=logit_terms,
    vjp="refimpl.moe.losses_mutual_information:task_information_loss_vjp",
)
def task_information_loss(
    logits: FloatArray, tasks: IntArray, /, *, task_weights: TaskWeights = "equal"
) -> float:
    """Return ``-I(T; E) = -Σ P(T, E) log(P(T, E) / (P(T) P(E)))`` over tasks and experts.

    P(E | T) is the mean gate of the task's tokens.

    Parameters
    ----------
    logits : ndarray of float, shape (T, E)
        Scores of the experts.
    tasks : ndarray of int, shape (T,)
        The task of each token; any whole numbers.
    task_weights : {"equal", "frequency"}
        P(T): the same for every task that occurs, or its share of the tokens.

    Returns
    -------
    float
        From -min(log M, log E) for M tasks to 0, if experts do not depend on the task.  The coefficient,
        0.001 in Mod-Squad, is the caller's.

    Raises
    ------
    ShapeError, DTypeError
        If the shapes do not fit, `logits` are not real or `tasks` not whole.
    OptionError
        If `task_weights` is unknown.

    Notes
    -----
    Mod-Squad sums it over layers.  Unlike balance it lets rare experts stay rare, if they serve a task.

    **Special cases**: 0 without tokens, with one task, and with one expert.

    References
    ----------
    .. [1] Chen et al., 2023, arXiv:2212.08066, mutual information of tasks and experts.

    Examples
    --------
    >>> round(task_information_loss(1e3 * np.eye(2), np.array([7, 8])), 4)  # -log 2
    -0.6931
    """
    _, _, _, joint = _joint(logits, tasks, task_weights)
    of_task, of_expert = joint.sum(axis=1), joint.sum(axis=0)
    return float(np.sum(_xlogx(of_expert)) + np.sum(_xlogx(of_task)) - np.sum(_xlogx(joint)))


def task_information_loss_vjp(
    logits: FloatArray, tasks: IntArray, dloss: float, /, *, task_weights: TaskWeights = "equal"
) -> LogitGradient:
    """Return the gradient of `task_information_loss` with respect to the logits.

    Parameters
    ----------
    logits, tasks, task_weights
        As for `task_information_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    LogitGradient
        In the dtype of the logits.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `task_information_loss`.

    Examples
    --------
    >>> task_information_loss_vjp(np.zeros((2, 2)), np.array([0, 1]), 1.0).dlogits
    array([[0., 0.],
           [0., 0.]])
    """
    gates, index, shares, joint = _joint(logits, tasks, task_weights)
    of_expert = joint.sum(axis=0)
    # Terms that are the same for all experts of a token vanish behind the softmax.
    log_ratio = np.log(np.where(of_expert > 0, of_expert, 1.0)) - np.log(np.where(joint > 0, joint, 1.0))
    dp = float(dloss) * shares[:, None] * log_ratio[index]
    return gates.back(dp, per_expert("logits", logits))


def _joint(
    logits: FloatArray, tasks: Any, task_weights: TaskWeights
) -> tuple[_Gates, IntArray, FloatArray, FloatArray]:
    """Return gates, the number of each token's task, its share of P(T, E), and P(T, E)."""
    if task_weights not in ("equal", "frequency"):
        raise OptionError(f"task_weights: expected 'equal' or 'frequency', got {task_weights!r}")
    given = per_expert("logits", logits)
    ids = as_array("tasks", tasks)
    bind_axes({"logits": (given, "T E"), "tasks": (ids, "T")})
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise DTypeError(f"tasks: expected whole numbers, got {ids.dtype}")
    known, index, counts = np.unique(ids, return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    per_task = len(known) * counts[index] if task_weights == "equal" else np.full(len(ids), len(ids))
    gates, shares = _gates(given), 1 / np.maximum(per_task, 1)
    joint = np.zeros((len(known), given.shape[1]), gates.p.dtype)
    np.add.at(joint, index, shares[:, None].astype(gates.p.dtype) * gates.p)
    return gates, index, shares, joint
