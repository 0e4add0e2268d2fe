"""The reverse KL between the distributions of whole sequences, exactly: by enumeration of all prefixes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to
from refimpl.objectives.cross_entropy import log_softmax
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = [
    "TreeGradients",
    "log_ratio",
    "prefix_rows",
    "reverse_kl",
    "reverse_kl_vjp",
    "sequence_probabilities",
]


class TreeGradients(NamedTuple):
    """Gradient of the student's logits; the teacher has none."""

    student: FloatArray


def prefix_rows(V: int, steps: int) -> int:
    """Return how many prefixes shorter than `steps` there are: ``1 + V + ... + V**(steps - 1)``.

    Examples
    --------
    >>> prefix_rows(3, 3)
    13
    """
    return sum(V**t for t in range(steps))


def sample_tree(rng: np.random.Generator, *, V: int, steps: int, values: str) -> Case:
    """Return a call of `reverse_kl`: logits after every prefix, of student and teacher.

    Examples
    --------
    >>> [a.shape for a in sample_tree(np.random.default_rng(0), V=2, steps=3, values="random").args]
    [(7, 2), (7, 2)]
    """
    student, teacher = rng.standard_normal((2, prefix_rows(V, steps), V))
    return Case((teacher.copy() if values == "same" else student, teacher))


@technique(
    "distill.minillm.reverse_kl",
    entries=(87,),
    kind="function",
    source=Source("Gu et al. 2023", "arXiv:2306.08543", "eq. 1, the reverse KL"),
    axes={"V": (1, 3), "steps": (1, 3)},
    options={"values": ("random", "same")},
    edges=({"V": 3, "steps": 0}, {"V": 1, "steps": 1}, {"V": 3, "steps": 3, "values": "same"}),
    sample=sample_tree,
    terms=lambda case: (case.args[0].size + 8, 4 * float(np.abs(case.args[0]).max(initial=1.0)) * 4),
    vjp="refimpl.distill.reverse_kl:reverse_kl_vjp",
)
def reverse_kl(student: FloatArray, teacher: FloatArray, /) -> float:
    """Return ``KL(q || p)`` between the distributions of all sequences, by enumeration.

    Parameters
    ----------
    student, teacher : ndarray of float, shape (1 + V + ... + V**(steps-1), V)
        Logits of the next token after every prefix: the empty one, then those of one token, and so on, each
        length in the order of base-V numbers.

    Returns
    -------
    float
        In nats, >= 0; 0 only if both agree after every prefix that the student reaches.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, are not real, have no such number of rows, or no column.

    Notes
    -----
    The forward KL, under the teacher, covers all modes; this one seeks one.  A token that the student never
    takes, with a logit of -inf as top-k filters leave it, counts for nothing.

    References
    ----------
    .. [1] Gu et al., 2023, arXiv:2306.08543, section 2.1, eq. 1.

    Examples
    --------
    >>> round(reverse_kl(np.array([[0.0, 0.0]]), np.array([[np.log(3.0), 0.0]])), 6)
    0.143841
    """
    _, log_q, log_p, V, steps = _tree(student, teacher)
    return float(_values(log_q, log_p, V, steps)[0]) if steps else 0.0


def reverse_kl_vjp(student: FloatArray, teacher: FloatArray, dloss: float, /) -> TreeGradients:
    """Return the exact gradient: after a prefix, ``q(prefix) q_v (log q_v/p_v + value_v - value)``.

    Parameters
    ----------
    student, teacher
        As for `reverse_kl`.
    dloss : float
        Gradient of the loss.

    Returns
    -------
    TreeGradients
        Each row sums to 0.

    Examples
    --------
    >>> reverse_kl_vjp(np.array([[0.0, 0.0]]), np.array([[np.log(3.0), 0.0]]), 1.0).student.round(6)
    array([[-0.274653,  0.274653]])
    """
    dtype, log_q, log_p, V, steps = _tree(student, teacher)
    if not steps:
        return TreeGradients(np.zeros(np.shape(student), dtype))
    values = _values(log_q, log_p, V, steps)
    later = np.zeros(log_q.shape, log_q.dtype)
    inner = prefix_rows(V, steps - 1)
    later[:inner] = values[1:].reshape(inner, V)  # the children of prefix i are rows i V + 1 to i V + V
    reach = np.ones(len(log_q), log_q.dtype)
    if inner:
        for row in range(inner):
            reach[row * V + 1 : row * V + V + 1] = reach[row] * np.exp(log_q[row])
    gradient = reach[:, None] * np.exp(log_q) * (log_ratio(log_q, log_p) + later - values[:, None])
    return TreeGradients(round_to(float(dloss) * gradient, dtype))


def sequence_probabilities(logits: FloatArray, /, *, steps: int) -> tuple[IntArray, FloatArray]:
    """Return all sequences of `steps` tokens, in order, and their probabilities under a tree of logits.

    Examples
    --------
    >>> sequences, chances = sequence_probabilities(np.zeros((3, 2)), steps=2)
    >>> sequences.tolist(), chances
    ([[0, 0], [0, 1], [1, 0], [1, 1]], array([0.25, 0.25, 0.25, 0.25]))
    """
    log_q = log_softmax(logits)
    V = logits.shape[1]
    sequences = np.stack(np.unravel_index(np.arange(V**steps), (V,) * steps), axis=1)
    total, row = np.zeros(len(sequences)), np.zeros(len(sequences), np.int64)
    for t in range(steps):
        total += log_q[row, sequences[:, t]]
        row = row * V + 1 + sequences[:, t]
    return sequences, np.exp(total)


def _tree(
    student: FloatArray, teacher: FloatArray
) -> tuple[np.dtype[np.floating], FloatArray, FloatArray, int, int]:
    """Return the dtype, log-probabilities after every prefix, V, and the number of steps."""
    student, teacher = floating(student=student, teacher=teacher)
    size = bind_axes({"student": (student, "rows V"), "teacher": (teacher, "rows V")})
    if not size["V"]:
        raise ShapeError(f"student: expected at least one token, V >= 1, got shape {student.shape}")
    steps = 0
    while prefix_rows(size["V"], steps) < size["rows"]:
        steps += 1
    if prefix_rows(size["V"], steps) != size["rows"]:
        raise ShapeError(f"student: expected 1 + V + V² + ... rows for V = {size['V']}, got {size['rows']}")
    return student.dtype, log_softmax(student), log_softmax(teacher), size["V"], steps


def log_ratio(log_q: FloatArray, log_p: FloatArray) -> FloatArray:
    """Return ``log q/p`` where q is above 0, and 0 where it is not: 0 log 0 is 0.

    Examples
    --------
    >>> log_ratio(np.array([0.0, -np.inf]), np.array([-1.0, -np.inf]))
    array([1., 0.])
    """
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(log_q), 0, log_q - log_p).astype(log_q.dtype)


def _values(log_q: FloatArray, log_p: FloatArray, V: int, steps: int) -> FloatArray:
    """Return the reverse KL of what follows each prefix: that of the next token, and of what follows it."""
    q = np.exp(log_q)
    values: FloatArray = np.sum(q * log_ratio(log_q, log_p), axis=1)
    for t in range(steps - 2, -1, -1):
        first, count = prefix_rows(V, t), V**t
        children = values[first * V + 1 : first * V + 1 + count * V].reshape(count, V)
        values[first : first + count] += np.sum(q[first : first + count] * children, axis=1)
    return values
