"""Sequence-level distillation: the student is trained on what the teacher writes."""

from __future__ import annotations

from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.objectives.language_modeling import (
    LossGradients,
    instruction_loss,
    instruction_loss_vjp,
)
from refimpl.objectives.samples import loss_terms, sample_instruction
from refimpl.registry import Source, technique

__all__ = ["sequence_level_loss", "sequence_level_loss_vjp"]


@technique(
    "distill.sequence_level",
    entries=(86,),
    kind="function",
    source=Source("Kim and Rush 2016", "arXiv:1606.07947", "section 3.2, eq. 6 and 7"),
    axes={"B": (1, 3), "T": (1, 6), "V": (1, 6)},
    options={"values": ("normal", "large"), "packed": (False,)},
    edges=(
        {"B": 0, "T": 3, "V": 4},
        {"B": 2, "T": 0, "V": 4},
        {"B": 1, "T": 1, "V": 1, "values": "normal"},
        {"B": 2, "T": 5, "V": 4, "values": "large"},
    ),
    sample=sample_instruction,
    terms=loss_terms,
    vjp="refimpl.distill.sequence_level:sequence_level_loss_vjp",
)
def sequence_level_loss(student: FloatArray, tokens: IntArray, written: BoolArray, /) -> float:
    """Return the student's mean loss on the tokens that the teacher wrote.

    Parameters
    ----------
    student : ndarray of float, shape (B, T, V)
        The student's logits on prompts and the teacher's outputs.
    tokens : ndarray of int, shape (B, T)
        Prompt, and output of the teacher: its most probable sequence (beam search), or a sample.
    written : ndarray of bool, shape (B, T)
        True for the teacher's tokens, the end-of-sequence token included.

    Returns
    -------
    float
        In nats a token; 0 without tokens of the teacher.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `refimpl.objectives.instruction_loss`, which it is.

    Notes
    -----
    If the outputs are sampled from the teacher, its expectation is the cross-entropy of whole sequences, the
    forward KL plus the teacher's entropy.  With the teacher's mode in place of samples, as the paper does it,
    the student learns that mode.  Needs the teacher's text only, not its logits.

    References
    ----------
    .. [1] Kim and Rush, 2016, arXiv:1606.07947, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> tokens, written = np.array([[1, 0, 1]]), np.array([[False, True, True]])
    >>> round(sequence_level_loss(np.zeros((1, 3, 2)), tokens, written), 6)
    0.693147
    """
    return instruction_loss(student, tokens, written)


def sequence_level_loss_vjp(
    student: FloatArray, tokens: IntArray, written: BoolArray, dloss: float, /
) -> LossGradients:
    """Return the gradient of the student's logits.

    Examples
    --------
    >>> import numpy as np
    >>> tokens, written = np.array([[1, 0]]), np.array([[False, True]])
    >>> sequence_level_loss_vjp(np.zeros((1, 2, 2)), tokens, written, 1.0).dlogits[0, 0]
    array([-0.5,  0.5])
    """
    return instruction_loss_vjp(student, tokens, written, dloss)
