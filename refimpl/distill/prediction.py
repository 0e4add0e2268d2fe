"""TinyBERT's prediction layer: the cross-entropy of a student's softened classes under its teacher's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.distill.tinybert import Convention, known_convention
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.objectives.cross_entropy import log_softmax
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, positive

__all__ = ["PredictionGradients", "prediction_loss", "prediction_loss_vjp"]


class PredictionGradients(NamedTuple):
    """Gradient of the student's logits; the teacher has none."""

    student: FloatArray


def sample_prediction(rng: np.random.Generator, *, N: int, V: int, convention: str) -> Case:
    """Return a call of `prediction_loss`.

    Examples
    --------
    >>> sample_prediction(np.random.default_rng(0), N=2, V=3, convention="paper").kwargs
    {'temperature': 1.5, 'convention': 'paper'}
    """
    return Case(tuple(rng.standard_normal((2, N, V))), {"temperature": 1.5, "convention": convention})


def _prediction_terms(case: Case) -> tuple[int, float]:
    student = case.args[0]
    return student.size + student.shape[1], 4 * float(np.abs(student).max(initial=0.0)) + 4


@technique(
    "distill.tinybert.prediction",
    entries=(85,),
    kind="function",
    source=Source("Jiao et al. 2020", "arXiv:1909.10351", "eq. 10"),
    axes={"N": (1, 4), "V": (1, 5)},
    options={"convention": ("paper", "released")},
    edges=({"N": 0, "convention": "paper"}, {"N": 1, "V": 1}, {"N": 3, "V": 4, "convention": "released"}),
    sample=sample_prediction,
    terms=_prediction_terms,
    vjp="refimpl.distill.prediction:prediction_loss_vjp",
)
def prediction_loss(
    student: FloatArray,
    teacher: FloatArray,
    /,
    *,
    temperature: float = 1.0,
    convention: Convention = "paper",
) -> float:
    """Return the cross-entropy of the student's distribution under the teacher's, both softened.

    Parameters
    ----------
    student, teacher : ndarray of float, shape (N, V)
        Logits.
    temperature : float
        Divides both, > 0; the paper finds 1 best.  There is no factor T².
    convention : {"paper", "released"}
        Mean over examples, or over examples and classes: smaller by V.

    Returns
    -------
    float
        In nats; 0 without examples.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit or are not real, or an option is out of range.

    References
    ----------
    .. [1] Jiao et al., 2020, arXiv:1909.10351, eq. 10; task_distill.py, ``soft_cross_entropy``.

    Examples
    --------
    >>> zeros = np.zeros((1, 4))
    >>> [round(prediction_loss(zeros, zeros, convention=name), 4) for name in ("paper", "released")]
    [1.3863, 0.3466]
    """
    _, s, t, count = _prediction(student, teacher, temperature, convention)
    if not s.size:
        return 0.0
    return float(-np.sum(np.exp(log_softmax(t)) * log_softmax(s))) / count


def prediction_loss_vjp(
    student: FloatArray,
    teacher: FloatArray,
    dloss: float,
    /,
    *,
    temperature: float = 1.0,
    convention: Convention = "paper",
) -> PredictionGradients:
    """Return the gradient of the student's logits: ``(p_s - p_t) / T``, averaged as the loss is.

    Examples
    --------
    >>> prediction_loss_vjp(np.zeros((1, 2)), np.array([[np.log(3.0), 0.0]]), 1.0).student
    array([[-0.25,  0.25]])
    """
    dtype, s, t, count = _prediction(student, teacher, temperature, convention)
    gap = np.exp(log_softmax(s)) - np.exp(log_softmax(t)) if s.size else s
    return PredictionGradients(round_to(gap * (float(dloss) / (count * temperature)), dtype))


def _prediction(
    student: FloatArray, teacher: FloatArray, temperature: float, convention: Convention
) -> tuple[np.dtype[np.floating], FloatArray, FloatArray, int]:
    """Return the dtype, both sets of softened logits, and what the sum is divided by."""
    student, teacher = floating(student=student, teacher=teacher)
    size = bind_axes({"student": (student, "N V"), "teacher": (teacher, "N V")})
    positive("temperature", temperature)
    known_convention(convention)
    wide = wide_dtype(student.dtype)
    s, t = (widen(x).astype(wide, copy=False) / wide.type(temperature) for x in (student, teacher))
    return student.dtype, s, t, max(size["N"], 1) * (size["V"] if convention == "released" else 1)
