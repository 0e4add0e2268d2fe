"""Laws of distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.distill.reverse_kl import reverse_kl_vjp, sequence_probabilities
from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
SOFT = ("distill.soft_targets", "distill.tinybert.prediction")


def _like(array: Any, case: Case) -> Any:
    return round_to(np.asarray(array, np.float64), case.args[0].dtype)


def _log_p(logits: FloatArray, temperature: float = 1.0) -> FloatArray:
    z = logits / temperature
    z = z - z.max(axis=-1, keepdims=True, initial=-np.inf)
    log_p: FloatArray = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return log_p


# Soft targets


@law(*SOFT)
def a_shift_of_logits_does_not_matter(f: Function, case: Case, close: Close) -> None:
    """Two more on every logit of student and teacher change nothing."""
    student, teacher, *rest = case.args
    moved = case.replace(_like(in_float64(student) + 2, case), _like(in_float64(teacher) + 2, case), *rest)
    if all(np.array_equal(in_float64(moved.args[i]) - 2, in_float64(case.args[i])) for i in (0, 1)):
        close.on(moved)(moved.call(f), case.call(f), "logits shifted")


@law("distill.soft_targets")
def a_copy_of_the_teacher_has_no_soft_loss(f: Function, case: Case, close: Close) -> None:
    """Where the student equals its teacher, up to a constant a row, the soft term is 0."""
    teacher, labels = case.args[1:]
    if len(labels):
        same = case.replace(teacher.copy(), teacher, labels, weight=1.0)
        close.on(same)(same.call(f), np.asarray(0.0), "student = teacher")


@law("distill.soft_targets")
def without_soft_weight_it_is_cross_entropy(f: Function, case: Case, close: Close) -> None:
    """λ = 0 leaves the cross-entropy of the labels, whatever the temperature and the teacher."""
    student, teacher, labels = case.args
    hard = case.replace(student, teacher, labels, weight=0.0)
    truth = -np.mean(_log_p(in_float64(student))[np.arange(len(labels)), labels]) if len(labels) else 0.0
    close.on(hard)(hard.call(f), np.asarray(truth), "λ = 0")


@law("distill.soft_targets")
def the_soft_term_grows_with_its_square(f: Function, case: Case, close: Close) -> None:
    """The soft term is T² times the KL of the distributions at temperature T, teacher first."""
    student, teacher, labels = case.args
    if not len(labels):
        return
    for T in (1.0, 4.0):
        soft = case.replace(student, teacher, labels, weight=1.0, temperature=T)
        log_t, log_s = _log_p(in_float64(teacher), T), _log_p(in_float64(student), T)
        truth = T**2 * np.mean(np.sum(np.exp(log_t) * (log_t - log_s), axis=1))
        close.on(soft)(soft.call(f), np.asarray(truth), f"T = {T}", factor=4.0)


@law("distill.tinybert.prediction")
def never_below_the_entropy_of_the_teacher(f: Function, case: Case, close: Close) -> None:
    """The loss is the teacher's entropy where both agree; the released mean is the other over V."""
    student, teacher = case.args
    if not student.size:
        return
    T, V = case.kwargs["temperature"], student.shape[1]
    log_t = _log_p(in_float64(teacher), T)
    entropy = -np.mean(np.sum(np.exp(log_t) * log_t, axis=1))
    paper = case.replace(teacher.copy(), teacher, convention="paper")
    close.on(paper)(paper.call(f), np.asarray(entropy), "student = teacher")
    released = case.replace(student, teacher, convention="released")
    both = V * in_float64(released.call(f)), case.replace(student, teacher, convention="paper").call(f)
    close(*both, "mean over classes times V", factor=float(V))


# TinyBERT


