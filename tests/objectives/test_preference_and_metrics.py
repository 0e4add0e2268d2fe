"""Bradley-Terry and metrics: fits against scikit-learn, known values, errors, and mutants that laws catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.objectives import (
    bits_per_byte,
    bradley_terry_loss,
    bradley_terry_loss_vjp,
    bradley_terry_probability,
    corpus_metrics,
    pass_at_k,
    perplexity,
    ranked_pairs,
    standard_error,
)
from tests.survivors import Mutants

registry.load()


def test_fitted_rewards_are_a_logistic_regression_on_differences() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 4, (2, 200))
    first, second = first[first != second], second[first != second]
    wins = rng.random(first.size) < bradley_terry_probability(0.7 * first, 0.7 * second)
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)

    def loss(rewards: Any) -> tuple[float, Any]:
        gradients = bradley_terry_loss_vjp(rewards[chosen], rewards[rejected], 1.0)
        gradient = np.zeros(4)
        np.add.at(gradient, chosen, gradients.dchosen)
        np.add.at(gradient, rejected, gradients.drejected)
        return bradley_terry_loss(rewards[chosen], rewards[rejected]), gradient

    ours = optimize.minimize(loss, np.zeros(4), jac=True, tol=1e-12).x
    x = np.eye(4)[first] - np.eye(4)[second]
    model = linear_model.LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=1000)
    theirs = model.fit(x[:, 1:], wins).coef_[0]  # the first reward is 0: only differences count
    np.testing.assert_allclose((ours - ours[0])[1:], theirs, atol=1e-4)


def test_three_ranked_answers_make_three_pairs() -> None:
    pairs = ranked_pairs(np.array([1, 3, 2]))
    found = set(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))
    assert found == {(0, 1), (0, 2), (2, 1)}
    assert ranked_pairs(np.array([1, 1, 1])).chosen.size == 0


def test_probabilities_of_both_outcomes_add_to_one() -> None:
    a, b = np.array([0.3, -2.0, 50.0]), np.array([1.0, 3.0, -50.0])
    np.testing.assert_allclose(
        bradley_terry_probability(a, b) + bradley_terry_probability(b, a), 1, rtol=1e-15
    )


def test_averages_by_pair_and_by_ranking() -> None:
    chosen, rejected, rankings = np.array([1.0, 1.0, 1.0, 0.0]), np.zeros(4), np.array([7, 7, 7, 9])
    right, even = math.log1p(math.exp(-1)), math.log(2)
    assert bradley_terry_loss(chosen, rejected) == pytest.approx((3 * right + even) / 4, rel=1e-15)
    by_ranking = bradley_terry_loss(chosen, rejected, rankings=rankings)
    assert by_ranking == pytest.approx((right + even) / 2, rel=1e-15)


def test_metrics_by_hand() -> None:
    # Documents of 1 and 3 tokens at perplexities 2 and 8: not 5, the mean, but (2 * 8**3)**(1/4).
    nats = np.log([2.0, 8.0**3])
    found = corpus_metrics(nats, np.array([1, 3]), np.array([5, 5]))
    assert found.perplexity == pytest.approx(1024**0.25, rel=1e-14)
    assert found.bits_per_byte == pytest.approx(1.0, rel=1e-14)
    assert perplexity(0.0) == 1
    assert perplexity(1e4) == math.inf
    assert bits_per_byte(0.0, n_bytes=3) == 0


def test_pass_at_k_by_hand() -> None:
    # HumanEval's example of a wrong estimate: 1 - (1 - c/n)**k is 0.75 here.
    assert pass_at_k(np.array([1]), np.array([2]), k=2).tolist() == [1.0]
    assert pass_at_k(np.array([3]), np.array([200]), k=100)[0] == pytest.approx(
        1 - 100 * 99 * 98 / (200 * 199 * 198)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bradley_terry_loss(np.zeros(2), np.zeros(3)), ShapeError, "rejected: axis pairs"),
        (lambda: bradley_terry_loss(np.zeros(2), np.zeros(2), rankings=np.zeros(3, int)), ShapeError, "axis"),
        (lambda: bradley_terry_loss(np.zeros(2), np.zeros(2), rankings=np.zeros(2)), DTypeError, "rankings"),
        (lambda: bradley_terry_loss(np.zeros(2), np.full(2, 1j)), DTypeError, "rejected: expected"),
        (lambda: ranked_pairs(np.zeros((1, 2), int)), ShapeError, "ranks: expected 1 axis"),
        (lambda: corpus_metrics(-np.ones(1), np.ones(1, int), np.ones(1, int)), OptionError, "nats"),
        (lambda: corpus_metrics(np.ones(1), np.zeros(1, int), np.ones(1, int)), OptionError, "tokens"),
        (lambda: corpus_metrics(np.ones(1), np.ones(1, int), np.ones(2, int)), ShapeError, "n_bytes: axis"),
        (lambda: perplexity(math.nan), OptionError, "loss: expected"),
        (lambda: bits_per_byte(1.0, n_bytes=0), OptionError, "n_bytes: expected at least 1"),
        (lambda: bits_per_byte(-1.0, n_bytes=1), OptionError, "nats: expected at least 0"),
        (lambda: pass_at_k(np.array([2]), np.array([1]), k=1), OptionError, "correct: expected 0 to samples"),
        (lambda: pass_at_k(np.array([1]), np.array([3]), k=4), OptionError, "k: expected at most"),
        (lambda: pass_at_k(np.array([1.0]), np.array([3]), k=1), DTypeError, "correct: expected integers"),
        (lambda: standard_error(np.ones(1)), OptionError, "values: expected at least 2, got 1"),
        (lambda: standard_error(np.ones((2, 2))), ShapeError, "values: expected 1 axis"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("objectives.bradley_terry")
def swapped(chosen: Any, rejected: Any, /, **options: Any) -> Any:
    return bradley_terry_loss(rejected, chosen, **options)


@mutant("objectives.bradley_terry")
def log_of_sigmoid(chosen: Any, rejected: Any, /, **options: Any) -> Any:
    if options or not chosen.size:
        return bradley_terry_loss(chosen, rejected, **options)
    with np.errstate(over="ignore", divide="ignore"):
        return float(np.mean(-np.log(1 / (1 + np.exp(rejected - chosen)))))


@mutant("objectives.bradley_terry")
def every_pair_counts(chosen: Any, rejected: Any, /, *, rankings: Any = None) -> Any:
    return bradley_terry_loss(chosen, rejected)


@mutant("objectives.bradley_terry")
def hinge(chosen: Any, rejected: Any, /, *, rankings: Any = None) -> Any:
    return float(np.mean(np.maximum(0, 1 - chosen + rejected))) if chosen.size else 0.0


@mutant("objectives.bradley_terry")
def sum_of_pairs(chosen: Any, rejected: Any, /, **options: Any) -> Any:
    return max(chosen.size, 1) * bradley_terry_loss(chosen, rejected, **options)


@mutant("objectives.metrics")
def mean_of_means(nats: Any, tokens: Any, n_bytes: Any, /) -> Any:
    found = corpus_metrics(nats, tokens, n_bytes)
    return found._replace(perplexity=float(np.exp(np.mean(nats / tokens))))


@mutant("objectives.metrics")
def bits_a_token(nats: Any, tokens: Any, n_bytes: Any, /) -> Any:
    return corpus_metrics(nats, tokens, tokens)


@mutant("objectives.metrics")
def nats_a_byte(nats: Any, tokens: Any, n_bytes: Any, /) -> Any:
    found = corpus_metrics(nats, tokens, n_bytes)
    return found._replace(bits_per_byte=found.bits_per_byte * math.log(2))


@mutant("objectives.metrics.pass_at_k")
def with_replacement(correct: Any, samples: Any, /, *, k: int) -> Any:
    return 1 - (1 - correct / samples) ** k


@mutant("objectives.metrics.pass_at_k")
def share_of_correct(correct: Any, samples: Any, /, *, k: int) -> Any:
    return correct / samples


@mutant("objectives.metrics.standard_error")
def population_variance(values: Any, /) -> Any:
    return float(np.std(values) / np.sqrt(values.size))


@mutant("objectives.metrics.standard_error")
def standard_deviation(values: Any, /) -> Any:
    return float(np.std(values, ddof=1))


@mutant("objectives.metrics.standard_error")
def one_pass(values: Any, /) -> Any:
    n = values.size
    return math.sqrt(max(float(np.mean(values**2) - np.mean(values) ** 2), 0.0) / (n - 1))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
