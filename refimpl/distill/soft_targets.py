"""Knowledge distillation: a student learns the teacher's whole distribution, softened, and the labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.objectives.cross_entropy import log_softmax, negative_log_likelihood, token_ids
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, finite, floating, positive

__all__ = ["StudentGradients", "soft_target_loss", "soft_target_loss_vjp"]


class StudentGradients(NamedTuple):
    """Gradient of the student's logits; the teacher has none."""

    student: FloatArray


def sample_classes(rng: np.random.Generator, *, T: int, V: int, values: str, weight: float) -> Case:
    """Return a call of `soft_target_loss`; `values` "same" gives a student that equals its teacher.

    Examples
    --------
    >>> shape = dict(T=2, V=3, values="near", weight=0.5)
    >>> [a.shape for a in sample_classes(np.random.default_rng(0), **shape).args]
    [(2, 3), (2, 3), (2,)]
    """
    size = 300.0 if values == "far" else 1.0
    student, teacher = size * rng.standard_normal((2, T, V))
    if values == "same":
        student = teacher.copy()
    return Case((student, teacher, rng.integers(0, V, T)), {"temperature": 2.0, "weight": weight})


def _terms(case: Case) -> tuple[int, float]:
    student, teacher, _ = case.args
    size = np.abs(student).max(initial=0.0) + np.abs(teacher).max(initial=0.0) + np.log(student.shape[1] + 1)
    return student.size + student.shape[1], 8 * float(size)


@technique(
    "distill.soft_targets",
    entries=(84,),
    kind="function",
    source=Source("Hinton et al. 2015", "arXiv:1503.02531", "section 2"),
    axes={"T": (1, 5), "V": (1, 6)},
    options={"values": ("near", "far", "same"), "weight": (0.0, 0.3, 1.0)},
    edges=(
        {"T": 0, "V": 3},
        {"T": 1, "V": 1, "values": "near", "weight": 0.3},
        {"T": 4, "V": 5, "values": "far", "weight": 0.3},
        {"T": 4, "V": 5, "values": "same", "weight": 1.0},
    ),
    sample=sample_classes,
    terms=_terms,
    vjp="refimpl.distill.soft_targets:soft_target_loss_vjp",
)
def soft_target_loss(
    student: FloatArray,
    teacher: FloatArray,
    labels: IntArray,
    /,
    *,
    temperature: float = 1.0,
    weight: float = 0.5,
) -> float:
    """Return ``(1 - λ) CE(labels, p_s) + λ T² KL(p_t^T || p_s^T)``, the mean over positions.

    Parameters
    ----------
    student, teacher : ndarray of float, shape (N, V)
        Logits over the same vocabulary.
    labels : ndarray of int, shape (N,)
        The right classes.
    temperature : float
        T, > 0: both sets of logits are divided by it before the softmax of the soft term.
    weight : float
        λ, in [0, 1].

    Returns
    -------
    float
        In nats; 0 without positions.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, also if the vocabularies differ, or are not of their kinds.
    OptionError
        If `temperature` is not above 0, `weight` not in [0, 1], or a label is no class.

    Notes
    -----
    The factor T² keeps the size of the soft gradients, ``T (p_s^T - p_t^T)``, as T grows; for large T the
    soft term is ``|z_t - z_s|² / (2 V)`` of the centred logits.  With cross-entropy in place of KL the loss
    is larger by the teacher's entropy and its gradient the same.  TinyBERT's code leaves T² out and averages
    over classes too (`refimpl.distill.prediction_loss`).

    References
    ----------
    .. [1] Hinton et al., 2015, arXiv:1503.02531, section 2.

    Examples
    --------
    >>> student, teacher = np.zeros((1, 2)), np.array([[np.log(3.0), 0.0]])
    >>> round(soft_target_loss(student, teacher, np.array([0]), weight=1.0), 6)
    0.130812
    """
    student, teacher, labels, T, share = _operands(student, teacher, labels, temperature, weight)
    if not len(student):
        return 0.0
    hard = negative_log_likelihood(student, labels).losses
    log_t, log_s = log_softmax(teacher / T), log_softmax(student / T)
    p = np.exp(log_t)
    with np.errstate(invalid="ignore"):  # 0 log 0 = 0: a class without mass counts for nothing
        soft = np.sum(np.where(p > 0, p * (log_t - log_s), 0), axis=1)
    # A part without weight does not count, even where it is infinite.
    parts = [factor * part for factor, part in ((1 - share, hard), (share * T**2, soft)) if factor]
    return float(np.mean(sum(parts)))


def soft_target_loss_vjp(
    student: FloatArray,
    teacher: FloatArray,
    labels: IntArray,
    dloss: float,
    /,
    *,
    temperature: float = 1.0,
    weight: float = 0.5,
) -> StudentGradients:
    """Return the gradient of the student's logits: ``((1 - λ)(p_s - y) + λ T (p_s^T - p_t^T)) / N``.

    Parameters
    ----------
    student, teacher, labels, temperature, weight
        As for `soft_target_loss`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    StudentGradients
        Each row sums to 0.

    Examples
    --------
    >>> student, teacher = np.zeros((1, 2)), np.array([[np.log(3.0), 0.0]])
    >>> soft_target_loss_vjp(student, teacher, np.array([0]), 1.0, weight=1.0).student
    array([[-0.25,  0.25]])
    """
    dtype = floating(student=student, teacher=teacher)[0].dtype
    student, teacher, labels, T, share = _operands(student, teacher, labels, temperature, weight)
    if not len(student):
        return StudentGradients(np.zeros(student.shape, dtype))
    hard = np.exp(negative_log_likelihood(student, labels).log_probabilities)
    hard[np.arange(len(student)), labels] -= 1
    soft = np.exp(log_softmax(student / T)) - np.exp(log_softmax(teacher / T))
    gradient = ((1 - share) * hard + share * T * soft) * (float(dloss) / len(student))
    return StudentGradients(round_to(gradient, dtype))


def _operands(
    student: FloatArray, teacher: FloatArray, labels: IntArray, temperature: float, weight: float
) -> tuple[FloatArray, FloatArray, IntArray, float, float]:
    """Return the arrays, checked and widened, and the two numbers."""
    student, teacher = floating(student=student, teacher=teacher)
    labels = token_ids("labels", labels)
    bind_axes({"student": (student, "N V"), "teacher": (teacher, "N V"), "labels": (labels, "N")})
    share = finite("weight", weight)
    if not 0 <= share <= 1:
        raise OptionError(f"weight: expected a number in [0, 1], got {weight}")
    wide = wide_dtype(student.dtype)
    return (
        widen(student).astype(wide, copy=False), widen(teacher).astype(wide, copy=False), labels,
        positive("temperature", temperature), share,
    )  # fmt: skip
