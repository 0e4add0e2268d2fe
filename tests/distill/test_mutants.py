"""Distillations that are wrong in one way: the laws must catch each; and what the divergences seek."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.distill import (
    augment,
    layer_map,
    minillm_gradient,
    nearest_embeddings,
    prediction_loss,
    reverse_kl,
    reverse_kl_vjp,
    sequence_level_loss,
    soft_target_loss,
    tinybert_layer_loss,
    tinybert_layer_loss_vjp,
)
from refimpl.errors import OptionError, ShapeError
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("distill.soft_targets")
def square_forgotten(s: Any, t: Any, labels: Any, /, *, temperature: float, weight: float) -> Any:
    soft = soft_target_loss(s, t, labels, temperature=temperature, weight=1.0) / temperature**2
    return (1 - weight) * soft_target_loss(s, t, labels, weight=0.0) + weight * soft


@mutant("distill.soft_targets")
def other_direction(s: Any, t: Any, labels: Any, /, *, temperature: float, weight: float) -> Any:
    soft = soft_target_loss(t, s, labels, temperature=temperature, weight=1.0)
    return (1 - weight) * soft_target_loss(s, t, labels, weight=0.0) + weight * soft


@mutant("distill.soft_targets")
def labels_softened_too(s: Any, t: Any, labels: Any, /, *, temperature: float, weight: float) -> Any:
    hard = soft_target_loss(s / temperature, t, labels, weight=0.0)
    return (1 - weight) * hard + weight * soft_target_loss(s, t, labels, temperature=temperature, weight=1.0)


@mutant("distill.soft_targets")
def weights_exchanged(s: Any, t: Any, labels: Any, /, *, temperature: float, weight: float) -> Any:
    return soft_target_loss(s, t, labels, temperature=temperature, weight=1 - weight)


@mutant("distill.tinybert")
def probabilities_compared(ss: Any, st: Any, hs: Any, ht: Any, w: Any, /, *, convention: Any) -> Any:
    def softmax(x: Any) -> Any:
        raised = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
        return raised / raised.sum(axis=-1, keepdims=True)

    return tinybert_layer_loss(softmax(ss), softmax(st), hs, ht, w, convention=convention)


@mutant("distill.tinybert")
def sum_for_mean(ss: Any, st: Any, hs: Any, ht: Any, w: Any, /, *, convention: Any) -> Any:
    return tinybert_layer_loss(ss, st, hs, ht, w, convention=convention) * max(ht.size, 1)


@mutant("distill.tinybert")
def conventions_exchanged(ss: Any, st: Any, hs: Any, ht: Any, w: Any, /, *, convention: Any) -> Any:
    other = {"paper": "released", "released": "paper"}[convention]
    return tinybert_layer_loss(ss, st, hs, ht, w, convention=other)  # type: ignore[arg-type]


@mutant("distill.tinybert")
def not_projected(ss: Any, st: Any, hs: Any, ht: Any, w: Any, /, *, convention: Any) -> Any:
    return tinybert_layer_loss(ss, st, hs, ht, np.eye(*w.shape), convention=convention)


@mutant("distill.tinybert.prediction")
def divergence_for_cross_entropy(s: Any, t: Any, /, *, temperature: float, convention: Any) -> Any:
    options = {"temperature": temperature, "convention": convention}
    return prediction_loss(s, t, **options) - prediction_loss(t, t, **options)  # type: ignore[arg-type]


@mutant("distill.tinybert.prediction")
def always_over_classes(s: Any, t: Any, /, *, temperature: float, convention: Any) -> Any:
    return prediction_loss(s, t, temperature=temperature, convention="released")


@mutant("distill.sequence_level")
def labels_not_shifted(s: Any, tokens: Any, written: Any, /) -> Any:
    return sequence_level_loss(np.roll(s, 1, axis=1), tokens, written)


@mutant("distill.sequence_level")
def prompt_learned_too(s: Any, tokens: Any, written: Any, /) -> Any:
    return sequence_level_loss(s, tokens, np.ones_like(written))


@mutant("distill.minillm.reverse_kl")
def forward_kl(s: Any, t: Any, /) -> Any:
    return reverse_kl(t, s)


@mutant("distill.minillm.reverse_kl")
def prefixes_weighed_alike(s: Any, t: Any, /) -> Any:
    return sum(reverse_kl(s[i : i + 1], t[i : i + 1]) for i in range(len(s)))


@mutant("distill.minillm")
def rewards_of_the_past(s: Any, t: Any, tokens: Any, /, *, estimator: Any, weights: Any = None) -> Any:
    flipped = None if weights is None else weights[:, ::-1]
    turned = (x[:, ::-1] for x in (s, t, tokens))
    return minillm_gradient(*turned, estimator=estimator, weights=flipped)[:, ::-1]


@mutant("distill.minillm")
def gradient_ascends(s: Any, t: Any, tokens: Any, /, **options: Any) -> Any:
    return -minillm_gradient(s, t, tokens, **options)


@mutant("distill.minillm")
def weights_ignored(s: Any, t: Any, tokens: Any, /, *, estimator: Any, weights: Any = None) -> Any:
    return minillm_gradient(s, t, tokens, estimator=estimator)


@mutant("distill.minillm")
def one_hot_alone(s: Any, t: Any, tokens: Any, /, *, estimator: Any, weights: Any = None) -> Any:
    g = minillm_gradient(s, t, tokens, estimator=estimator, weights=weights)
    return g * (np.arange(s.shape[2]) == tokens[..., None])


@mutant("distill.minillm")
def never_normalized(s: Any, t: Any, tokens: Any, /, *, estimator: Any, weights: Any = None) -> Any:
    name = "single_step" if estimator == "length_normalized" else estimator
    return minillm_gradient(s, t, tokens, estimator=name, weights=weights)


@mutant("distill.augmentation")
def sentence_last(tokens: Any, candidates: Any, u: Any, v: Any, /, *, probability: float) -> Any:
    return augment(tokens, candidates, u, v, probability=probability)[::-1]


@mutant("distill.augmentation")
def replaced_above(tokens: Any, candidates: Any, u: Any, v: Any, /, *, probability: float) -> Any:
    return augment(tokens, candidates, 1 - u, v, probability=1 - probability)


@mutant("distill.augmentation")
def replaced_up_to(tokens: Any, candidates: Any, u: Any, v: Any, /, *, probability: float) -> Any:
    return augment(tokens, candidates, u, v, probability=min(probability + 1e-9, 1.0))


@mutant("distill.augmentation")
def fillers_drawn_too(tokens: Any, candidates: Any, u: Any, v: Any, /, *, probability: float) -> Any:
    return augment(tokens, np.abs(candidates), u, v, probability=probability)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


def test_hot_soft_targets_match_logits() -> None:
    """As T grows the soft term tends to the squared distance of centred logits over 2 V."""
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 4, 7))
    gap = (teacher - teacher.mean(axis=1, keepdims=True)) - (student - student.mean(axis=1, keepdims=True))
    limit = np.mean(np.sum(gap**2, axis=1)) / 14
    loss = soft_target_loss(student, teacher, np.zeros(4, int), temperature=1e3, weight=1.0)
    assert abs(loss / limit - 1) < 1e-2


def test_reverse_kl_seeks_a_mode_and_forward_kl_the_mean() -> None:
    """A student of one bump, under a teacher of two: the best reverse KL sits on one of them."""
    places = np.arange(21)
    teacher = np.log(0.5 * np.exp(-((places - 4) ** 2) / 2) + 0.5 * np.exp(-((places - 16) ** 2) / 2) + 1e-9)
    students = [-((places - center) ** 2) / 2 - 1e-9 for center in places]
    reverse = [reverse_kl(student[None], teacher[None]) for student in students]
    forward = [reverse_kl(teacher[None], np.logaddexp(student, -40.0)[None]) for student in students]
    assert int(np.argmin(reverse)) in (4, 16)
    assert int(np.argmin(forward)) == 10


def test_the_exact_gradient_trains_a_student() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 13, 3))
    start = reverse_kl(student, teacher)
    for _ in range(300):
        student = student - 1.0 * reverse_kl_vjp(student, teacher, 1.0).student
    assert reverse_kl(student, teacher) < 0.01 * start


def test_layers_of_the_papers() -> None:
    assert layer_map(4, 12).attention == (2, 5, 8, 11)
    assert layer_map(4, 12).hidden == (0, 3, 6, 9, 12)
    assert layer_map(6, 12).hidden == (0, 2, 4, 6, 8, 10, 12)


def test_bad_input_is_refused() -> None:
    ones = np.ones
    with pytest.raises(ShapeError, match="teacher: axis V must equal"):
        soft_target_loss(ones((1, 2)), ones((1, 3)), np.array([0]))
    with pytest.raises(OptionError, match="weight: expected a number in"):
        soft_target_loss(ones((1, 2)), ones((1, 2)), np.array([0]), weight=2.0)
    with pytest.raises(OptionError, match="labels: expected ids"):
        soft_target_loss(ones((1, 2)), ones((1, 2)), np.array([2]))
    with pytest.raises(OptionError, match="must divide"):
        layer_map(5, 12)
    with pytest.raises(ShapeError, match="expected 1 \\+ V"):
        reverse_kl(ones((3, 3)), ones((3, 3)))
    with pytest.raises(OptionError, match="estimator: expected"):
        minillm_gradient(ones((1, 1, 2)), ones((1, 1, 2)), np.array([[0]]), estimator="x")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="k: expected less than"):
        nearest_embeddings(ones((2, 3)), np.array([0]), k=2)
    with pytest.raises(OptionError, match="u_choice: expected draws"):
        augment(np.array([1]), np.array([[2]]), np.zeros((1, 1)), np.full((1, 1), 2.0))


def test_excluded_tokens_count_for_nothing() -> None:
    """Logits of -inf, as top-k filters leave them: the same loss and gradients as without these classes."""
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 1, 3))
    padded = [np.concatenate([x, np.full((1, 1), -np.inf)], axis=1) for x in (student, teacher)]
    assert reverse_kl(*padded) == pytest.approx(reverse_kl(student, teacher), rel=1e-14)
    exact = reverse_kl_vjp(*padded, 1.0).student
    np.testing.assert_allclose(exact[:, :3], reverse_kl_vjp(student, teacher, 1.0).student, atol=1e-15)
    assert exact[0, 3] == 0
    token = np.array([[1]])
    found = minillm_gradient(padded[0][None], padded[1][None], token)
    np.testing.assert_allclose(
        found[..., :3], minillm_gradient(student[None], teacher[None], token), atol=1e-15
    )
    assert found[0, 0, 3] == 0
    unsure = np.array([[0.0, -np.inf]])
    assert soft_target_loss(unsure, np.zeros((1, 2)), np.array([0]), weight=0.0) == 0.0
    assert soft_target_loss(unsure, np.zeros((1, 2)), np.array([0]), weight=0.5) == np.inf
    with pytest.raises(ShapeError, match="at least one token"):
        reverse_kl(np.ones((3, 0)), np.ones((3, 0)))


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_neighbors_at_any_size(size: float) -> None:
    table = size * np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert nearest_embeddings(table, np.array([0]), k=2).tolist() == [[1, 2]]


def test_a_score_of_minus_100_is_masked() -> None:
    """The released comparison is ``<= -1e2``."""
    zero, one = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1))
    given = (zero - 100, zero, one, one, one[0])
    assert tinybert_layer_loss(*given, convention="released") == 0
    assert tinybert_layer_loss(*given, convention="paper") == 1e4
    apart = (zero - 100, zero + 5, *given[2:])
    assert tinybert_layer_loss_vjp(*apart, 1.0, convention="released").student_scores == 0
    assert tinybert_layer_loss_vjp(*apart, 1.0, convention="paper").student_scores == -210


def test_a_draw_at_the_probability_replaces_nothing() -> None:
    """Uniform draws of [0, 1) are below p with probability p: ``u < p``."""
    tokens, candidates, u = np.array([7, 8]), np.array([[1], [2]]), np.array([[0.5, np.nextafter(0.5, 0)]])
    assert augment(tokens, candidates, u, 0 * u, probability=0.5).tolist() == [[7, 8], [7, 2]]