@law("distill.tinybert")
def a_student_like_its_teacher_loses_nothing(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Equal scores, and hidden states that the projection maps onto the teacher's, have loss 0."""
    _, scores, hidden, target, projection = case.args
    zero = case.replace(scores.copy(), scores, hidden * 0, target * 0, projection)
    require(in_float64(zero.call(f)) == 0, "equal layers have a loss")


@law("distill.tinybert")
def scores_are_compared_unnormalized(f: Function, case: Case, close: Close) -> None:
    """One more on every score of the student costs 1, although no attention changes."""
    _, scores, hidden, target, projection = case.args
    if not scores.size:
        return
    base = round_to(np.zeros(scores.shape), scores.dtype)
    shifted = case.replace(base + 1, base, hidden * 0, target * 0, projection)
    close.on(shifted)(shifted.call(f), np.asarray(1.0), "scores shifted by 1")


@law("distill.tinybert")
def masked_scores_count_in_the_paper_alone(f: Function, case: Case, close: Close) -> None:
    """A score of -200 against 0 costs nothing in the released code, and 40,000 as printed."""
    _, scores, hidden, target, projection = case.args
    if not scores.size:
        return
    base = round_to(np.zeros(scores.shape), scores.dtype)
    masked = case.replace(base - 200, base, hidden * 0, target * 0, projection)
    truth = 0.0 if case.kwargs["convention"] == "released" else 40000.0
    close.on(masked)(masked.call(f), np.asarray(truth), "masked scores")


@law("distill.tinybert")
def hidden_states_pass_the_projection(f: Function, case: Case, close: Close) -> None:
    """The part of the hidden states is the mean square of H W - H_t, and quadruples when all is doubled."""
    scores, _, hidden, target, projection = case.args
    if not target.size:
        return
    alone = case.replace(scores, scores.copy(), hidden, target, projection)
    truth = np.mean((in_float64(hidden) @ in_float64(projection) - in_float64(target)) ** 2)
    close.on(alone)(alone.call(f), np.asarray(truth), "hidden states", factor=4.0)


# Sequences


@law("distill.sequence_level")
def certain_students_lose_nothing(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A student that is certain of the teacher's tokens has loss 0, an undecided one log V."""
    student, tokens, written = case.args
    B, T, V = student.shape
    if not B or T < 2:
        return
    sure = np.full((B, T, V), -1e4)
    for b in range(B):
        sure[b, np.arange(T - 1), tokens[b, 1:]] = 1e4
    require(abs(float(case.replace(_like(sure, case), tokens, written).call(f))) < 1e-6, "a certain student")
    even = float(case.replace(_like(np.zeros((B, T, V)), case), tokens, written).call(f))
    truth = np.log(V) if written[:, 1:].any() else 0.0
    require(abs(even - truth) < 1e-2, f"an undecided student loses {even}, expected {truth}")


@law("distill.sequence_level")
def prompts_are_not_learned(f: Function, case: Case, close: Close) -> None:
    """What stands at prompt positions as a label does not matter."""
    student, tokens, written = case.args
    other = np.where(written, tokens, 0)
    close(case.replace(student, other, written).call(f), case.call(f), "prompt labels changed")


@law("distill.sequence_level")
def expected_under_the_teacher_it_is_a_cross_entropy(f: Function, case: Case, close: Close) -> None:
    """Over samples of the teacher its mean is the cross-entropy of both, least for the teacher itself."""
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 3))
    p, total = np.exp(_log_p(teacher)), {"student": 0.0, "teacher": 0.0}
    for token in range(3):
        for name, logits in (("student", student), ("teacher", teacher)):
            row = _like(np.stack([logits, logits])[None], case)
            call = case.replace(row, np.array([[0, token]]), np.array([[False, True]]))
            total[name] += p[token] * float(call.call(f))
    truth = -float(p @ _log_p(student))
    room = 1e-2 if case.args[0].dtype.itemsize < 4 else 1e-5
    require(abs(total["student"] - truth) < room + close.tolerance, "not the cross-entropy")
    require(total["teacher"] < total["student"], "another student does better than the teacher itself")


# Reverse KL


@law("distill.minillm.reverse_kl")
def only_agreement_costs_nothing(f: Function, case: Case, close: Close) -> None:
    """The divergence is at least 0, and 0 where the student is its teacher."""
    teacher = case.args[1]
    require(float(case.call(f)) >= -2 * close.tolerance, "a negative divergence")
    same = case.replace(teacher.copy(), teacher)
    close.on(same)(same.call(f), np.asarray(0.0), "student = teacher")


@law("distill.minillm.reverse_kl")
def it_sums_over_sequences(f: Function, case: Case, close: Close) -> None:
    """It is the sum over all sequences of q log q/p."""
    student, teacher = (in_float64(array) for array in case.args)
    V, rows, steps = student.shape[1], 0, 0
    while rows < len(student):
        rows, steps = rows + V**steps, steps + 1
    if not steps:
        return
    _, q = sequence_probabilities(student, steps=steps)
    _, p = sequence_probabilities(teacher, steps=steps)
    close(case.call(f), np.asarray(np.sum(q * np.log(q / p))), "the sum over sequences", factor=2.0 * len(q))


# The gradient's estimate


@law("distill.minillm")
def gradients_of_logits_sum_to_zero(f: Function, case: Case, close: Close) -> None:
    """A constant on all logits of a position changes no distribution, so each row sums to 0."""
    total = np.sum(in_float64(case.call(f)), axis=2)
    close(
        total, np.zeros(total.shape), "sums over the vocabulary", factor=2.0 * max(case.args[0].shape[2], 1)
    )


@law("distill.minillm")
def unbiased_where_it_claims_to_be(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Over all sequences, each with its probability, the first two estimators give the exact gradient."""
    if case.kwargs["estimator"] == "length_normalized":
        return
    rng = np.random.default_rng(case.args[0].shape)
    V, steps = 3, 3
    student, teacher = (in_float64(_like(x, case)) for x in rng.standard_normal((2, 13, V)))
    sequences, q = sequence_probabilities(student, steps=steps)
    rows = np.zeros((len(sequences), steps), np.int64)
    for t in range(1, steps):
        rows[:, t] = rows[:, t - 1] * V + 1 + sequences[:, t - 1]
    weights = np.repeat((len(sequences) * q)[:, None], steps, axis=1)
    call = case.replace(
        _like(student[rows], case), _like(teacher[rows], case), sequences, weights=_like(weights, case)
    )
    found = np.zeros(student.shape)
    np.add.at(found, rows, in_float64(call.call(f)))
    exact = reverse_kl_vjp(student, teacher, 1.0).student
    room = {8: 1e-12, 4: 1e-4}.get(case.args[0].dtype.itemsize, 0.1)
    require(np.abs(found - exact) <= room, f"{np.abs(found - exact).max()} off")


@law("distill.minillm")
def a_copy_has_nothing_to_learn(f: Function, case: Case, close: Close) -> None:
    """With a student equal to its teacher the closed form gives no gradient at all."""
    _, teacher, tokens = case.args
    if case.kwargs["estimator"] != "reinforce":
        same = case.replace(teacher.copy(), teacher, tokens)
        close.on(same)(same.call(f), np.zeros(teacher.shape), "student = teacher")


@law("distill.minillm")
def later_rewards_are_averaged_if_asked(f: Function, case: Case, close: Close) -> None:
    """Over at most two steps the length-normalised estimator is the single-step one."""
    student, teacher, tokens = (array[:, :2] for array in case.args)
    options = {"weights": case.kwargs["weights"][:, :2]} if "weights" in case.kwargs else {}
    if case.kwargs["estimator"] == "reinforce":
        return
    short = case.replace(student, teacher, tokens, **options)
    both = [short.replace(estimator=name).call(f) for name in ("single_step", "length_normalized")]
    close.on(short)(both[0], both[1], "two steps")
    rng = np.random.default_rng(0)
    long = [_like(x, case) for x in rng.standard_normal((2, 1, 4, 3))]
    call = case.without("weights").replace(*long, np.zeros((1, 4), np.int64))
    summed, averaged = (
        in_float64(call.replace(estimator=n).call(f)) for n in ("single_step", "length_normalized")
    )
    require(np.any(np.abs(summed - averaged)[0, 0] > 1e-3), "four steps do not differ")


# Augmentation


@law("distill.augmentation")
def the_sentence_stays_first(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Row 0 is the sentence; with probability 0 all rows are, and lengths never change."""
    tokens, candidates, u_replace, u_choice = case.args
    out = np.asarray(case.call(f))
    require(out.shape == (1 + len(u_replace), len(tokens)), f"shape {out.shape}")
    require(out[0] == tokens, "the sentence changed")
    never = case.replace(tokens, candidates, u_replace * 0, u_choice, probability=0.0)  # also at a draw of 0
    require(np.asarray(never.call(f)) == tokens[None], "replaced at probability 0")


@law("distill.augmentation")
def only_candidates_appear(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every token of a copy is the sentence's or a candidate of its position."""
    tokens, candidates, *_ = case.args
    out = np.asarray(case.call(f))
    allowed = (out == tokens) | np.any(out[:, :, None] == np.where(candidates < 0, -2, candidates), axis=2)
    require(allowed, "a token from nowhere")


@law("distill.augmentation")
def certain_replacement_leaves_nothing(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """At probability 1 all that have candidates are replaced: by the first at draw 0, by the last near 1."""
    tokens, candidates, u_replace, u_choice = case.args
    count = np.sum(candidates >= 0, axis=1)
    for draw, index in ((0.0, np.zeros_like(count)), (0.996, count - 1)):
        drawn = np.full_like(u_choice, draw)
        fixed = case.replace(tokens, candidates, u_replace * 0, drawn, probability=1.0)
        rows = np.asarray(fixed.call(f))[1:]
        for place in np.flatnonzero(count):
            require(rows[:, place] == candidates[place, index[place]], f"position {place}")
        require(rows[:, count == 0] == tokens[count == 0], "replaced without candidates")
